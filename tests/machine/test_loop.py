"""The compiled loop with kernels written in Python: who runs which tile, and who must not."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from cyclewise.machine.kernels.compiler import Compiler, _compile, callable_at
from cyclewise.machine.kernels.layout import (
    LINE,
    SCHEDULE,
    SLEEPERS_AT,
    STEP,
    STEP_BYTES,
    STEPS_AT,
    THREAD,
)
from cyclewise.machine.kernels.loop import STOP, loop_unit
from tests.machine.kernel_calls import address, kernel, record

SECONDS = 20
"""What a call that should return at once is given before it counts as hanging."""


class Loop:
    """A step of moments, (tiles, grain, replicated) each; `calls` is what kernels were asked."""

    def __init__(self, num_threads, moments):
        self.num_threads, self.moments = num_threads, moments
        self.counters = np.zeros((len(moments), num_threads + 1, LINE), np.uint8)
        self.waiters = np.zeros(1, np.int64)
        # Each counter's word: a thread's claims, and last the tiles done.
        self.words = self.counters.view(np.uint64)[:, :, 0]
        self.threads = np.array([record(THREAD, scratch=i) for i in range(num_threads)])
        self.calls = []
        self._lock = threading.Lock()
        self._callbacks = []
        signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)
        rows = []
        for index, (tiles, grain, replicated) in enumerate(moments):
            self._callbacks.append(signature(self._noting(index)))
            at = ctypes.cast(self._callbacks[-1], ctypes.c_void_p).value
            rows.append(
                record(SCHEDULE, kernel=at, num_tiles=tiles, grain=grain, replicated=replicated)
            )
        self.schedule = np.array(rows)
        self._execute = kernel(loop_unit(), "execute", 3)

    def _noting(self, index):
        def note(moment, batch, context, first, last):
            thread = (context - self.threads.ctypes.data) // (8 * len(THREAD))
            with self._lock:
                self.calls.append((index, thread, first, last))

        return note

    def shared(self, epoch):
        """What threads share while that epoch is the current one."""
        shared = np.zeros(64, np.int64)
        at = (STEPS_AT + (epoch & 1) * STEP_BYTES) // 8
        shared[at : at + len(STEP)] = record(
            STEP, num_moments=len(self.moments), schedule=self.schedule,
            counters=self.counters, num_threads=self.num_threads, threads=self.threads,
            waiters=self.waiters, execute=address(loop_unit(), "execute"),
        )  # fmt: skip
        shared[0] = epoch
        return shared

    def execute(self, epoch, threads=(0,), current=None):
        """Threads execute that epoch, at the same time; returns the calls that they made."""
        self.calls.clear()
        shared = self.shared(epoch)
        shared[0] = epoch if current is None else current
        running = [
            threading.Thread(target=self._execute, args=(shared, epoch, i), daemon=True)
            for i in threads
        ]
        for each in running:
            each.start()
        for each in running:
            each.join(SECONDS)
            assert not each.is_alive(), "the loop hangs"
        assert self.waiters[0] == 0
        return list(self.calls)

    def check(self, calls, threads=(0,)):
        """Every tile ran once, in claims of at most a grain, moment after moment."""
        for index, (tiles, grain, replicated) in enumerate(self.moments):
            mine = [call for call in calls if call[0] == index]
            if replicated:
                assert sorted(call[1:] for call in mine) == [(i, 0, tiles) for i in threads]
                continue
            assert all(0 < last - first <= grain for _, _, first, last in mine)
            ran = sorted(tile for _, _, first, last in mine for tile in range(first, last))
            assert ran == list(range(tiles))
        claimed = [call[0] for call in calls if not self.moments[call[0]][2]]
        assert claimed == sorted(claimed)


MOMENTS = [(7, 1, 0), (40, 3, 0), (2, 5, 1), (1, 1, 0), (0, 1, 1), (13, 100, 0), (3, 1, 1)]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_one_thread_runs_every_tile_of_all(num_threads):
    """Those that sleep hold nobody up: their share is taken."""
    loop = Loop(num_threads, MOMENTS)
    for epoch in range(1, 6):
        loop.check(loop.execute(epoch))


def test_threads_share_the_tiles():
    loop = Loop(3, MOMENTS)
    for epoch in range(1, 40):
        calls = loop.execute(epoch, threads=(0, 1, 2))
        claims = [call for call in calls if not MOMENTS[call[0]][2]]
        # One that came late may have left a moment that it computes for itself.
        loop.check(claims + [(i, 0, 0, n) for i, (n, _, r) in enumerate(MOMENTS) if r])


def test_a_thread_that_comes_when_all_is_done_finds_nothing():
    loop = Loop(2, [(7, 1, 0), (40, 3, 0)])
    loop.check(loop.execute(1))
    assert loop.execute(1, threads=(1,)) == []


@pytest.mark.parametrize(
    ("slept_at", "woke_at"),
    [(1, 2), (1, 9), (5, 5 + (1 << 30)), ((1 << 31) - 1, 1 << 31), ((1 << 32) - 1, 0)],
)
def test_a_thread_that_slept_through_steps_finds_nothing(slept_at, woke_at):
    """It holds the record of an old epoch while the counters carry a later one."""
    loop = Loop(2, [(7, 1, 0), (4, 1, 1), (40, 3, 0)])
    loop.words[:] = slept_at - 1 << 32
    loop.check(loop.execute(slept_at))
    before = loop.counters.copy()
    assert loop.execute(slept_at, threads=(1,)) in ([], [(1, 1, 0, 4)])
    loop.check(loop.execute(woke_at))
    after = loop.counters.copy()
    assert (before != after).any()
    assert loop.execute(slept_at, threads=(1,)) == []
    np.testing.assert_array_equal(loop.counters, after)

    # The later step is half done: the sleeper takes nothing of it either.
    half = Loop(2, [(7, 1, 0), (40, 3, 0)])
    half.words[:] = (woke_at - 1) % (1 << 32) << 32
    half.words[0] = woke_at << 32 | 1
    half.words[0, 2] += 1
    kept = half.counters.copy()
    assert half.execute(slept_at, threads=(1,)) == []
    np.testing.assert_array_equal(half.counters, kept)


def test_a_helper_works_until_it_is_stopped():
    """A helper's life: it wakes for a new epoch, also when it has parked, and returns at STOP."""
    loop = Loop(2, [(64, 1, 0), (5, 1, 0)])
    shared = loop.shared(0)
    shared[(STEPS_AT + STEP_BYTES) // 8 :][: len(STEP)] = shared[STEPS_AT // 8 :][: len(STEP)]
    sleepers = SLEEPERS_AT // 8
    work, step, post = (kernel(loop_unit(), name, 2) for name in ("work", "step", "post"))
    helper = threading.Thread(target=work, args=(shared, 1), daemon=True)
    helper.start()
    for epoch in range(1, 30):
        if epoch % 10 == 0:  # until it sleeps
            for _ in range(1000):
                if shared[sleepers] == 1:
                    break
                threading.Event().wait(0.002)
        loop.calls.clear()
        step(shared, epoch)
        loop.check(loop.calls)
    post(shared, STOP)
    helper.join(SECONDS)
    assert not helper.is_alive()
    assert shared[sleepers] == 0


def test_a_thread_whose_record_was_written_over_leaves():
    """It read the epoch, slept, and would now read the record of a step that came two later."""
    early = Loop(2, [(7, 1, 0), (40, 3, 0)])
    early.execute(5)
    late = Loop(2, [(9, 1, 0), (64, 3, 0)])
    late.counters[:] = early.counters
    assert late.execute(5, threads=(1,), current=6) == []
    np.testing.assert_array_equal(late.counters, early.counters)


def test_a_thread_that_parks_at_once_is_woken(monkeypatch):
    """Done words of two steps may hold the same count: who waits must not sleep on the old one."""
    monkeypatch.setattr("cyclewise.machine.kernels.loop.SPINS_IN_STEP", 0)
    unit, compiler = loop_unit(), Compiler()
    compiler._link(unit, _compile(unit, compiler.target))
    work, step, post = (callable_at(compiler.address(name), 2) for name in ("work", "step", "post"))
    loop = Loop(2, [(1, 1, 0), (2, 1, 0), (1, 1, 0)])
    shared = loop.shared(0)
    shared[STEPS_AT // 8 + STEP.index("execute")] = compiler.address("execute")
    shared[(STEPS_AT + STEP_BYTES) // 8 :][: len(STEP)] = shared[STEPS_AT // 8 :][: len(STEP)]
    at = shared.ctypes.data
    helper = threading.Thread(target=work, args=(at, 1), daemon=True)

    def steps():
        for epoch in range(1, 500):
            step(at, epoch)

    caller = threading.Thread(target=steps, daemon=True)
    helper.start()
    caller.start()
    caller.join(SECONDS)
    assert not caller.is_alive(), "a step hangs"
    assert len(loop.calls) == 499 * 4
    post(at, STOP)
    helper.join(SECONDS)
    assert not helper.is_alive()
