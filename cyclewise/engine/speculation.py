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

from cyclewise.engine.generation import advance
from cyclewise.errors import InvalidParameterError

if TYPE_CHECKING:
    from cyclewise.engine.engine import Engine
    from cyclewise.engine.generation import Generation
    from cyclewise.engine.kvcache import Sequence

NUM_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Tokens of a step that verifies: one that is certain, the others guessed."""
MOST = NUM_ROWS[-1] - 1
"""Tokens of a guess."""
LOSS_SHARE = 0.01
"""Of the time that decoding has taken, what guesses may have cost in vain."""
LEAST_GAIN = 1.03
"""Speed that must be expected of a guess, relative to none."""
_NEWEST = 0.2
"""Weight of the newest measurement of a step's time."""


@dataclass(slots=True)
class Guess:
    """Tokens that may follow, and how likely each is if those before it came true."""

    token_ids: list[int]
    chances: list[float]


class Drafter(Protocol):
    """Where guesses come from, for one generation."""

    def propose(self, generation: Generation, costs: StepCosts) -> Guess:
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
        if self.plain:  # a step that was disturbed counts as twice the usual at most
            pace = self.plain + _NEWEST * (min(pace, 2 * self.plain) - self.plain)
        self.plain = pace

    def of(self, num_rows: int) -> float:
        """What a step of `num_rows` tokens will take."""
        return self.plain * self._ratio(num_rows)

    def _learn(self, num_rows: int, ratio: float) -> None:
        before = self._ratio(num_rows)
        ratio = min(max(ratio, before / 2), 2 * before)
        self._ratios[num_rows] = before + _NEWEST * (ratio - before)

    def _ratio(self, num_rows: int) -> float:
        """Relative to a step of one token; from the nearest smaller size that was measured."""
        below = max(rows for rows in self._ratios if rows <= num_rows)
        return self._ratios[below] * _shape(num_rows) / _shape(below)


def _shape(num_rows: int) -> float:
    """How a step grows with its tokens where nothing was measured: the weights once, and the
    arithmetic of each token.
    """
    return 1 + 0.25 * (num_rows - 1)


class _Chance:
    """How often something came true, with a belief to begin with."""

    def __init__(self, right: float, wrong: float) -> None:
        self._right, self._wrong = right, wrong

    @property
    def value(self) -> float:
        return self._right / (self._right + self._wrong)

    def learn(self, right: int, wrong: int) -> None:
        self._right += right
        self._wrong += wrong


class PromptLookup:
    """Guesses that the text goes on as it did after the same words."""

    LONGEST = 32
    """Tokens of a match that are compared."""
    CANDIDATES = 16
    """Earlier places that are compared, the latest first."""
    NEAR = 8
    """How far from where copying broke off a single token is looked for, and for how long."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
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

    def propose(self, generation: Generation, costs: StepCosts) -> Guess:
        num_known = len(self._token_ids)
        self._extend(generation.token_ids)
        self._learn(self._token_ids[num_known:])
        self._follow(num_known)
        source, kind = self._find()
        if source < 0:
            self._proposed = []
            return Guess([], [])
        self._source, self._kind = source, kind
        if kind != "behind":
            self._copied = len(self._token_ids)
        self._proposed = self._token_ids[source : source + MOST]
        later = [self._later.value] * (len(self._proposed) - 1)
        return Guess(self._proposed, [self._chances[kind].value, *later])

    def _learn(self, new: list[int]) -> None:
        """Compare the last proposal with what came, whether or not a step has verified it."""
        if not (self._proposed and new):
            return
        num_right = _common_prefix(self._proposed, new)
        self._chances[self._kind].learn(min(1, num_right), int(not num_right))
        if num_right:
            broke = num_right < min(len(new), len(self._proposed))
            self._later.learn(num_right - 1, int(broke))

    def _extend(self, token_ids: SequenceOf[int]) -> None:
        """Add the pairs of the tokens that are new, but for the last one: it is what is looked
        for.
        """
        known = self._token_ids
        for place in range(max(1, len(known) - 1), len(token_ids) - 1):
            pair = (token_ids[place - 1], token_ids[place])
            if place == len(self._earlier):
                self._earlier.append(self._latest.get(pair, -1))
            self._latest[pair] = place
        known.extend(token_ids[len(known) :])

    def _follow(self, num_known: int) -> None:
        """Move on in the source by what was copied since, and over the first token that differed:
        one may have taken its place.
        """
        for place in range(num_known, len(self._token_ids)):
            if not 0 <= self._source < place:
                return
            if self._token_ids[place] == self._token_ids[self._source]:
                self._source += 1
                self._copied = place + 1
            elif self._copied == place:
                self._source += 1
        if len(self._token_ids) - self._copied > self.NEAR:
            self._source = -1

    def _find(self) -> tuple[int, str]:
        """The place to copy from, and the kind of match; -1 if there is none."""
        known = self._token_ids
        if len(known) < 3:
            return -1, "pair"
        best, best_length = -1, 1
        place = self._latest.get((known[-2], known[-1]), -1)
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
        if self._copied == len(known):
            return self._source, "near"
        window = known[self._source : min(self._source + self.NEAR, len(known) - 1)]
        if known[-1] in window:
            return self._source + window.index(known[-1]) + 1, "near"
        just_differed = len(known) == self._copied + 1 and self._source < len(known) - 1
        return (self._source, "behind") if just_differed else (-1, "pair")

    def _length(self, place: int) -> int:
        """How many tokens that end at a place are also the last ones."""
        known, length = self._token_ids, 2
        most = min(self.LONGEST, place + 1)
        while length < most and known[place - length] == known[-1 - length]:
            length += 1
        return length


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would say."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        """sequence  of the draft model's engine; what it holds already is used if it fits"""
        self._engine, self._sequence = engine, sequence
        self._step_seconds = 0.0
        self._num_known = 0
        self._proposed = Guess([], [])
        self._right = self._expected = 4.0  # tokens that came true, and that should have

    def propose(self, generation: Generation, costs: StepCosts) -> Guess:
        import numpy as np

        known = generation.token_ids
        self._learn(known[self._num_known :])
        self._num_known = len(known)
        sampler = generation.copy_sampler()
        same = _common_prefix(self._sequence.token_ids, known)
        self._sequence.truncate(min(same, len(known) - 1))
        pending = known[len(self._sequence) :]
        trust = min(1.0, self._right / self._expected)
        row_seconds = (costs.of(4) - costs.plain) / 3
        self._proposed = guess = Guess([], [])
        reached = 1.0
        while len(guess.token_ids) < MOST:
            if len(self._sequence) + len(pending) > self._engine.context:
                break
            start = perf_counter()
            logits = self._engine.evaluate(self._sequence, pending)[0]
            token_id = sampler.sample(logits, known)
            shares = np.exp(logits - logits.max())
            chance = trust * float(shares[token_id] / shares.sum())
            if len(pending) == 1:
                self._step_seconds = perf_counter() - start
            reached *= chance
            guess.token_ids.append(token_id)
            guess.chances.append(chance)
            known.append(token_id)
            pending = [token_id]
            if reached * costs.plain < row_seconds + self._step_seconds:
                break  # the next one would not be worth its time
        return guess

    def _learn(self, new: list[int]) -> None:
        num_right = _common_prefix(self._proposed.token_ids, new)
        trust = min(1.0, self._right / self._expected)
        judged = self._proposed.chances[: min(num_right + 1, len(new))]
        self._right += min(num_right, len(judged))
        self._expected += sum(judged) / trust


