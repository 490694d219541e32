"""What the clock counts with: ticks, and how they become seconds and core cycles.

The clocked loop stamps moments with *ticks* of the processor's time counter, which runs at a fixed
rate whatever the core does. `open_counter` proves that they are time; `Counter.calibrate`, right
before and right after a measurement, says how many core cycles went by meanwhile. Sources, best
first:

- `pmu`: core cycles counted by the processor (`pmu.py`); most virtual machines have none.
- `tsc+chain`: x86-64. A chain of dependent adds retires one a cycle, so its length over its ticks
  is the ratio.
- `cntvct`: AArch64. Time only.

`run.py` and `roofs.py` come here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cyclewise.clock import pmu
from cyclewise.clock.pmu import Counts
from cyclewise.errors import ClockError
from cyclewise.machine.kernels.compiler import callable_at, host_compiler
from cyclewise.machine.kernels.layout import CHAIN, SCHEDULE, THREAD
from cyclewise.machine.kernels.probes import BLOCK_ADDS, CHAIN_BYTES, probes_unit
from cyclewise.machine.kernels.target import IS_X86
from cyclewise.machine.threads import Threads

Source = Literal["pmu", "tsc+chain", "cntvct"]

BRACKETS = 50
"""Readings of the other clock around a read of ours, of which the tightest counts."""
FIRST_SECONDS, RATE_SECONDS = 0.005, 0.3
"""Between the two anchors that the rate of ticks is taken from: at opening, and in the end."""
CHAIN_BLOCKS = 136
"""About 5 microseconds of adds."""
CHAINS, MEASURED_CHAINS = 400, 100
"""The last ones are measured: by then the core is awake."""
STAMPS = 1000
DISAGREEMENT = 0.02
"""From here on two calibrations are said to disagree."""
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a tick was worth at one moment in time."""

    source: Source
    ticks_per_second: float
    core_hertz: float
    """Where cycles are not counted, the ticks'."""
    counts_cycles: bool
    """False: ticks are all there is, and what is called cycles is time."""
    read_cost_seconds: float
    """Of one stamp: reading the counter and storing it."""
    error_fraction: float
    """Of `core_hertz`: how far its measurements lie apart."""
    notes: tuple[str, ...]
    """Sentences for the report: why this source, and what would allow a better one."""

    @property
    def cycles_per_tick(self) -> float:
        return self.core_hertz / self.ticks_per_second


@dataclass(frozen=True, slots=True)
class Anchor:
    """The same moment in time on two clocks."""

    nanoseconds: int
    ticks: int


def to_ticks(nanoseconds: int, start: Anchor, end: Anchor) -> int:
    """Ticks at a reading of `time.perf_counter_ns`, on the line through two anchors."""
    span = end.nanoseconds - start.nanoseconds
    return start.ticks + (nanoseconds - start.nanoseconds) * (end.ticks - start.ticks) // span


def tsc_refusal(cpuinfo: str) -> str | None:
    """Why the TSC of the processor that `/proc/cpuinfo` describes is not time; None: it is."""
    flags = next((x for x in cpuinfo.splitlines() if x.startswith("flags")), "").split()
    missing = [name for name in ("constant_tsc", "nonstop_tsc") if name not in flags]
    if not missing:
        return None
    return (
        "The processor's time counter is not invariant, so its ticks are not time: /proc/cpuinfo "
        f"lacks {' and '.join(missing)}. A virtual machine's host can be told to pass the flag on."
    )


