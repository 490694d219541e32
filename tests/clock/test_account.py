"""The books of ticks, kept exactly: whatever a clock says, everything adds up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclewise.clock.account import Span, keep_books


class FakeClock:
    """Time passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000

    def pass_by(self, ticks: int) -> int:
        self.now += ticks
        return self.now


def test_a_step_of_two_threads():
    """Thread 1 comes 5 ticks late, works longer on the first moment, and thread 0 waits for it."""
    ticks = np.array([[
        [[110, 110], [120, 147], [160, 160]],
        [[115, 115], [145, 147], [150, 160]],
    ]])  # fmt: skip
    books = keep_books(
        ticks, [Span("scheduling", 100, 106), Span("sampling", 162, 190)], (100, 200)
    )
    assert books.work.tolist() == [[[10, 13], [30, 3]]]
    assert books.waiting.tolist() == [[[27, 0], [2, 10]]]
    assert books.starts.tolist() == [[[110, 147], [115, 147]]]
    first, second = books.accounts
    assert (first.moments, first.waiting, first.python) == (23, 27, 34)
    assert first.unaccounted == 4 + 2 + 10  # before the step, after it, and at the end
    assert (second.moments, second.waiting, second.python) == (33, 12 + 15 + 40, 0)
    assert second.unaccounted == 0
    for account in books.accounts:
        parts = account.moments + account.waiting + account.python + account.unaccounted
        assert parts == account.wall == 100


def test_a_thread_that_slept_through_a_step_waited():
    ticks = np.array([[[[10, 10], [20, 20]], [[0, 0], [0, 0]]], [[[30, 30], [50, 50]],
                      [[32, 32], [45, 50]]]])  # fmt: skip
    books = keep_books(ticks, [], (10, 60))
    assert books.work.tolist() == [[[10], [0]], [[20], [13]]]
    assert books.accounts[1].waiting == 5 + (32 - 10) + (60 - 50)
    assert books.accounts[1].unaccounted == 0
    assert books.accounts[0].unaccounted == 10 + 10


def test_a_thread_that_left_early_spent_nothing_on_the_rest():
    ticks = np.array([[[[10, 10], [20, 25], [40, 40]], [[11, 11], [21, 0], [0, 0]]]])
    books = keep_books(ticks, [], (10, 40))
    assert books.work[0, 1].tolist() == [10, 0]
    assert books.waiting[0, 1].tolist() == [0, 0]
    assert books.accounts[1].waiting == 1 + (40 - 21)


def test_a_window_without_steps():
    books = keep_books(np.zeros((0, 2, 4, 2), np.int64), [Span("template", 5, 9)], (0, 10))
    assert books.accounts[0].unaccounted == 6 and books.accounts[0].python == 4
    assert books.accounts[1].waiting == 10


durations = st.integers(0, 1000)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
def test_everything_adds_up_under_a_fake_clock(data, threads, moments, steps):
    """Threads and Python run against a clock that a generator moves; nothing gets lost."""
    clock = FakeClock()
    start = clock.now
    ticks = np.zeros((steps, threads, moments + 1, 2), np.int64)
    spans, work, waits, gaps = [], np.zeros(threads, int), np.zeros(threads, int), 0
    for step in range(steps):
        begun = clock.now
        spans.append(Span("scheduling", begun, clock.pass_by(data.draw(durations))))
        gap = data.draw(durations)
        gaps += gap
        at = clock.pass_by(gap)
        ticks[step, :, 0] = at
        for moment in range(moments):
            worked = np.array([data.draw(durations) for _ in range(threads)])
            over = at + worked.max()
            ticks[step, :, moment + 1, 0] = at + worked
            ticks[step, :, moment + 1, 1] = over
            work += worked
            waits += over - at - worked
            at = over
        clock.now = int(at)
    books = keep_books(ticks, spans, (start, clock.now))
    assert [a.moments for a in books.accounts] == work.tolist()
    assert books.accounts[0].waiting == waits[0]
    assert books.accounts[0].unaccounted == gaps
    python = books.accounts[0].python
    assert [a.waiting for a in books.accounts[1:]] == (waits[1:] + python + gaps).tolist()
    for account in books.accounts:
        parts = account.moments + account.waiting + account.python + account.unaccounted
        assert parts == account.wall == clock.now - start


@pytest.mark.parametrize("where", ["moment", "thread", "between"])
def test_a_delay_comes_out_where_it_was(where):
    """A known delay moves one figure, by what it was."""

    def books(delay: int):
        slow = {"moment": [delay, delay], "thread": [0, delay], "between": [0, 0]}[where]
        late = delay if where == "between" else 0
        ticks = np.zeros((2, 2, 3, 2), np.int64)
        spans, at = [], 0
        for step in range(2):
            spans.append(Span("sampling", at, at + 50 + late * step))
            at += 50 + late * step
            ticks[step, :, 0] = at
            for moment in range(2):
                worked = [100 + (slow[t] if moment == step == 1 else 0) for t in range(2)]
                over = at + max(worked)
                for thread in range(2):
                    ticks[step, thread, moment + 1] = at + worked[thread], over
                at = over
        return keep_books(ticks, spans, (0, at))

    plain, delayed = books(0), books(777)
    work, waiting = delayed.work - plain.work, delayed.waiting - plain.waiting
    expected = np.zeros((2, 2, 2), int)
    if where == "moment":
        expected[1, :, 1] = 777
    elif where == "thread":
        expected[1, 1, 1] = 777
    assert work.tolist() == expected.tolist()
    assert waiting[1, 0, 1] == (777 if where == "thread" else 0)
    python = delayed.accounts[0].python - plain.accounts[0].python
    assert python == (777 if where == "between" else 0)
    idle = delayed.accounts[1].waiting - plain.accounts[1].waiting
    assert idle == (777 if where == "between" else 0)
