"""Ticks at the borders of moments, as the clocked loop writes them.

The clock makes `Stamps` and hands them to `Machine.clock`; from then on each step's ticks go to a
slot of their own until all are taken. What the ticks mean in seconds and cycles, the clock knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.costs import BatchShape
from cyclewise.machine.kernels.loop import stamp_bytes
from cyclewise.machine.packing import allocate

NO_BATCH = BatchShape((), 0)


class Chunk(Protocol):
    """What stamps read of the machine's chunks."""

    @property
    def count(self) -> int: ...

    @property
    def position(self) -> int: ...


_Note = tuple[Sequence[Chunk], int, int, int]
"""Chunks, rows of logits, when the step was called and when it returned."""


class Stamps:
    """Room for the ticks of `capacity` steps of a program on a number of threads."""

    def __init__(self, num_moments: int, num_threads: int, capacity: int, every: int = 1) -> None:
        """`every`: of so many steps one is stamped, the first included."""
        self.num_moments, self.num_threads = num_moments, num_threads
        self.capacity, self.every = capacity, every
        self.count = 0
        """Steps stamped so far."""
        self._passed = 0
        thread_bytes: int = stamp_bytes(num_moments)
        self._step_bytes = num_threads * thread_bytes
        self._memory = allocate(capacity * self._step_bytes)
        self._address = int(self._memory.ctypes.data)
        words = self._memory[: capacity * self._step_bytes].view(np.int64)
        shape = (capacity, num_threads, thread_bytes // 16, 2)
        self._ticks = words.reshape(shape)[:, :, : num_moments + 1]
        # What steps were is noted as it comes, and made sense of when it is read: in a step of
        # decode the caches are cold, and each line of Python costs a microsecond.
        self._notes: list[_Note | None] = [None] * capacity

    @property
    def ticks(self) -> NDArray[np.int64]:
        """(steps, threads, moments + 1, 2): when the thread's work on a moment ended, and when the
        moment was over; row 0 is when the thread came, twice. Zeros: the thread was not there,
        having slept through it.

        A view. Read it after `Machine.settle`.
        """
        return self._ticks[: self.count]

    def spent(self) -> NDArray[np.int64]:
        """(steps, threads, moments, 2): ticks of work on each moment, and of waiting until it was
        over; none where a thread was not there.
        """
        return spent(self.ticks)

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """The batch of each step; one without tokens, of a step that was interrupted."""
        return tuple(self.shape(step) for step in range(self.count))

    def shape(self, step: int) -> BatchShape:
        """The batch of one step."""
        note = self._notes[step]
        if note is None:
            return NO_BATCH
        return BatchShape(tuple((chunk.count, chunk.position) for chunk in note[0]), note[1])

    @property
    def calls(self) -> NDArray[np.int64]:
        """(steps, 2): `time.perf_counter_ns` right before and right after the call into compiled
        code, on the calling thread.
        """
        times = [note[2:] if note else (0, 0) for note in self._notes[: self.count]]
        return np.array(times, np.int64).reshape(-1, 2)

    def clear(self) -> None:
        """Forgets all steps. Only after `Machine.settle`: a late thread may still write."""
        self._ticks[: self.count] = 0
        self._notes[: self.count] = [None] * self.count
        self.count = 0

    def take(self) -> int:
        """The address for the next step's ticks; 0 if it is not to be stamped."""
        wanted = self._passed % self.every == 0 and self.count < self.capacity
        self._passed += 1
        if not wanted:
            return 0
        self.count += 1
        return self._address + (self.count - 1) * self._step_bytes

    def note(self, chunks: Sequence[Chunk], num_logits: int, before: int, after: int) -> None:
        """What the step was that took the last slot, and when it was called and returned."""
        self._notes[self.count - 1] = chunks, num_logits, before, after


def spent(ticks: NDArray[np.int64]) -> NDArray[np.int64]:
    """What `Stamps.spent` says, of such ticks."""
    steps, threads, rows, _ = ticks.shape
    flat = ticks.reshape(steps, threads, 2 * rows)
    # A thread that left early, or never came, spends no time on the moments that it missed.
    reached = np.maximum.accumulate(flat, axis=2)
    return np.diff(reached[:, :, 1:], axis=2).reshape(steps, threads, rows - 1, 2)