class Counter:
    """The source that this machine allows, opened and proved. One a process: `open_counter`."""

    def __init__(self) -> None:
        """Raises ClockError, with the reason, where ticks are not time."""
        compiler = host_compiler()
        compiler.load([probes_unit()])
        self._out = np.zeros(2 * STAMPS, np.int64)
        self._at = self._out.ctypes.data
        self._read = callable_at(compiler.address("read_ticks"), 1)
        self._stamp = callable_at(compiler.address("stamp"), 2)
        self._chain = callable_at(compiler.address("chain"), 5)
        self._refuse()
        self._opened = self._latest = self._bracket(_raw_nanoseconds)
        self.source, self._notes = self._choose()
        self._read_cost_ticks = self._cost()
        while self._elapsed() < FIRST_SECONDS:
            time.sleep(FIRST_SECONDS / 4)
        self._refine()

    def _refuse(self) -> None:
        before, end = self.read(), time.perf_counter_ns() + 20_000
        while time.perf_counter_ns() < end:
            pass
        after = self.read()
        if after <= before:
            raise ClockError(
                f"The processor's time counter does not count: it read {before}, and 20 "
                f"microseconds later {after}. Another LLVM may read it, or a bare machine have it."
            )
        if IS_X86 and sys.platform == "linux":
            reason = tsc_refusal(_CPUINFO.read_text())
            if reason:
                raise ClockError(reason)

    def _choose(self) -> tuple[Source, tuple[str, ...]]:
        try:
            user_only = self._prove_pmu()
        except ClockError as error:
            why = str(error)
        else:
            return "pmu", (pmu.USER_ONLY,) if user_only else ()
        if IS_X86:
            note = "Cycles are estimated from ticks by a chain of dependent adds, one a cycle."
            return "tsc+chain", (note, why)
        return "cntvct", ("What is called cycles is ticks of a fixed clock: time only.", why)

    def read(self) -> int:
        """Ticks now."""
        self._read(self._at)
        return int(self._out[0])

    @property
    def ticks_per_second(self) -> float:
        """Against the system's raw monotonic clock; within 0.01 % at opening, and better after the
        first calibration that comes `RATE_SECONDS` later.
        """
        ticks = self._latest.ticks - self._opened.ticks
        return 1e9 * ticks / (self._latest.nanoseconds - self._opened.nanoseconds)

    def anchor(self) -> Anchor:
        """Now, in nanoseconds of `time.perf_counter_ns` and in ticks."""
        return self._bracket(time.perf_counter_ns)

    def mapping(self, start: Anchor) -> Callable[[int], int]:
        """From nanoseconds of `time.perf_counter_ns` to ticks, on the line from `start` to now."""
        end = self.anchor()
        return lambda nanoseconds: to_ticks(nanoseconds, start, end)

    def _bracket(self, clock: Callable[[], int]) -> Anchor:
        tightest = 1 << 62
        for _ in range(BRACKETS):
            before = clock()
            ticks = self.read()
            after = clock()
            if after - before < tightest:
                tightest, found = after - before, Anchor((before + after) // 2, ticks)
        return found

    def _elapsed(self) -> float:
        return (_raw_nanoseconds() - self._opened.nanoseconds) / 1e9

    def _refine(self) -> None:
        """Takes the rate over a longer time, until it is long enough."""
        if (self._latest.nanoseconds - self._opened.nanoseconds) / 1e9 < RATE_SECONDS:
            self._latest = self._bracket(_raw_nanoseconds)

    def _cost(self) -> float:
        """Ticks of a stamp."""
        costs = []
        for _ in range(5):
            self._stamp(self._at, STAMPS)
            first, last = self._out[0], self._out[2 * STAMPS - 2]
            costs.append(float(last - first) / (STAMPS - 1))
        return min(costs)

    def calibrate(self, threads: Threads | None = None) -> Calibration:
        """What a tick is worth now: on this thread's core, or on those of all of `threads` at once.

        Takes about 2 ms: a core that comes out of idling runs slowly for up to 1 ms.
        """
        self._refine()
        rate = self.ticks_per_second
        cost = self._read_cost_ticks / rate
        if self.source == "cntvct":
            return Calibration(self.source, rate, rate, False, cost, 0.0, self._notes)
        ratios = self._ratios(threads)
        middle, spread = _middle(ratios)
        error = spread / middle
        return Calibration(self.source, rate, rate * middle, True, cost, error, self._notes)

    def _ratios(self, threads: Threads | None) -> NDArray[np.float64]:
        """Core cycles a tick, by each chain of each thread."""
        per_add = self._cycles_per_add() if self.source == "pmu" else 1.0
        ratios = []
        for ticks in self._run_chains(threads)[:, -MEASURED_CHAINS:]:
            reads, _ = _middle(ticks[:, 0])
            ratios.append(CHAIN_BLOCKS * BLOCK_ADDS * per_add / (ticks[:, 1] - reads))
        return np.concatenate(ratios)

    def _cycles_per_add(self) -> float:
        """By the processor's own count, on this thread; about 1."""
        (group,) = pmu.open_groups([threading.get_native_id()])
        first_cycles, first = group.cycles(), self.read()
        ticks = self._run_chains(None)[0]
        last, last_cycles = self.read(), group.cycles()
        group.close()
        share = float((ticks[:, 1] - ticks[:, 0]).sum()) / (last - first)
        return share * (last_cycles - first_cycles) / (CHAINS * CHAIN_BLOCKS * BLOCK_ADDS)

    def _prove_pmu(self) -> bool:
        """Whether cycles are counted outside the kernel alone; raises ClockError if not at all."""
        (group,) = pmu.open_groups([threading.get_native_id()])
        group.close()
        found = self._cycles_per_add()
        if not 0.5 < found < 2:
            raise ClockError(
                f"No cycle counts: the processor's counter says {found:.2f} cycles for an add "
                "that takes one, as where a virtual machine only pretends to have it."
            )
        return group.user_only

    def _run_chains(self, threads: Threads | None) -> NDArray[np.int64]:
        """Ticks of the reads alone and around a chain: (threads, CHAINS, 2)."""
        found = np.zeros(
            (threads.num_threads if threads else 1, CHAINS, CHAIN_BYTES // 8), np.int64
        )
        contexts = np.zeros((len(found), len(THREAD)), np.int64)
        contexts[:, THREAD.index("scratch")] = [each.ctypes.data for each in found]
        record = {"seed": 1, "blocks": CHAIN_BLOCKS}
        moment = np.array([record[name] for name in CHAIN], np.int64)
        if threads is None:
            self._chain(moment.ctypes.data, 0, contexts.ctypes.data, 0, CHAINS)
            return found
        entry = {
            "kernel": host_compiler().address("chain"), "moment": moment.ctypes.data,
            "num_tiles": CHAINS, "grain": CHAINS, "replicated": 1,
        }  # fmt: skip
        schedule = np.array([[entry[name] for name in SCHEDULE]], np.int64)
        threads.settle()
        self._in_use = found, contexts, moment, schedule  # also by a late helper, after Ctrl-C
        threads.run(schedule, contexts)
        threads.settle()
        return found


def between(before: Calibration, after: Calibration, counts: Sequence[Counts] = ()) -> Calibration:
    """What a tick was worth between two calibrations: their mean, with their distance as its error.

    `counts`: what the threads' counters say of that window, where there are any; they are preferred
    if they cover the kernel too.
    """
    hertz = (before.core_hertz + after.core_hertz) / 2
    distance = abs(before.core_hertz - after.core_hertz) / hertz
    error = max(distance / 2, before.error_fraction, after.error_fraction)
    notes = after.notes
    if counts and not any(count.user_only for count in counts):
        hertz = sum(count.cycles for count in counts) / sum(c.seconds_enabled for c in counts)
    elif distance > DISAGREEMENT:
        low, high = sorted((before.core_hertz / 1e9, after.core_hertz / 1e9))
        notes += (
            f"The core's speed changed by {distance:.1%} while it was measured: "
            f"{low:.2f} to {high:.2f} GHz.",
        )
    return replace(after, core_hertz=hertz, error_fraction=error, notes=notes)


def _middle(values: NDArray[np.float64] | NDArray[np.int64]) -> tuple[float, float]:
    """The mean of the middle half, and its width: there the counter's steps average out, and no
    interruption gets into it.
    """
    low, high = np.quantile(values, (0.25, 0.75))
    return float(values[(values >= low) & (values <= high)].mean()), float(high - low)


@cache
def open_counter() -> Counter:
    """This process's counter. Raises ClockError where the machine has none to stand on."""
    return Counter()


def _raw_nanoseconds() -> int:
    """Of a clock that nobody adjusts, where there is one."""
    if sys.platform == "win32":
        return time.perf_counter_ns()
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
