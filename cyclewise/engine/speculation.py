"""Decoding faster than one token a step: guesses that the next step verifies.

A step of a few tokens costs little more than a step of one, because the weights are read once for
all of them. Before a step, a `Speculator` asks its drafters what follows; `Generation.draft` lets
the step verify it, and what was chosen is, to the token, what would have been chosen without
(speculative decoding: Leviathan et al. 2022, arXiv:2211.17192). Drafters:

- `PromptLookup` continues the longest match of the last tokens with earlier ones: answers quote
  their prompts (Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, arXiv:2304.04487). After a
  wrong guess it goes on behind it, since a rewritten text differs by words.
- `DraftModel` asks a smaller model of the same vocabulary. It samples as the generation would, with
  the same random numbers, so that both choose alike wherever their probabilities do.

How many tokens are guessed follows from what steps cost here, measured while they run, and from how
often guesses came true. What guesses may cost when they all fail is bounded (`LOSS_SHARE`): where
speculation does not pay it ends by itself, and is tried again as the answer grows.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cyclewise.engine.generation import advance
from cyclewise.engine.kvcache import common_prefix
from cyclewise.errors import InvalidParameterError

if TYPE_CHECKING:
    import numpy.typing as npt

    from cyclewise.engine.engine import Engine
    from cyclewise.engine.generation import Generation

NUM_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Tokens of a step that verifies: one that is certain, the others guessed."""
MOST = NUM_ROWS[-1] - 1
"""Tokens of a guess."""
LOSS_SHARE = 0.01
"""Of the time that decoding has taken, what guesses may have cost more than they gained."""
MOST_STEPS = 30
"""Steps of one token, whose time guesses may cost at once: however much was gained before."""
LEAST_GAIN = 1.03
"""Speed that must be expected of a guess, relative to none."""
_NEWEST = 0.2
"""Weight of the newest measurement of a time."""
_MANY = 8
"""Tokens of a step whose time is that of reading."""


@dataclass(slots=True)
class Guess:
    """Tokens that may follow, and how likely each is if those before it came true."""

    token_ids: list[int]
    chances: list[float]


class Drafter(Protocol):
    """Where guesses come from, for one generation."""

    def propose(self, generation: Generation, account: Account) -> Guess:
        """What may follow the generation's tokens: at most MOST tokens, or none."""


class StepCosts:
    """Seconds that a step of one sequence takes, by its number of tokens. Kept from generation to
    generation.

    The pace of a computer that is shared changes from second to second, the shape of the curve does
    not: the shape is learned from steps of different sizes that follow each other, and the pace
    from each.
    """

    def __init__(self) -> None:
        self.plain = 0.0
        """Seconds of a step of one token; 0 before the first step."""
        self._ratios: dict[int, float] = {1: 1.0}
        self._learned: dict[int, int] = {}  # how often each ratio was
        self._before: tuple[int, float] | None = None

    def note(self, num_rows: int, seconds: float) -> None:
        """A step of `num_rows` tokens took so long."""
        if self._before is not None and self._before[0] != num_rows:
            rows, earlier = self._before
            if num_rows == 1:
                self._learn(rows, earlier / seconds)
            else:
                self._learn(num_rows, seconds / earlier * self._ratio(rows))
        self._before = num_rows, seconds
        pace = seconds / self._ratio(num_rows)
        # a step that was disturbed counts as twice the usual at most
        self.plain = _smooth(self.plain, min(pace, 2 * self.plain) if self.plain else pace)

    def of(self, num_rows: int) -> float:
        """What a step of `num_rows` tokens will take."""
        return self.plain * self._ratio(num_rows)

    def _learn(self, num_rows: int, ratio: float) -> None:
        before = self._ratio(num_rows)
        ratio = min(max(ratio, before / 2), 2 * before)
        times = self._learned[num_rows] = self._learned.get(num_rows, 0) + 1
        # The first counts whole: of steps that are all of one size, pace and shape cannot be told.
        self._ratios[num_rows] = before + max(_NEWEST, 1 / times) * (ratio - before)

    def _ratio(self, num_rows: int) -> float:
        """Relative to a step of one token; from the nearest smaller size that was measured."""
        below = max(rows for rows in self._ratios if rows <= num_rows)
        return self._ratios[below] * _shape(num_rows) / _shape(below)


