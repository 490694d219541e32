from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.engine.engine import Engine, Request, schedule
from cyclewise.errors import ContextLengthError, CyclewiseError, InvalidParameterError
from tests.engine.toy import VOCAB_SIZE, ToyModel, hashed_logits


def twin(token_ids):
    return np.stack([hashed_logits(token_ids[: i + 1]) for i in range(len(token_ids))])


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 16, 17, 64])
def test_logits_of_a_prompt_cut_into_chunks(count):
    model = ToyModel()
    ids = tokens(count)
    for logits, want in [("all", twin(ids)), ("last", twin(ids)[-1:]), ("none", twin(ids)[:0])]:
        engine = Engine(model)
        model.machine.steps.clear()
        sequence = engine.new_sequence()
        got = engine.evaluate(sequence, ids, logits)
        assert got.shape == want.shape
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
        assert sequence.token_ids == ids
        assert sum(model.machine.steps) == count
        assert max(model.machine.steps) <= 8
        assert len(model.machine.steps) == -(-count // 8)


def test_the_logits_are_a_copy():
    engine = Engine(ToyModel())
    sequence = engine.new_sequence()
    first = engine.evaluate(sequence, [1, 2])
    kept = first.copy()
    engine.evaluate(sequence, [3])
    np.testing.assert_array_equal(first, kept)


def test_no_tokens():
    engine = Engine(ToyModel())
    sequence = engine.new_sequence()
    for logits in ("last", "all", "none"):
        assert engine.evaluate(sequence, [], logits).shape == (0, VOCAB_SIZE)
    assert engine.machine.steps == []


def test_pages_are_taken_as_needed_and_given_back():
    engine = Engine(ToyModel(context=16, page_tokens=4))
    sequence = engine.new_sequence()
    assert len(sequence.pages) == 0
    engine.evaluate(sequence, tokens(5))
    assert sequence.pages.tolist() == [0, 1]
    engine.evaluate(sequence, tokens(4))
    assert sequence.pages.tolist() == [0, 1, 2]
    sequence.truncate(8)
    assert sequence.pages.tolist() == [0, 1]
    engine.free(sequence)
    assert len(sequence.pages) == len(sequence) == 0
    again = engine.new_sequence()
    engine.evaluate(again, tokens(16))
    assert sorted(again.pages.tolist()) == [0, 1, 2, 3]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(0, 30)),
        min_size=1,
        max_size=12,
    )
)
def test_sequences_share_the_pages_and_nothing_else(actions):
    engine = Engine(ToyModel(context=64, page_tokens=4, max_batch_tokens=6, spare_pages=32))
    sequences = [engine.new_sequence() for _ in range(3)]
    texts: list[list[int]] = [[], [], []]
    for i, (which, keep, count) in enumerate(actions):
        keep = min(keep, len(texts[which]))
        sequences[which].truncate(keep)
        new = tokens(min(count, 64 - keep), seed=i)
        texts[which] = texts[which][:keep] + new
        logits = engine.evaluate(sequences[which], new, "all")
        np.testing.assert_array_equal(logits, twin(texts[which])[keep:] if new else logits)
        assert sequences[which].token_ids == texts[which]
        owned = [page for sequence in sequences for page in sequence.pages.tolist()]
        assert len(owned) == len(set(owned))
        assert all(len(s.pages) == -(-len(s) // 4) for s in sequences)


def test_the_context_is_never_exceeded():
    engine = Engine(ToyModel(context=10, page_tokens=4))
    sequence = engine.new_sequence()
    with pytest.raises(ContextLengthError, match=r"11 tokens.*context of 10"):
        engine.evaluate(sequence, tokens(11))
    assert len(sequence) == len(sequence.pages) == 0
    assert engine.machine.steps == []
    engine.evaluate(sequence, tokens(10))
    with pytest.raises(ContextLengthError, match=r"11 tokens.*context of 10"):
        engine.evaluate(sequence, [1])
    assert len(sequence) == 10


def test_the_pool_runs_out():
    engine = Engine(ToyModel(context=16, page_tokens=4))
    first, second = engine.new_sequence(), engine.new_sequence()
    engine.evaluate(first, tokens(9))
    with pytest.raises(CyclewiseError, match="2 more pages are needed and 1 of 4 are free"):
        engine.evaluate(second, tokens(8))
    engine.evaluate(second, tokens(4))
    engine.free(first)
    engine.evaluate(second, tokens(12))


@pytest.mark.parametrize("bad", [[-1], [VOCAB_SIZE], [1, 2**40], [[1]]])
def test_bad_token_ids(bad):
    engine = Engine(ToyModel())
    with pytest.raises(InvalidParameterError, match="token ids"):
        engine.evaluate(engine.new_sequence(), bad)


def test_truncate_refuses_what_is_not_there():
    engine = Engine(ToyModel())
    sequence = engine.new_sequence()
    engine.evaluate(sequence, [1, 2])
    for count in (-1, 3):
        with pytest.raises(ValueError, match="of 2 tokens"):
            sequence.truncate(count)


def test_an_interrupt_leaves_the_steps_that_are_done():
    engine = Engine(ToyModel())
    sequence = engine.new_sequence()
    ids = tokens(20)

    def interrupt():
        if len(engine.machine.steps) == 1:
            raise KeyboardInterrupt

    engine.machine.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate(sequence, ids)
    assert sequence.token_ids == ids[:8]
    engine.machine.before_step = lambda: None
    got = engine.evaluate(sequence, ids[8:])
    np.testing.assert_array_equal(got[0], hashed_logits(ids))
    sequence.truncate(3)
    assert len(sequence.pages) == 1


def test_schedule_mixes_prefill_and_decode():
    engine = Engine(ToyModel(spare_pages=32))
    long, short = engine.new_sequence(), engine.new_sequence()
    engine.evaluate(short, tokens(5))
    prompt = tokens(10, seed=1)
    for sequence, count in [(long, 10), (short, 1)]:
        sequence.reserve(len(sequence) + count)
    requests = [
        Request(short, np.array([7], dtype=np.int32), "last"),
        Request(long, np.array(prompt, dtype=np.int32), "last"),
    ]
    batch = schedule(requests, 8)
    assert [(c.start, c.count, c.position) for c in batch.chunks] == [(0, 1, 5), (1, 7, 0)]
    assert batch.token_ids.tolist() == [7, *prompt[:7]]
    assert batch.logit_rows == [0]  # the long prompt is not at its end
    np.testing.assert_array_equal(engine.step(requests)[0], hashed_logits([*tokens(5), 7]))
    assert [request.num_done for request in requests] == [1, 7]
    assert long.token_ids == prompt[:7]
    batch = schedule(requests, 8)
    assert [(c.start, c.count, c.position) for c in batch.chunks] == [(0, 3, 7)]
    np.testing.assert_array_equal(engine.step(requests)[0], hashed_logits(prompt))
    assert [request.num_left for request in requests] == [0, 0]
