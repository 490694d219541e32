"""The clock of a server: what the moments of a step took, for those who asked for it.

The engine's thread says before each step whether it is to be clocked, and reads afterwards what it
took (`engine/watch.py`); a step that nobody asks about runs the plain loop. Any thread may then
have it explained: seconds and cycles by moment, its layers together, and the least that this
computer needs for it.

A moment's time is that from the end of the moment before to its own, whichever threads had a part
in it: the times add up to the step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cyclewise.clock.counter import Calibration, Counter, open_counter
from cyclewise.clock.limits import Limits
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.loop import clocked_loop_unit
from cyclewise.machine.names import collapsed
from cyclewise.machine.profile import load_profile
from cyclewise.machine.stamps import Stamps

if TYPE_CHECKING:
    from cyclewise.machine.costs import BatchShape
    from cyclewise.machine.machine import Machine

CAPACITY = 16
"""Steps that may be stamped while a helper sleeps through them; those beyond are not."""
CALIBRATED_SECONDS = 10.0
"""How old the measurement of a tick's cycles may be when an answer begins."""
MOST_LIMITS = 64
"""A prompt that took more steps has no limit: it would take the server too long to say."""


@dataclass(frozen=True, slots=True)
class Clocked:
    """A step."""

    over: NDArray[np.int64]
    """(threads, moments + 1): ticks when a thread saw each moment end, the first when it came; 0
    where it was not there. Made sense of when it is explained: the engine's thread has no time.
    """
    shape: BatchShape


@dataclass(frozen=True, slots=True)
class Explained:
    """Some steps together."""

    seconds: dict[str, float]  # by moment: `attention.qkv`
    cycles: float | None  # of all moments, on one core; None where ticks are all there is
    limits: dict[str, float] | None  # least seconds by moment; None without a machine profile


class _Wanted(Stamps):
    """Stamps of those steps that are wanted."""

    wanted = False

    def take(self) -> int:
        return super().take() if self.wanted else 0


class LiveClock:
    """Clocks single steps of a machine, once it is `prepared`."""

    def __init__(self, machine: Machine) -> None:
        moments = machine.program.moments
        kinds = [collapsed(moment.name).removeprefix("layers.*.") for moment in moments]
        self.names = list(dict.fromkeys(kinds))
        self._index = np.array([self.names.index(kind) for kind in kinds])
        self._machine = machine
        self._stamps = _Wanted(len(moments), machine.num_threads, CAPACITY)
        self._count = 0  # steps that were stamped before this one
        self._attached = False
        self._lock = threading.Lock()  # of what follows, but for reading it
        self._counter: Counter | None = None
        self._calibration: Calibration | None = None
        self._calibrated_at = 0.0
        self._limits: Limits | None = None

    def prepare(self) -> None:
        """Make ready what clocking needs, on any thread but the engine's: at first the clocked loop
        and the counter, later what a tick is worth now. Raises ClockError where ticks are not time.
        """
        with self._lock:
            if self._counter is None:
                host_compiler().load([clocked_loop_unit()])
                profile = load_profile()
                if profile is not None:
                    program, threads = self._machine.program, self._machine.num_threads
                    self._limits = Limits(profile.roofs, program, threads)
                self._counter = open_counter()
            now = time.monotonic()
            if self._calibration is None or now > self._calibrated_at + CALIBRATED_SECONDS:
                self._calibration, self._calibrated_at = self._counter.calibrate(), now

    # Of `engine/watch.py`: on the engine's thread

    def turn(self, on: bool) -> None:
        if on and not self._attached and self._calibration is not None:
            self._machine.clock(self._stamps)
            self._attached = True
        stamps = self._stamps
        stamps.wanted = on
        if on and stamps.count >= CAPACITY // 2 and self._machine.threads.settled:
            stamps.clear()
        self._count = stamps.count

    def read(self) -> Clocked | None:
        stamps = self._stamps
        if stamps.count == self._count:
            return None
        return Clocked(stamps.ticks[-1, :, :, 1].copy(), stamps.shape(stamps.count - 1))

    # On any thread

    def explain(self, steps: Sequence[Clocked]) -> Explained:
        """What steps took, at least one, and what they must."""
        calibration = self._calibration
        assert calibration is not None
        over = np.stack([step.over for step in steps])  # (steps, threads, moments + 1)
        # Whoever saw it first: a thread that was put to sleep finds the rest done by the others.
        first = np.where(over, over, over.max(axis=(1, 2), keepdims=True)).min(axis=1)
        ticks = self._by_name(np.diff(np.maximum.accumulate(first, axis=1)).sum(axis=0))
        seconds = (ticks / calibration.ticks_per_second).tolist()
        cycles = None
        if calibration.counts_cycles:
            cycles = float(ticks.sum()) * calibration.cycles_per_tick
        limits = None
        if self._limits is not None and len(steps) <= MOST_LIMITS:
            limits = np.sum([self._least(self._limits, step.shape) for step in steps], axis=0)
        return Explained(
            dict(zip(self.names, seconds, strict=True)), cycles,
            None if limits is None else dict(zip(self.names, limits.tolist(), strict=True)),
        )  # fmt: skip

    def _least(self, limits: Limits, shape: BatchShape) -> NDArray[np.float64]:
        each = [limit.seconds for limit in limits.each(shape)]
        return self._by_name(np.array(each))

    def _by_name(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        return np.bincount(self._index, values, len(self.names)).astype(np.float64)