def _smooth(before: float, newest: float) -> float:
    """A measured time with those before it, if there are any."""
    return before + _NEWEST * (newest - before) if before else newest


def _shape(num_rows: int) -> float:
    """How a step grows with its tokens where nothing was measured: the weights once, and the
    arithmetic of each token.
    """
    return 1 + 0.25 * (num_rows - 1)


class _Chance:
    """How often something came true of late, with a belief to begin with."""

    MEMORY = 30
    """Times that count."""

    def __init__(self, right: float, wrong: float) -> None:
        self._right, self._wrong = right, wrong

    @property
    def value(self) -> float:
        return self._right / (self._right + self._wrong)

    def learn(self, right: int, wrong: float) -> None:
        self._right += right
        self._wrong += wrong
        share = min(1.0, self.MEMORY / (self._right + self._wrong))
        self._right *= share
        self._wrong *= share


class PromptLookup:
    """Guesses that the text goes on as it did after the same words.

    A rewritten text differs from its source, and often in the same way again (a name, a space
    before a comma): what took a token's place once is expected in its place from then on.
    """

    LONGEST = 32
    """Tokens of a match that are compared."""
    CANDIDATES = 16
    """Earlier places that are compared, the latest first."""
    NEAR = 8
    """How far from where copying broke off a single token is looked for, and for how long."""

    def __init__(self) -> None:
        self._num_known = 0
        self._text: list[int] = []  # a token that took another's place stands there as the other
        self._instead: dict[int, int] = {}  # a token -> what took its place
        self._differed: tuple[int, int] | None = None  # the same, if copying goes on behind it
        self._latest: dict[tuple[int, int], int] = {}  # a pair -> where it last ended
        self._earlier: list[int] = [-1]  # by place: where the pair that ends there ended before
        self._source = -1  # the place that the next token would be copied from
        self._copied = 0  # the number of tokens when copying last went well
        self._proposed: list[int] = []
        self._kind = "pair"
        self._chances = {
            "long": _Chance(9, 1), "middle": _Chance(4, 1), "triple": _Chance(2, 1),
            "pair": _Chance(1, 1), "near": _Chance(1, 1), "behind": _Chance(1, 2),
        }  # fmt: skip
        self._later = _Chance(4, 1)

    def propose(self, generation: Generation, account: Account) -> Guess:
        known = generation.token_ids
        new = known[self._num_known :]
        self._num_known = len(known)
        self._learn(new)
        for token_id in new:
            self._follow(token_id)
        if len(self._text) - self._copied > self.NEAR:
            self._source = -1
        source, kind = self._find()
        if source < 0:
            self._proposed = []
            return Guess([], [])
        self._source, self._kind = source, kind
        if kind != "behind":
            self._copied = len(self._text)
        copied = self._text[source : source + MOST]
        self._proposed = [self._instead.get(token_id, token_id) for token_id in copied]
        later = [self._later.value] * (len(self._proposed) - 1)
        return Guess(self._proposed, [self._chances[kind].value, *later])

    def _learn(self, new: list[int]) -> None:
        """Compare the last proposal with what came, whether or not a step has verified it."""
        if not (self._proposed and new):
            return
        num_right = common_prefix(self._proposed, new)
        self._chances[self._kind].learn(min(1, num_right), int(not num_right))
        if num_right:
            broke = num_right < min(len(new), len(self._proposed))
            self._later.learn(num_right - 1, int(broke))

    def _follow(self, token_id: int) -> None:
        """Add a token. Where it goes on as the source does, move on there; over the first one that
        differs too: it may have taken the other's place.
        """
        place = len(self._text)
        if 0 <= self._source < place:
            copied = self._text[self._source]
            if token_id in (copied, self._instead.get(copied)):
                if token_id == copied:
                    self._instead.pop(copied, None)
                if self._differed and self._copied == place - 1:
                    self._instead.update([self._differed])
                self._differed = None
                self._source += 1
                self._copied = place + 1
                token_id = copied
            elif self._copied == place:
                self._differed = copied, token_id
                self._source += 1
        self._add(token_id)

    def _add(self, token_id: int) -> None:
        """Add a token to the text, and the pair that ends before it: the last one is looked for."""
        self._text.append(token_id)
        place = len(self._text) - 2
        if place > 0:
            pair = self._text[place - 1], self._text[place]
            self._earlier.append(self._latest.get(pair, -1))
            self._latest[pair] = place

    def _find(self) -> tuple[int, str]:
        """The place to copy from, and the kind of match; -1 if there is none."""
        text = self._text
        if len(text) < 3:
            return -1, "pair"
        best, best_length = -1, 1
        place = self._latest.get((text[-2], text[-1]), -1)
        for _ in range(self.CANDIDATES):
            if place < 1:
                break
            length = self._length(place)
            closer = abs(place + 1 - self._source) < abs(best + 1 - self._source)
            if length > best_length or (length == best_length and self._source >= 0 and closer):
                best, best_length = place, length
            place = self._earlier[place]
        if best >= 0:
            kinds = ((8, "long"), (4, "middle"), (3, "triple"), (2, "pair"))
            return best + 1, next(kind for least, kind in kinds if best_length >= least)
        if self._source < 0:
            return -1, "pair"
        if self._copied == len(text):
            return self._source, "near"
        start = max(0, self._source - 1)
        window = text[start : min(start + self.NEAR, len(text) - 1)]
        if text[-1] in window:
            return start + window.index(text[-1]) + 1, "near"
        just_differed = len(text) == self._copied + 1 and self._source < len(text) - 1
        return (self._source, "behind") if just_differed else (-1, "pair")

    def _length(self, place: int) -> int:
        """How many tokens that end at a place are also the last ones."""
        text, length = self._text, 2
        most = min(self.LONGEST, place + 1)
        while length < most and text[place - length] == text[-1 - length]:
            length += 1
        return length


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would say. It stays from generation to
    generation, and with it what it has learned.
    """

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        """engine      the draft model's
        vocab_size  of the model that it guesses for
        """
        self._engine = engine
        self._vocab_size = vocab_size
        self._sequence = engine.new_sequence()
        self._num_alike = 0  # of its sequence's tokens, those that are known to be the generation's
        self._num_known = 0
        self._proposed: list[int] = []
        self._sure: list[float] = []  # how likely the draft model thought each
        self._step_seconds = 0.0  # of a token that it guesses
        self._token_seconds = 0.0  # of one that it reads among others
        self._accepted = _Chance(1, 1)
        self._trust = _Chance(4, 0)  # of what it is sure of

    def begin(self) -> None:
        """A generation begins."""
        self._num_alike = self._num_known = 0
        self._proposed = []

    def propose(self, generation: Generation, account: Account) -> Guess:
        known = generation.token_ids
        self._learn(known[self._num_known :])
        self._num_known = len(known)
        pending = self._pending(known)
        gain = self._gain(account.costs)
        self._proposed, self._sure = [], []
        if not self._is_worth(len(pending), gain, account):
            return Guess([], [])
        trust = min(1.0, self._trust.value)
        sampler = generation.copy_sampler()
        expected = reached = 1.0
        seconds = account.costs.plain
        most, num_read = self._most(pending, account), len(pending) - 1
        while len(self._proposed) < most:
            count = len(self._proposed) + 1
            more = account.costs.of(count + 1) + count * self._step_seconds - seconds
            # another one must bring more tokens a second than those before it
            if self._proposed and reached * self._accepted.value * seconds < expected * more:
                break
            logits = self._evaluate(pending)
            token_id = sampler.sample(logits, known)
            shares = np.exp(logits - logits.max())
            self._sure.append(float(shares[token_id] / shares.sum()))
            self._proposed.append(token_id)
            known.append(token_id)
            pending = [token_id]
            reached *= trust * self._sure[-1]
            expected += reached
            seconds += more
        if num_read >= _MANY and gain >= LEAST_GAIN:  # an investment, which it is to bring back
            account.allowed += num_read * self._token_seconds
        return Guess(self._proposed, [trust * sure for sure in self._sure])

    def _pending(self, known: list[int]) -> list[int]:
        """The tokens that the draft model has not read; what others it has read is forgotten."""
        alike = self._num_alike
        alike += common_prefix(self._sequence.token_ids[alike:], known[alike:])
        self._num_alike = min(alike, len(known) - 1)
        self._sequence.truncate(self._num_alike)
        return known[self._num_alike :]

    def _gain(self, costs: StepCosts) -> float:
        """The speed that the best number of guesses would give, relative to none."""
        share = self._accepted.value
        speeds = (
            sum(share**count for count in range(rows))
            / (costs.of(rows) + (rows - 1) * self._step_seconds)
            for rows in NUM_ROWS[1:]
        )
        return max(speeds) * costs.plain

    def _is_worth(self, num_pending: int, gain: float, account: Account) -> bool:
        """Whether to guess: where it is expected to pay, as soon as it would have paid for what is
        to be read first; else where that and a guess in vain are within what may be lost.
        """
        reading = (num_pending - 1) * self._token_seconds
        if gain < LEAST_GAIN:
            in_vain = self._step_seconds + account.costs.of(2) - account.costs.plain
            return reading + in_vain <= account.allowed
        return reading <= account.allowed + account.seconds * (1 - 1 / gain)

    def _most(self, pending: list[int], account: Account) -> int:
        """How many tokens may be guessed: in vain, they must not cost more than is allowed."""
        if max(pending) >= self._engine.vocab_size:  # the draft model's table ends before
            return 0
        costs = account.costs
        most = min(MOST, self._engine.context - len(self._sequence) - len(pending) + 1)
        in_vain = (
            count * self._step_seconds + costs.of(count + 1) - costs.plain
            for count in range(1, most + 1)
        )
        return sum(seconds <= account.allowed for seconds in in_vain)

    def _evaluate(self, pending: list[int]) -> npt.NDArray[np.float32]:
        """The logits that follow, of the other model's tokens; what it takes is noted."""
        start = perf_counter()
        logits: npt.NDArray[np.float32] = self._engine.evaluate(self._sequence, pending)[0]
        seconds = perf_counter() - start
        if len(pending) == 1:
            # the first ones wake threads and touch memory for the first time
            self._step_seconds = min(seconds, _smooth(self._step_seconds, seconds))
        elif len(pending) >= _MANY:
            self._token_seconds = _smooth(self._token_seconds, seconds / len(pending))
        missing = self._vocab_size - len(logits)
        if missing > 0:
            return np.pad(logits, (0, missing), constant_values=-np.inf)
        return logits[: self._vocab_size]

    def _learn(self, new: list[int]) -> None:
        num_right = common_prefix(self._proposed, new)
        num_judged = min(num_right + 1, len(new), len(self._proposed))
        self._accepted.learn(num_right, num_judged - num_right)
        self._trust.learn(num_right, sum(self._sure[:num_judged]) - num_right)


