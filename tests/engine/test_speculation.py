"""Guesses change how many steps there are, and no token; where they do not pay they end."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cyclewise.engine import speculation
from cyclewise.engine.engine import Engine
from cyclewise.engine.generation import Generation, advance
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.speculation import (
    NUM_ROWS,
    Account,
    DraftModel,
    Guess,
    PromptLookup,
    Speculation,
    Speculator,
    StepCosts,
    check_vocabularies,
)
from cyclewise.errors import InvalidParameterError
from tests.engine.toy import END, VOCAB_SIZE, ToyModel, ToyTokenizer, hashed_logits

TEXT = b"the quick brown fox jumps over the lazy dog while the sun sets behind the old grey hills"
EDITED = TEXT.replace(b"brown", b"black").replace(b"lazy ", b"very lazy ").replace(b"old ", b"")
PROMPT = [*b"copy: ", *TEXT, *b" -> "]


def rewriting(flat=0.0):
    """Logits that write EDITED after PROMPT, then end; `flat` makes other tokens likely too."""
    script = [*EDITED, END]

    def logits(token_ids):
        row = np.zeros(VOCAB_SIZE, np.float32) if not flat else hashed_logits(token_ids) * flat
        row[script[min(max(0, len(token_ids) - len(PROMPT)), len(script) - 1)]] = 12
        return row

    return logits


def model(logits, context=1024):
    return ToyModel(context=context, page_tokens=4, max_batch_tokens=64, logits=logits)


def seconds_of(num_rows):
    return 1 + 0.2 * (num_rows - 1)


@pytest.fixture(autouse=True)
def time_by_rows(monkeypatch):
    """A clock that only steps move."""
    passed = [0.0]

    def advance_(engine, generations):
        passed[0] += seconds_of(len(generations[0].request.token_ids))
        return advance(engine, generations)

    monkeypatch.setattr(speculation, "perf_counter", lambda: passed[0])
    monkeypatch.setattr(speculation, "advance", advance_)
    return passed


def begin(draft=None):
    return Speculation(VOCAB_SIZE, draft).begin()


def generate(engine, prompt, speculator=None, **values):
    """The tokens, and the seconds that decoding took."""
    generation, tokens, seconds = run(engine, prompt, speculator, **values)
    engine.free(generation.sequence)
    return tokens, seconds


def run(engine, prompt, speculator=None, **values):
    """The same, with the generation."""
    params = SamplingParams(**{"max_tokens": 200, "seed": 1, "temperature": 0, **values})
    stop = frozenset({END})
    generation = Generation(engine, engine.new_sequence(), prompt, params, stop)
    tokens, seconds = [], 0.0
    while generation.finish_reason is None:
        if tokens and speculator:
            steps = len(engine.machine.steps)
            (gained,) = speculator.advance(engine, [generation])
            rows = engine.machine.steps[steps:]
        else:
            rows = [len(generation.request.token_ids)] if tokens else []
            (gained,) = advance(engine, [generation])
        seconds += sum(map(seconds_of, rows))
        tokens += gained
    return generation, tokens, seconds


def test_a_rewritten_text_takes_fewer_steps():
    engine = Engine(model(rewriting()))
    plain, slow = generate(engine, PROMPT)
    assert bytes(plain) == EDITED
    generation, guessed, fast = run(engine, PROMPT, begin())
    assert guessed == plain
    assert slow / fast > 2
    assert 50 < generation.num_accepted <= generation.num_guessed


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"top_k": 5},
        {"repetition_penalty": 1.2, "min_p": 0},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {101: 4, 32: -2}},
        {"typical_p": 0.9, "top_p": 0.8, "logprobs": 2},
    ],
)
def test_sampled_answers_are_the_same_for_every_seed(values):
    engine = Engine(model(rewriting(flat=1.5)))
    verified = 0
    for seed in range(30):
        sampled = {"temperature": 1.5, "seed": seed, "max_tokens": 60, **values}
        slow, plain, _ = run(engine, PROMPT, **sampled)
        fast, guessed, _ = run(engine, PROMPT, begin(), **sampled)
        assert guessed == plain
        assert fast.scores == slow.scores
        assert fast.finish_reason == slow.finish_reason
        verified += fast.num_guessed
        engine.free(slow.sequence)
        engine.free(fast.sequence)
    assert verified > 50


class Hasty:
    """Guesses one of three tokens at random, always four of them, and is certain."""

    def __init__(self):
        self.random = np.random.default_rng(1)

    def propose(self, generation, account):
        return Guess(self.random.integers(97, 100, 4).tolist(), [1.0] * 4)


def test_sampled_answers_have_the_distribution_of_the_model():
    """Whole answers of four tokens, each of which depends on the one before, against the
    probabilities of all 81: chi-square with 80 degrees of freedom.
    """
    weights = np.array([[2.0, 1.0, 0.0], [0.0, 1.5, 0.5], [1.0, 0.3, 0.7]], np.float32)

    def logits(token_ids):
        row = np.full(VOCAB_SIZE, -50, np.float32)
        row[97:100] = weights[token_ids[-1] - 97]
        return row

    def statistic(temperature):
        shares = np.exp(weights.astype(float) / temperature)
        shares /= shares.sum(axis=1, keepdims=True)
        total = 0.0
        for answer in np.ndindex(3, 3, 3, 3):
            expected = num_answers * np.prod(shares[[0, *answer[:-1]], answer])
            total += (counts[tuple(97 + np.array(answer))] - expected) ** 2 / expected
        return total

    engine, num_answers, counts = Engine(model(logits)), 3000, Counter()
    settings = {"temperature": 0.8, "top_k": 0, "top_p": 1, "min_p": 0, "max_tokens": 4}
    accepted = guessed = 0
    for seed in range(num_answers):
        free = Account()
        free.costs.plain = free.allowed = 1000.0  # beside which steps are for nothing
        generation, tokens, _ = run(
            engine, [97], Speculator(free, [Hasty()]), seed=seed, **settings
        )
        counts[tuple(tokens)] += 1
        accepted += generation.num_accepted
        guessed += generation.num_guessed
        engine.free(generation.sequence)
    assert guessed > 1.2 * num_answers and 0.15 < accepted / guessed < 0.5
    assert statistic(temperature=0.8) < 124.8  # 1 in 1,000
    assert statistic(temperature=0.9) > 124.8  # a distribution that is nearly the same is not it


class Wrong:
    """Is certain, and never right."""

    def propose(self, generation, account):
        return Guess([255] * 40, [0.99] * 40)


@pytest.mark.parametrize("num_tokens", [60, 200])
def test_guesses_that_fail_cost_little(num_tokens):
    engine = Engine(model(lambda ids: np.eye(VOCAB_SIZE, dtype=np.float32)[len(ids) % 7] * 30))
    plain, slow = generate(engine, PROMPT, max_tokens=num_tokens)
    speculator = Speculator(Account(), [Wrong()])
    generation, guessed, fast = run(engine, PROMPT, speculator, max_tokens=num_tokens)
    assert guessed == plain
    assert generation.num_guessed > 0 and generation.num_accepted == 0
    assert fast / slow < 1.03


def test_guesses_stay_within_the_context():
    engine = Engine(model(rewriting(), context=len(PROMPT) + 21))
    plain, _ = generate(engine, PROMPT)
    guessed, _ = generate(engine, PROMPT, begin())
    assert guessed == plain and len(plain) == 22


class Text:
    """A generation as drafters see it."""

    def __init__(self, token_ids):
        self.token_ids = token_ids


ACCOUNT = Account()
ACCOUNT.note(0, 0, 0.0, 1.0)


def proposals(*texts):
    """What a lookup proposes as its text grows."""
    lookup = PromptLookup()
    return [bytes(lookup.propose(Text([*text]), ACCOUNT).token_ids) for text in texts]


def test_a_lookup_continues_the_longest_match():
    assert proposals(b"one two. one six. one t") == [b"wo. one six. one t"]
    assert proposals(b"abcabd. xbc") == [b"abd. xbc"]
    assert proposals(b"abcdefg") == [b""]
    assert proposals(b"") == proposals(b"a") == proposals(b"ab") == [b""]


def test_a_lookup_goes_on_behind_what_differed():
    before = b"the old man and the sea|the o"
    assert proposals(before, before + b"x")[1].startswith(b"d man")  # for another
    grown = [before, before + b"x", before + b"xy", before + b"xyd"]
    assert proposals(*grown)[2] == b""
    assert proposals(*grown)[3].startswith(b" man")  # a token that is near


def test_a_lookup_learns_what_to_expect():
    lookup = PromptLookup()
    text = b"ab1 ab2 ab3 ab4 ab5 ab6 ab7 "
    first = lookup.propose(Text([*text, *b"ab"]), ACCOUNT).chances[0]
    for i in range(6):
        text += b"ab" + bytes([200 + i])
        lookup.propose(Text([*text]), ACCOUNT)
        again = lookup.propose(Text([*text, *b"ab"]), ACCOUNT)
    assert again.chances[0] < first / 2


def test_what_steps_cost_follows_the_pace_and_keeps_the_shape():
    costs, true = StepCosts(), {1: 1.0, 4: 1.3, 8: 3.5}
    assert costs.plain == 0
    for pace in (0.01, 0.03):
        for _ in range(30):
            for rows, ratio in true.items():
                costs.note(rows, pace * ratio)
        for _ in range(20):
            costs.note(4, pace * 1.3)
        assert costs.plain == pytest.approx(pace, rel=0.02)
        for rows, ratio in true.items():
            assert costs.of(rows) == pytest.approx(pace * ratio, rel=0.02)
    assert costs.of(16) > costs.of(12) > costs.of(8)
    assert NUM_ROWS[0] == 1


def drafting(passed, logits, seconds_a_token=0.05, context=1024, vocab_size=VOCAB_SIZE):
    """The engine of a draft model whose steps take their time too."""
    made = model(logits, context)
    made.config.vocab_size = vocab_size
    machine = made.machine
    machine._out = np.empty((machine.max_batch_tokens, vocab_size), np.float32)

    def step(token_ids, chunks, logit_rows):
        passed[0] += seconds_a_token * (1 + (len(token_ids) - 1) / 4)
        return type(machine).step(machine, token_ids, chunks, logit_rows)

    machine.step = step
    return Engine(made)


def unlike(token_ids):
    """What the draft model of another mind says: never what `shifting` does."""
    return np.eye(VOCAB_SIZE, dtype=np.float32)[200 + len(token_ids) % 7] * 30


def varied(token_ids):
    """Text in which no pair comes twice."""
    place = len(token_ids)
    return np.eye(VOCAB_SIZE, dtype=np.float32)[(place * place) % 197] * 30


def test_steps_of_one_size_alone_do_not_shift_the_pace():
    costs = StepCosts()
    costs.note(1, 1.0)
    for _ in range(100):
        costs.note(4, 3.0)
    assert costs.plain == pytest.approx(1.0)
    assert costs.of(4) == pytest.approx(3.0)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_draft_model_of_the_same_mind_is_always_right(time_by_rows, temperature):
    engine = Engine(model(rewriting()))
    shared = Speculation(VOCAB_SIZE, drafting(time_by_rows, rewriting()))
    for _ in range(2):
        plain, slow = generate(engine, PROMPT, temperature=temperature)
        before = time_by_rows[0]
        guessed, _ = generate(engine, PROMPT, shared.begin(), temperature=temperature)
        assert guessed == plain
    assert slow / (time_by_rows[0] - before) > 2


def test_a_draft_model_that_is_never_wrong(time_by_rows):
    """For long enough that the chance that it is right is 1 to the last bit."""
    engine = Engine(model(varied))
    drafter, account = DraftModel(drafting(time_by_rows, varied), VOCAB_SIZE), Account()
    for _ in range(2):
        drafter.begin()
        plain, slow = generate(engine, PROMPT, max_tokens=800)
        guessed, fast = generate(engine, PROMPT, Speculator(account, [drafter]), max_tokens=800)
        assert guessed == plain
        assert slow / fast > 2


def test_a_draft_model_of_another_mind_changes_nothing(time_by_rows):
    engine = Engine(model(rewriting(flat=1.0)))
    other = drafting(time_by_rows, hashed_logits, context=len(PROMPT) + 10)
    shared = Speculation(VOCAB_SIZE, other)
    for seed in range(5):
        sampled = {"temperature": 1.2, "seed": seed}
        plain, _ = generate(engine, PROMPT, **sampled)
        guessed, _ = generate(engine, PROMPT, shared.begin(), **sampled)
        assert guessed == plain


def test_a_draft_model_that_is_always_wrong_costs_little(time_by_rows):
    """To find that out it has to read the first prompt, and now and then another, which the
    hundredth part of the answers before it has paid for.
    """
    engine = Engine(model(varied))
    draft = drafting(time_by_rows, unlike, seconds_a_token=0.2)
    shared = Speculation(VOCAB_SIZE, draft)
    lost = []
    for i in range(10):
        prompt = [*range(i, 100 + i)]
        plain, slow = generate(engine, prompt)
        before = time_by_rows[0]
        generation, guessed, _ = run(engine, prompt, shared.begin())
        assert guessed == plain
        engine.free(generation.sequence)
        lost.append((time_by_rows[0] - before) / slow)
    assert max(lost) < 1.05 and sum(lost) / len(lost) < 1.015
    assert sum(draft.machine.steps) > 200  # it is tried again


@pytest.mark.parametrize("size", [VOCAB_SIZE - 3, VOCAB_SIZE + 3])
def test_a_draft_model_whose_table_is_padded_otherwise(time_by_rows, size):
    def resized(token_ids):
        return np.resize(rewriting()(token_ids), size)

    engine = Engine(model(rewriting()))
    draft = drafting(time_by_rows, resized, vocab_size=size)
    shared = Speculation(VOCAB_SIZE, draft)
    # a prompt with a token that the smaller table lacks, and a bias on another
    for prompt in (PROMPT, [*PROMPT[:-1], VOCAB_SIZE - 1]):
        values = {"temperature": 1.0, "logit_bias": {VOCAB_SIZE - 2: -5.0}}
        plain, _ = generate(engine, prompt, **values)
        generation, guessed, _ = run(engine, prompt, shared.begin(), **values)
        assert guessed == plain
        assert generation.num_accepted > 0
        engine.free(generation.sequence)


def test_vocabularies_are_compared():
    class Other(ToyTokenizer):
        def token_text(self, token_id):
            return f"<{token_id}>" if token_id != 7 else "seven"

    class Ours(ToyTokenizer):
        def token_text(self, token_id):
            return f"<{token_id}>"

    check_vocabularies(Ours(), Ours(vocab_size=VOCAB_SIZE + 8))
    for theirs in (Other(), Ours(vocab_size=2 * VOCAB_SIZE)):
        with pytest.raises(InvalidParameterError, match="another vocabulary"):
            check_vocabularies(Ours(), theirs)
