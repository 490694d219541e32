"""Threads that run schedules of moments; they know neither models nor batches.

A machine hands them a program's schedule step by step, a probe (`probes.py`) the one moment that
it is. The first thread is the caller's own; the helpers live in compiled code
(`kernels/loop.py`), wake by themselves, and sleep when nothing comes.
"""

from __future__ import annotations

import threading
import time
import weakref

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.kernels.compiler import callable_at, host_compiler
from cyclewise.machine.kernels.layout import (
    FINISHED_AT,
    LINE,
    STEP,
    STEP_BYTES,
    STEPS_AT,
    WAITERS_AT,
)
from cyclewise.machine.kernels.loop import STOP, loop_unit
from cyclewise.machine.packing import allocate


def _help(work: int, shared: NDArray[np.uint8], index: int) -> None:
    callable_at(work, 2)(shared.ctypes.data, index)


def _end(post: int, shared: NDArray[np.uint8], helpers: list[threading.Thread]) -> None:
    callable_at(post, 2)(shared.ctypes.data, STOP)
    for helper in helpers:
        helper.join()


class Threads:
    """`num_threads` of them, for schedules of at most `num_moments`. One caller at a time."""

    def __init__(self, num_threads: int, num_moments: int) -> None:
        self.num_threads = num_threads
        self._num_moments = num_moments
        compiler = host_compiler()
        compiler.load([loop_unit()])
        self._step = callable_at(compiler.address("step"), 2)
        self._counters = allocate(num_moments * (num_threads + 1) * LINE)
        self._shared = allocate(FINISHED_AT + num_threads * LINE)
        steps = self._shared[STEPS_AT : STEPS_AT + 2 * STEP_BYTES]
        self._steps = steps.view(np.int64).reshape(2, -1)
        for name, value in (
            ("counters", self._counters.ctypes.data),
            ("num_threads", num_threads),
            ("waiters", self._shared.ctypes.data + WAITERS_AT),
        ):
            self._steps[:, STEP.index(name)] = value
        finished = self._shared[FINISHED_AT : FINISHED_AT + num_threads * LINE]
        self._finished = finished.view(np.int64).reshape(num_threads, -1)[1:, 0]
        self._epoch = 0
        self._posted = self._shared[:8].view(np.int64)
        shared = self._shared
        self._shared_at = int(shared.ctypes.data)
        self._helpers = [
            threading.Thread(
                target=_help, args=(compiler.address("work"), shared, index), daemon=True,
                name=f"cyclewise-{index}",
            )
            for index in range(1, num_threads)
        ]  # fmt: skip
        for helper in self._helpers:
            helper.start()
        # Also when they are forgotten, and at exit: a helper must not outlive its memory.
        self._end = weakref.finalize(self, _end, compiler.address("post"), shared, self._helpers)

    def close(self) -> None:
        """Ends the helpers."""
        self._end()

    @property
    def alive(self) -> bool:
        """Whether all helpers are."""
        return all(helper.is_alive() for helper in self._helpers)

    @property
    def thread_ids(self) -> list[int]:
        """The operating system's numbers of the caller and of the helpers."""
        helpers = [helper.native_id for helper in self._helpers]
        return [threading.get_native_id(), *(number for number in helpers if number is not None)]

    @property
    def settled(self) -> bool:
        """Whether every helper has left the last step, and with it all that it may read or
        write.
        """
        return not self._end.alive or bool((self._finished == self._posted[0]).all())

    def settle(self) -> None:
        """Waits until every helper has left the last step."""
        while not self.settled:
            time.sleep(0.0001)

    def run(
        self,
        schedule: NDArray[np.int64],
        contexts: NDArray[np.int64],
        batch: int = 0,
        stamps: int = 0,
    ) -> None:
        """Runs a schedule on all threads.

        The arrays must stay as they are until the threads have settled.

        Args:
            schedule: rows of `layout.SCHEDULE`, one a moment.
            contexts: rows of `layout.THREAD`, one a thread.
            batch: the address of the batch's record.
            stamps: where the clocked loop writes its ticks; 0: the plain loop runs.
        """
        assert len(schedule) <= self._num_moments and len(contexts) == self.num_threads
        assert self._end.alive, "the threads were closed"
        if self._posted[0] == self._epoch:  # not if Ctrl-C came before the last call
            self._epoch = (self._epoch + 1) & 0xFFFFFFFF
        step = self._steps[self._epoch & 1]
        step[STEP.index("schedule")] = schedule.ctypes.data
        step[STEP.index("num_moments")] = len(schedule)
        step[STEP.index("threads")] = contexts.ctypes.data
        step[STEP.index("batch")] = batch
        step[STEP.index("stamps")] = stamps
        name = "execute_clocked" if stamps else "execute"
        step[STEP.index("execute")] = host_compiler().address(name)
        self._step(self._shared_at, self._epoch)