class Speculation:
    """What outlives a generation: the account, and the draft model."""

    def __init__(self, vocab_size: int, draft: Engine | None = None) -> None:
        """vocab_size  of the model
        draft       the engine of a draft model
        """
        self._account = Account()
        self._draft = None if draft is None else DraftModel(draft, vocab_size)

    def begin(self, enabled: bool = True) -> Speculator:
        """For a generation that begins; one at a time.

        enabled  False: nothing is guessed
        """
        drafters: list[Drafter] = []
        if enabled:
            drafters.append(PromptLookup())
        if enabled and self._draft is not None:
            self._draft.begin()
            drafters.append(self._draft)
        self._account.begin()
        return Speculator(self._account, drafters)


class Account:
    """What steps cost, and what guesses may cost next. It stays from generation to generation."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.seconds = 0.0
        """Of decoding, in this generation."""
        self.allowed = 0.0
        """Seconds that guesses may cost next, if they are in vain."""

    def begin(self) -> None:
        """A generation begins."""
        self.seconds = 0.0

    def note(self, num_guessed: int, num_right: int, guess_seconds: float, seconds: float) -> None:
        """A step has verified so many guesses, of which so many were right; what both took."""
        if not self.costs.plain:
            self.allowed = seconds
        self.costs.note(1 + num_guessed, seconds)
        self.seconds += guess_seconds + seconds
        self.allowed += LOSS_SHARE * (guess_seconds + seconds) - guess_seconds
        if num_guessed:
            self.allowed += self.costs.plain * (1 + num_right) - seconds
        self.allowed = min(self.allowed, MOST_STEPS * self.costs.plain)


class Speculator:
    """Decides before each step of one generation what is guessed, and learns from each."""

    def __init__(self, account: Account, drafters: SequenceOf[Drafter]) -> None:
        self._account = account
        self._drafters = drafters

    def advance(self, engine: Engine, generations: SequenceOf[Generation]) -> list[list[int]]:
        """Run one step as `generation.advance` does. One that decodes alone may gain several
        tokens.
        """
        if not self._drafters or len(generations) != 1:
            return advance(engine, generations)
        (generation,) = generations
        num_accepted = generation.num_accepted
        start = perf_counter()
        num_guessed = self._guess(generation)
        guessed = perf_counter()
        gained = advance(engine, generations)
        num_right = generation.num_accepted - num_accepted
        self._account.note(num_guessed, num_right, guessed - start, perf_counter() - guessed)
        return gained

    def _guess(self, generation: Generation) -> int:
        """Draft what follows, if that is likely to pay; returns how many tokens."""
        account = self._account
        costs, allowed = account.costs, account.allowed
        if costs.plain and allowed >= costs.of(2) - costs.plain:
            for drafter in self._drafters:
                guess = drafter.propose(generation, account)
                count = _best_count(guess, costs, allowed)
                if count:
                    return generation.draft(guess.token_ids[:count])
        return 0


def _best_count(guess: Guess, costs: StepCosts, allowed: float) -> int:
    """How many of the tokens to verify, for the most tokens a second; 0: none."""
    best, best_speed = 0, LEAST_GAIN / costs.plain
    expected = reached = 1.0
    for count, chance in enumerate(guess.chances, 1):
        reached *= chance
        expected += reached
        if count + 1 in NUM_ROWS or count == len(guess.chances):
            seconds = costs.of(count + 1)
            if seconds - costs.plain > allowed:
                break
            if expected / seconds > best_speed:
                best, best_speed = count, expected / seconds
    return best


class Vocabulary(Protocol):
    """What is read of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def token_text(self, token_id: int) -> str: ...


def check_vocabularies(ours: Vocabulary, theirs: Vocabulary) -> None:
    """Raise InvalidParameterError unless a draft model's tokens are the model's own.

    Tables are padded to different lengths; what both have must be alike.
    """
    count = min(ours.vocab_size, theirs.vocab_size)
    alike = max(ours.vocab_size, theirs.vocab_size) <= 1.05 * count and all(
        ours.token_text(token_id) == theirs.token_text(token_id) for token_id in range(count)
    )
    if not alike:
        raise InvalidParameterError(
            "the draft model has another vocabulary than the model: take a smaller model of the "
            "same family"
        )
