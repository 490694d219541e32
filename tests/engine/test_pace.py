from __future__ import annotations

import pytest

from cyclewise.engine.pace import MOST_PROMPTS, STRETCH, Pace


def run(pace, num_answers, steps, seconds):
    """Steps beside which there is always more of a prompt: the tokens of it that each held."""
    chunks = []
    for _ in range(steps):
        chunks.append(pace.chunk(num_answers))
        pace.note(num_answers, chunks[-1], seconds(num_answers + chunks[-1]))
    return chunks


def test_all_that_fits_where_nobody_waits_for_a_token():
    pace = Pace(512)
    assert pace.chunk(0) == 512
    assert pace.prompt_token == pace.answer_token(3) == 0
    pace.note(0, 512, 1.024)
    assert pace.prompt_token == pytest.approx(0.002)


def test_it_begins_with_few_and_stays_below_the_bound():
    def seconds(count):
        return 0.01 + 0.001 * max(0, count - 4)

    for num_answers in (1, 4, 30):
        chunks = run(Pace(512), num_answers, 40, seconds)
        assert chunks[0] == 0 and 1 <= chunks[1] <= 7  # the first one measures
        for count in chunks:
            assert seconds(num_answers + count) <= 1.1 * STRETCH * seconds(num_answers)
        assert seconds(num_answers + chunks[30]) >= 0.75 * STRETCH * seconds(num_answers)


def test_now_and_then_a_step_shows_what_it_takes_without():
    pace = Pace(64)
    chunks = run(pace, 2, 100, lambda count: 0.01 + 0.001 * count)
    assert [i for i, count in enumerate(chunks) if not count] == [0, 33, 66, 99]
    assert pace.chunk(3) == 0  # never measured
    assert pace.answer_token(3) == pytest.approx(0.012)


def test_it_follows_a_machine_that_others_share():
    pace = Pace(512)
    before = run(pace, 4, 40, lambda count: 0.01 + 0.001 * count)[-1]
    assert before > 8
    # the base stays, and a token costs four times as much
    after = run(pace, 4, 40, lambda count: 0.01 + 0.004 * count)[-1]
    assert 0 < after < before
    one = run(pace, 4, 40, lambda count: 0.01 + 0.001 * count)[-1]
    assert abs(one - before) <= 4


def test_a_step_that_was_held_up_counts_as_twice_the_usual():
    pace = Pace(512)
    run(pace, 4, 40, lambda count: 0.01 + 0.001 * count)
    before = pace.chunk(4)
    pace.note(4, before, 10.0)
    assert pace.chunk(4) >= before // 2


def test_there_is_always_room_for_a_token():
    assert Pace(4).chunk(3) == 0
    pace = Pace(4)
    assert run(pace, 3, 5, lambda count: 1.0 * count)[1:] == [1, 1, 1, 1]


def test_prompts_that_wait_behind_the_first_make_steps_longer():
    def seconds(count):
        return 0.01 + 0.001 * count

    pace = Pace(512)
    pace.note(4, 0, seconds(4))
    for num_prompts, share in ((1, 1), (3, 3), (MOST_PROMPTS, MOST_PROMPTS), (100, MOST_PROMPTS)):
        for _ in range(12):
            count = pace.chunk(4, num_prompts)
            pace.note(4, count, seconds(4 + count))
        allowed = (STRETCH - 1) * share * seconds(4)
        assert 0.7 * allowed <= seconds(4 + count) - seconds(4) <= 1.1 * allowed


def test_steps_of_nearly_as_many_answers_tell_what_one_takes():
    pace = Pace(512)
    pace.note(8, 0, 0.040)
    assert pace.chunk(7) and pace.chunk(10)
    assert pace.chunk(5) == pace.chunk(11) == 0


def test_it_is_not_misled_by_tokens_that_are_taken_four_at_once():
    def seconds(count):
        return 0.01 + 0.005 * -(-count // 4)

    for num_answers in (1, 3, 4, 5, 8):
        chunks = run(Pace(512), num_answers, 60, seconds)
        assert seconds(num_answers + chunks[50]) >= 1.6 * seconds(num_answers)
        assert seconds(num_answers + max(chunks)) <= 2.5 * seconds(num_answers)


def test_one_step_that_was_held_up_is_forgotten_where_there_is_room_for_few():
    pace = Pace(512)
    run(pace, 3, 3, lambda count: 0.01 + 0.001 * count)
    for _ in range(3):
        pace.note(3, 5, 1.0)
    assert pace.chunk(3) == 1
    assert max(run(pace, 3, 1500, lambda count: 0.01 + 0.001 * count)) >= 5