def _common_prefix(first: SequenceOf[int], second: SequenceOf[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


class Speculation:
    """What outlives a generation: what steps cost, and the draft model."""

    def __init__(self, draft: Engine | None = None) -> None:
        """draft  the engine of a draft model"""
        self._draft = draft
        self._costs = StepCosts()
        self._sequence = draft.new_sequence() if draft else None

    def begin(self, enabled: bool = True) -> Speculator:
        """For a generation that begins; one at a time.

        enabled  False: nothing is guessed
        """
        drafters: list[Drafter] = [PromptLookup()] if enabled else []
        if enabled and self._draft is not None and self._sequence is not None:
            drafters.append(DraftModel(self._draft, self._sequence))
        return Speculator(self._costs, drafters)


class Speculator:
    """Decides before each step of one generation what is guessed, and learns from each."""

    def __init__(self, costs: StepCosts, drafters: SequenceOf[Drafter]) -> None:
        self._costs = costs
        self._drafters = drafters
        self._seconds = 0.0  # of decoding
        self._lost = 0.0  # of these, what guesses have cost more than they gained
        self.num_guessed = 0
        """Tokens that steps have verified."""
        self.num_right = 0
        """Those of them that came true."""

    def advance(self, engine: Engine, generations: SequenceOf[Generation]) -> list[list[int]]:
        """Run one step as `generation.advance` does. One that decodes alone may gain several
        tokens.
        """
        if not self._drafters or len(generations) != 1:
            return advance(engine, generations)
        start = perf_counter()
        num_guessed = self._guess(generations[0])
        guessed = perf_counter()
        gained = advance(engine, generations)
        self._note(num_guessed, len(gained[0]), guessed - start, perf_counter() - guessed)
        return gained

    def _guess(self, generation: Generation) -> int:
        """Draft what follows, if that is likely to pay; returns how many tokens."""
        plain = self._costs.plain
        if plain:
            allowed = LOSS_SHARE * self._seconds + plain - self._lost
            for drafter in self._drafters:
                if allowed < self._costs.of(2) - plain:
                    break
                guess = drafter.propose(generation, self._costs)
                count = self._count(guess, allowed)
                if count:
                    return generation.draft(guess.token_ids[:count])
        return 0

    def _note(
        self, num_guessed: int, num_gained: int, guess_seconds: float, seconds: float
    ) -> None:
        """A step has verified so many guesses and gained so many tokens; what both took."""
        self._costs.note(1 + num_guessed, seconds)
        self._seconds += guess_seconds + seconds
        self._lost += guess_seconds
        if num_guessed:
            self._lost += seconds - self._costs.plain * max(1, num_gained)
            self.num_guessed += num_guessed
            self.num_right += max(0, num_gained - 1)

    def _count(self, guess: Guess, allowed: float) -> int:
        """How many of the tokens to verify, for the most tokens a second; 0: none."""
        plain = self._costs.plain
        best, best_speed = 0, LEAST_GAIN / plain
        expected = reached = 1.0
        for count, chance in enumerate(guess.chances, 1):
            reached *= chance
            expected += reached
            if count + 1 in NUM_ROWS or count == len(guess.chances):
                seconds = self._costs.of(count + 1)
                if seconds - plain > allowed:
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
