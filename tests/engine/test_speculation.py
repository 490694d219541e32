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


def generate(engine, prompt, speculator=None, **values):
    """The tokens, and the seconds that decoding took."""
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
    engine.free(generation.sequence)
    return tokens, seconds


def test_a_rewritten_text_takes_fewer_steps():
    engine = Engine(model(rewriting()))
    plain, slow = generate(engine, PROMPT)
    assert bytes(plain) == EDITED
    speculator = Speculation().begin()
    guessed, fast = generate(engine, PROMPT, speculator)
    assert guessed == plain
    assert slow / fast > 2
    assert 50 < speculator.num_right <= speculator.num_guessed


@pytest.mark.parametrize("values", [{}, {"top_k": 5}, {"repetition_penalty": 1.2, "min_p": 0}])
def test_sampled_answers_are_the_same_for_every_seed(values):
    engine = Engine(model(rewriting(flat=1.5)))
    verified = 0
    for seed in range(30):
        sampled = {"temperature": 1.5, "seed": seed, "max_tokens": 60, **values}
        plain, _ = generate(engine, PROMPT, **sampled)
        speculator = Speculation().begin()
        guessed, _ = generate(engine, PROMPT, speculator, **sampled)
        assert guessed == plain
        verified += speculator.num_guessed
    assert verified > 50


def test_sampled_answers_have_the_same_distribution():
    """Other seeds than the plain ones: a chi-square test of the tokens at some places."""

    def logits(token_ids):
        row = np.full(VOCAB_SIZE, -20, np.float32)
        place = len(token_ids) % 4
        row[[97, 98, 99]] = np.roll([1.0, 0.5, 0.0], place)
        return row

    engine = Engine(model(logits))
    prompt = [*b"abcabcabcabc"]
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1, "min_p": 0, "max_tokens": 12}
    counts = {True: Counter(), False: Counter()}
    for seed in range(1500):
        for guessing in counts:
            speculator = Speculation().begin() if guessing else None
            offset = 0 if guessing else 10_000
            tokens, _ = generate(engine, prompt, speculator, seed=offset + seed, **settings)
            counts[guessing].update((place, tokens[place]) for place in (3, 7, 11))
    statistic = sum(
        (counts[True][key] - counts[False][key]) ** 2 / (counts[True][key] + counts[False][key])
        for key in counts[True] | counts[False]
    )
    assert statistic < 22.46  # six degrees of freedom: 1 in 1,000


class Wrong:
    """Is certain, and never right."""

    def propose(self, generation, costs):
        return Guess([255] * 40, [0.99] * 40)


@pytest.mark.parametrize("num_tokens", [60, 200])
def test_guesses_that_fail_cost_little(num_tokens):
    engine = Engine(model(lambda ids: np.eye(VOCAB_SIZE, dtype=np.float32)[len(ids) % 7] * 30))
    plain, slow = generate(engine, PROMPT, max_tokens=num_tokens)
    speculator = Speculator(StepCosts(), [Wrong()])
    guessed, fast = generate(engine, PROMPT, speculator, max_tokens=num_tokens)
    assert guessed == plain
    assert speculator.num_guessed > 0 and speculator.num_right == 0
    assert fast / slow < 1.03


def test_guesses_stay_within_the_context():
    engine = Engine(model(rewriting(), context=len(PROMPT) + 21))
    plain, _ = generate(engine, PROMPT)
    guessed, _ = generate(engine, PROMPT, Speculation().begin())
    assert guessed == plain and len(plain) == 22


class Text:
    """A generation as drafters see it."""

    def __init__(self, token_ids):
        self.token_ids = token_ids


COSTS = StepCosts()
COSTS.note(1, 1.0)


def proposals(*texts):
    """What a lookup proposes as its text grows."""
    lookup = PromptLookup()
    return [bytes(lookup.propose(Text([*text]), COSTS).token_ids) for text in texts]


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
    first = lookup.propose(Text([*text, *b"ab"]), COSTS).chances[0]
    for i in range(6):
        text += b"ab" + bytes([200 + i])
        lookup.propose(Text([*text]), COSTS)
        again = lookup.propose(Text([*text, *b"ab"]), COSTS)
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


def test_a_draft_model_of_the_same_mind_is_always_right():
    engine = Engine(model(rewriting()))
    plain, slow = generate(engine, PROMPT[6:])
    shared = Speculation(Engine(model(rewriting())))
    for temperature in (0.0, 1.5):
        plain, slow = generate(engine, PROMPT, temperature=temperature)
        speculator = shared.begin()
        guessed, fast = generate(engine, PROMPT, speculator, temperature=temperature)
        assert guessed == plain
        assert slow / fast > 2


def test_a_draft_model_of_another_mind_changes_nothing():
    engine = Engine(model(rewriting(flat=1.0)))
    shared = Speculation(Engine(model(hashed_logits, context=len(PROMPT) + 10)))
    for seed in range(5):
        sampled = {"temperature": 1.2, "seed": seed}
        plain, _ = generate(engine, PROMPT, **sampled)
        guessed, _ = generate(engine, PROMPT, shared.begin(), **sampled)
        assert guessed == plain


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
