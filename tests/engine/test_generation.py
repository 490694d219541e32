from __future__ import annotations

import pytest

from cyclewise.engine.engine import Engine
from cyclewise.engine.generation import Generation, advance
from cyclewise.engine.request import SamplingParams
from cyclewise.errors import ContextLengthError
from tests.engine.toy import END, ToyModel, scripted

PROMPT = [1, 2, 3]


def begin(engine, prompt=PROMPT, stop_ids=(END,), **values):
    params = SamplingParams(**{"seed": 4, "max_tokens": 12, **values})
    return Generation(engine, engine.new_sequence(), prompt, params, frozenset(stop_ids))


def run(engine, *generations):
    texts = [[] for _ in generations]
    while running := [i for i, g in enumerate(generations) if g.finish_reason is None]:
        gained = advance(engine, [generations[i] for i in running])
        for i, tokens in zip(running, gained, strict=True):
            texts[i] += tokens
    return texts


def test_a_prompt_longer_than_a_step_gains_nothing_until_it_is_done():
    engine = Engine(ToyModel())
    generation = begin(engine, prompt=list(range(20)))
    assert [len(advance(engine, [generation])[0]) for _ in range(4)] == [0, 0, 1, 1]
    assert engine.machine.steps == [8, 8, 4, 1]
    assert generation.num_generated == 2


def test_why_it_ends():
    engine = Engine(ToyModel(context=20, logits=scripted("abc", 3)))
    generation = begin(engine, temperature=0)
    assert run(engine, generation) == [[*b"abc"]]
    assert (generation.finish_reason, generation.num_generated) == ("stop", 3)
    engine = Engine(ToyModel(context=20))
    generation = begin(engine)
    run(engine, generation)
    assert (generation.finish_reason, generation.num_generated) == ("length", 12)
    engine = Engine(ToyModel(context=10))
    generation = begin(engine)
    run(engine, generation)
    # the last token needs no place in the cache
    assert (generation.finish_reason, generation.num_generated) == ("length", 8)
    with pytest.raises(ContextLengthError, match=r"11 tokens"):
        begin(engine, prompt=list(range(11)))


def test_the_same_tokens_in_any_company():
    def make(engine):
        return [
            begin(engine, prompt=list(range(i + 1)), seed=i, max_tokens=3 * i + 2) for i in range(4)
        ]

    alone = []
    for i in range(4):
        engine = Engine(ToyModel())
        alone += run(engine, make(engine)[i])
    engine = Engine(ToyModel(spare_pages=64))
    assert run(engine, *make(engine)) == alone
    assert [len(tokens) for tokens in alone] == [2, 5, 8, 11]
    assert engine.machine.steps[:2] == [8, 5]  # ten of the prompts, then what is left


def guess(want, done, right, wrong):
    """So many tokens that will come, and then so many that will not."""
    return want[done : done + right] + [(t + 1) % 256 for t in want[done + right :][:wrong]]


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("penalty", [1, 1.3])
@pytest.mark.parametrize(("right", "wrong"), [(0, 1), (1, 0), (1, 2), (3, 1), (5, 0)])
def test_guesses_change_the_steps_and_not_the_tokens(temperature, penalty, right, wrong):
    values = {"temperature": temperature, "repetition_penalty": penalty, "max_tokens": 20}
    engine = Engine(ToyModel())
    plain = begin(engine, **values)
    (want,) = run(engine, plain)
    engine = Engine(ToyModel(max_batch_tokens=8))
    generation = begin(engine, **values)
    got = []
    while generation.finish_reason is None:
        got += advance(engine, [generation])[0]
        assert generation.sequence.token_ids == (PROMPT + got)[:-1]
        if generation.finish_reason is None:
            generation.draft(guess(want, len(got), right, wrong))
    assert got == want
    assert generation.finish_reason == "length"
    assert len(engine.machine.steps) == 1 + -(-19 // (right + 1))


def test_guesses_go_no_farther_than_there_is_room():
    engine = Engine(ToyModel(context=8))
    generation = begin(engine, max_tokens=4)
    (first,) = advance(engine, [generation])
    generation.draft([7] * 6)
    assert generation.num_rows == 1 + 2
    engine = Engine(ToyModel(context=5))
    generation = begin(engine)
    assert advance(engine, [generation]) == [first]
    generation.draft([7] * 6)
    assert generation.num_rows == 1 + 1


def test_the_end_among_the_guesses():
    engine = Engine(ToyModel(logits=scripted("ab", 3)))
    generation = begin(engine, temperature=0)
    assert advance(engine, [generation]) == [[*b"a"]]
    generation.draft([*b"b", END, *b"x"])
    assert advance(engine, [generation]) == [[*b"b"]]
    assert generation.finish_reason == "stop"
    assert generation.sequence.token_ids == [*PROMPT, *b"ab"]  # as without guesses
    assert (generation.num_guessed, generation.num_accepted) == (3, 1)


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("when", range(1, 12))
def test_a_pause_changes_nothing(temperature, when):
    values = {
        "temperature": temperature, "repetition_penalty": 1.2, "frequency_penalty": 1,
        "logprobs": 1, "max_tokens": 9,
    }  # fmt: skip
    prompt = list(range(20))
    plain = begin(Engine(ToyModel()), prompt, **values)
    (want,) = run(plain._engine, plain)
    for salt in (None, b""):
        engine = Engine(ToyModel())
        params = SamplingParams(seed=4, **values)
        sequence = engine.new_sequence(salt=salt)
        generation = Generation(engine, sequence, prompt, params, frozenset({END}))
        got = []
        for number in range(12):
            if number == when and generation.finish_reason is None:
                text = generation.token_ids
                generation.suspend()
                assert generation.num_missing == -(-len(text) // 4)
                assert engine.pool.num_free == engine.pool.num_pages
                if salt is not None:
                    generation.resume()
                    assert len(generation.sequence) > 0
                assert generation.token_ids == text
            if generation.finish_reason is None:
                got += advance(engine, [generation])[0]
        got += run(engine, generation)[0]
        assert (got, generation.scores) == (want, plain.scores)


def test_a_fork_has_all_of_its_own():
    engine = Engine(ToyModel(spare_pages=20))
    values = {"temperature": 1.5, "frequency_penalty": 1, "logprobs": 1, "max_tokens": 5}
    first = begin(engine, seed=4, **values)
    logits = engine.step([first.request])
    second = first.fork(SamplingParams(seed=5, **values))
    texts = [first.accept(logits), second.accept(logits)]
    for text, rest in zip(texts, run(engine, first, second), strict=True):
        text += rest
    for seed, text, fork in zip((4, 5), texts, (first, second), strict=True):
        alone = begin(Engine(ToyModel()), seed=seed, **values)
        assert run(alone._engine, alone) == [text]
        assert fork.scores == alone.scores
    engine.pool.check([first.sequence, second.sequence])
