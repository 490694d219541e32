from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.engine.engine import Engine
from cyclewise.engine.generation import Generation, advance
from cyclewise.engine.prefix import first_key, next_key
from cyclewise.engine.request import SamplingParams
from tests.engine.toy import END, VOCAB_SIZE, ToyModel, hashed_logits


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def run(engine, token_ids, salt=b""):
    """Evaluates a prompt in a new sequence; the sequence, and how many tokens were found."""
    sequence = engine.new_sequence(salt=salt)
    sequence.reuse(token_ids)
    found = len(sequence)
    logits = engine.evaluate(sequence, token_ids[found:])
    np.testing.assert_array_equal(logits[0], hashed_logits(token_ids))
    return sequence, found


@pytest.mark.parametrize(("count", "again"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (23, 20)])
def test_full_pages_are_found_and_one_token_is_left_to_evaluate(count, again):
    engine = Engine(ToyModel(page_tokens=4))
    prompt = tokens(count)
    first, found = run(engine, prompt)
    assert found == 0
    second, found = run(engine, prompt)  # the first one still holds its pages
    assert found == again
    shared = again // 4
    assert second.pages.tolist()[:shared] == first.pages.tolist()[:shared]
    engine.pool.check([first, second])
    engine.free(first)
    engine.free(second)
    assert engine.pool.num_cached == count // 4
    assert engine.pool.num_free == engine.pool.num_pages
    third, found = run(engine, prompt)  # nobody holds them any more
    assert found == again
    engine.pool.check([third])


def test_a_beginning_is_found_and_what_differs_is_evaluated():
    engine = Engine(ToyModel(page_tokens=4, spare_pages=8))
    prompt = tokens(14)
    kept = [run(engine, prompt)[0]]
    for other, want in [(prompt[:10] + [1] * 5, 8), ([0, *prompt], 0), (prompt[4:], 0)]:
        sequence, found = run(engine, other)
        assert found == want
        kept.append(sequence)
    engine.pool.check(kept)


def test_salts_share_nothing():
    engine = Engine(ToyModel(page_tokens=4, spare_pages=8))
    prompt = tokens(12)
    one, _ = run(engine, prompt, b"one")
    other, found = run(engine, prompt, b"other")
    assert found == 0
    assert not set(one.pages.tolist()) & set(other.pages.tolist())
    assert run(engine, prompt, b"one")[1] == 8
    plain = engine.new_sequence()
    engine.evaluate(plain, prompt)
    assert run(engine, prompt)[1] == 0  # what has no salt is not found


def test_a_key_depends_on_all_that_came_before():
    keys = {next_key(next_key(first_key(salt), a), b) for salt, a, b in [
        (b"", [1, 2], [3, 4]), (b"", [1, 3], [3, 4]), (b"", [1, 2], [4, 3]), (b"x", [1, 2], [3, 4]),
        (b"", [1], [2, 3, 4]),
    ]}  # fmt: skip
    assert len(keys) == 5
    assert len({first_key(b"", adapter) for adapter in (None, 0, 1, 10)}) == 4
    assert next_key(first_key(b""), [1, 2]) == next_key(first_key(b""), np.array([1, 2], np.int64))


def test_two_that_evaluate_the_same_end_up_with_the_same_pages():
    engine = Engine(ToyModel(page_tokens=4))
    prompt = tokens(9)
    sequences = [engine.new_sequence(salt=b"") for _ in range(2)]
    engine.evaluate(sequences[0], prompt[:3])  # neither has a full page when the other begins
    engine.evaluate(sequences[1], prompt[:3])
    for sequence in sequences:
        logits = engine.evaluate(sequence, prompt[3:], "all")
        want = [hashed_logits(prompt[: i + 1]) for i in range(3, 9)]
        np.testing.assert_array_equal(logits, want)
    first, second = (sequence.pages.tolist() for sequence in sequences)
    assert first[:2] == second[:2] and first[2] != second[2]
    assert engine.pool.num_free == engine.pool.num_pages - 4
    engine.pool.check(sequences)


