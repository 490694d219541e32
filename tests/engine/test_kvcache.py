from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.engine.engine import Engine
from cyclewise.engine.kvcache import PagePool, Sequence
from cyclewise.errors import CyclewiseError
from tests.engine.toy import VOCAB_SIZE, ToyModel, hashed_logits


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def pool(num_pages=4, page_tokens=4):
    copies = []
    return PagePool(num_pages, page_tokens, lambda source, to: copies.append((source, to))), copies


def grown(sequence, count):
    """Reserves pages for `count` more tokens and notes them."""
    sequence.reserve(len(sequence) + count)
    sequence.token_ids += tokens(count)
    return sequence


def test_a_fork_shares_whole_pages_and_copies_the_last():
    pages, copies = pool()
    first = grown(Sequence(pages, 16), 6)
    second = first.fork()
    assert second.token_ids == first.token_ids and second.token_ids is not first.token_ids
    assert second.pages.tolist() == first.pages.tolist() == [0, 1]
    assert pages.num_free == 2 and not copies
    grown(second, 1)
    assert second.pages.tolist() == [0, 2] and first.pages.tolist() == [0, 1]
    assert copies == [(1, 2)] and pages.num_free == 1
    # The first one holds its last page alone again.
    grown(first, 1)
    assert first.pages.tolist() == [0, 1] and len(copies) == 1
    second.truncate(0)
    first.truncate(0)
    assert pages.num_free == 4


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    pages, copies = pool()
    first = grown(Sequence(pages, 16), 8)
    second = first.fork()
    grown(second, 1)
    grown(first, 1)
    assert first.pages.tolist() == [0, 1, 3] and second.pages.tolist() == [0, 1, 2]
    assert not copies


def test_pages_that_were_reserved_ahead_stay_with_the_first():
    pages, _ = pool()
    first = grown(Sequence(pages, 16), 3)
    first.reserve(12)
    second = first.fork()
    assert second.pages.tolist() == [0] and len(first.pages) == 3


def test_a_copy_counts_among_the_pages_that_are_needed():
    pages, copies = pool(num_pages=2)
    first = grown(Sequence(pages, 16), 6)
    second = first.fork()
    with pytest.raises(CyclewiseError, match="1 more pages are needed and 0 of 2 are free"):
        second.reserve(7)
    with pytest.raises(CyclewiseError, match="2 more pages are needed and 0 of 2 are free"):
        second.reserve(9)
    second.reserve(6)  # nothing will be written
    assert second.pages.tolist() == [0, 1] and not copies
    first.truncate(4)
    second.reserve(7)
    assert second.pages.tolist() == [0, 1] and not copies


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20), st.integers(0, 12)),
        min_size=1,
        max_size=14,
    )
)
def test_forks_do_not_see_each_other(actions):
    """Each of four sequences now and then becomes a fork of another, forgets, and goes on."""
    engine = Engine(ToyModel(context=64, page_tokens=4, max_batch_tokens=6, spare_pages=60))
    sequences = [engine.new_sequence() for _ in range(4)]
    for i, (which, other, keep, count) in enumerate(actions):
        if which != other:
            engine.free(sequences[which])
            sequences[which] = sequences[other].fork()
        sequence = sequences[which]
        sequence.truncate(min(keep, len(sequence)))
        new = tokens(min(count, 64 - len(sequence)), seed=i)
        text = sequence.token_ids + new
        want = [hashed_logits(text[: j + 1]) for j in range(len(sequence), len(text))]
        got = engine.evaluate(sequence, new, "all")
        np.testing.assert_array_equal(got, np.array(want).reshape(len(new), VOCAB_SIZE))
    for sequence in sequences:
        engine.free(sequence)
    assert engine.pool.num_free == 76