def test_a_page_that_can_be_found_is_not_written_to():
    engine = Engine(ToyModel(page_tokens=4))
    prompt = tokens(9)
    sequence, _ = run(engine, prompt)
    pages = sequence.pages.tolist()
    sequence.truncate(6)
    engine.evaluate(sequence, [1, 2, 3])
    assert sequence.pages.tolist()[0] == pages[0] and sequence.pages.tolist()[1] != pages[1]
    other, found = run(engine, prompt)
    assert found == 8
    third, found = run(engine, [*prompt[:6], 1, 2, 3])
    assert found == 8
    engine.pool.check([sequence, other, third])


def test_pages_idle_for_longest_go_first_and_the_last_of_a_text_before_its_first():
    engine = Engine(ToyModel(context=32, page_tokens=4))  # eight pages
    old, new = tokens(13, seed=1), tokens(13, seed=2)
    for prompt in (old, new):
        engine.free(run(engine, prompt)[0])
    assert engine.pool.num_cached == 6
    engine.free(run(engine, old)[0])  # used again, so younger than the other now
    other = engine.new_sequence()
    engine.evaluate(other, tokens(12, seed=3))
    assert engine.pool.num_cached == 5  # of the other's pages, the last one has gone
    for prompt, found in [(new, 8), (old, 12)]:
        sequence = engine.new_sequence(salt=b"")
        sequence.reuse(prompt)
        assert len(sequence) == found
        engine.free(sequence)
    engine.pool.check([other])
    engine.evaluate(other, tokens(20, seed=4))
    assert engine.pool.num_cached == 0
    engine.pool.check([other])


def test_the_same_answers_with_and_without():
    params = SamplingParams(temperature=0, max_tokens=10)

    def answer(engine, prompt, salt):
        sequence = engine.new_sequence(salt=salt)
        if salt is not None:
            sequence.reuse(prompt)
        rest = prompt[len(sequence) :]
        generation = Generation(engine, sequence, rest, params, frozenset({END}))
        while generation.finish_reason is None:
            advance(engine, [generation])
        text = generation.token_ids
        engine.free(sequence)
        return text

    engine = Engine(ToyModel(page_tokens=4))
    prompt = tokens(20)
    want = answer(engine, prompt, None)
    assert answer(engine, prompt, b"") == answer(engine, prompt, b"") == want
    assert answer(engine, want, b"") == answer(engine, want, None)  # goes on with an answer


def test_the_check_finds_what_is_wrong():
    engine = Engine(ToyModel(page_tokens=4))
    sequence, _ = run(engine, tokens(9))
    engine.pool.check([sequence])
    with pytest.raises(AssertionError, match="held by"):
        engine.pool.check([])
    engine.pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        engine.pool.check([sequence])


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),  # the sequence
            st.sampled_from(["grow", "truncate", "restart", "fork"]),
            st.integers(0, 20),
            st.integers(0, 1),  # few tokens and salts, so that texts begin alike
        ),
        min_size=1,
        max_size=40,
    )
)
def test_no_sequence_sees_another_and_no_page_is_lost(actions):
    engine = Engine(ToyModel(context=32, page_tokens=4, max_batch_tokens=6, spare_pages=6))
    sequences = [engine.new_sequence(salt=b"") for _ in range(4)]
    for which, action, number, kind in actions:
        sequence = sequences[which]
        if action == "truncate":
            sequence.truncate(min(number, len(sequence)))
        elif action == "fork":
            engine.free(sequence)
            sequences[which] = sequences[(which + 1 + number) % 4].fork()
        else:
            new = [kind] * min(number, 32 - len(sequence))
            if action == "restart":
                engine.free(sequence)
                sequence = sequences[which] = engine.new_sequence(salt=b"%d" % (number % 2))
                new = [*[kind] * number, 2]
                sequence.reuse(new)
                new = new[len(sequence) :]
            text = sequence.token_ids + new
            if sequence.num_missing(len(text)) <= engine.pool.num_free:
                want = [hashed_logits(text[: i + 1]) for i in range(len(sequence), len(text))]
                got = engine.evaluate(sequence, new, "all")
                np.testing.assert_array_equal(got, np.reshape(want, (len(new), VOCAB_SIZE)))
        engine.pool.check(sequences)
        index = engine.pool._prefixes
        for other in sequences:
            # what a sequence holds full can be found from the first page on
            for key, page in zip(other._keys[1:], other.pages.tolist(), strict=False):
                assert index.find(key) == page
    for sequence in sequences:
        engine.free(sequence)
    assert engine.pool.num_free == engine.pool.num_pages
