"""What this machine can do at best, measured: the roofs that limits are taken from.

`machine_profile` gives the machine profile from its file, or measures it, in seconds, and keeps it:
the commands of the clock come here first. `measure_roofs` runs probes (`machine/probe.py`), no
kernel of the engine's: for each number of threads reading from every cache and from memory, and
each raw arithmetic instruction; and the hand-over of a cache line between two threads. Probes take
turns and the best pass counts, so that a neighbour's load is no roof. What no processor does is
not believed.

The roofline model: Williams, Waterman and Patterson, 2009.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from cyclewise.clock.counter import open_counter
from cyclewise.clock.tuning import measure_tuning
from cyclewise.errors import ClockError
from cyclewise.machine.host import available_cpus, cpu_name
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.rates import rates
from cyclewise.machine.probe import (
    Probe,
    cache_probe,
    handover_probe,
    memory_probe,
    rate_probe,
    touched,
)
from cyclewise.machine.profile import (
    Level,
    MachineProfile,
    Roofs,
    Scaling,
    load_profile,
    save_profile,
)
from cyclewise.machine.threads import Threads

Progress = Callable[[str], None]
"""Is told in a line what runs now."""
Key = tuple[str, int]
"""What a probe measures, and on how many threads."""

ROUNDS = 4
"""Turns of all probes."""
EXTRA_SECONDS = 2.0
"""Most time for more turns of those that somebody seems to have disturbed."""
PROBE_SECONDS, MEMORY_SECONDS = 0.04, 0.1
"""A probe's turn."""
MEMORY_BYTES, MOST_MEMORY_BYTES = 1 << 28, 1 << 30
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Cache:
    """A level of cache that holds data."""

    level: int
    num_bytes: int
    cores: int
    """How many share an instance."""

    @property
    def name(self) -> str:
        return f"L{self.level}"

    def share(self, num_threads: int) -> int:
        """Half of what the level holds for threads that fill its instances one after the other,
        for each of them.
        """
        instances = -(-num_threads // self.cores)
        return self.num_bytes * instances // (2 * num_threads)


DEFAULT_CACHES = (Cache(1, 1 << 15, 1), Cache(2, 1 << 19, 1), Cache(3, 1 << 23, 1 << 10))
"""Where the system does not tell."""


def machine_profile(
    recalibrate: bool = False, progress: Progress = lambda _: None
) -> MachineProfile:
    """This computer's profile: the one that is kept, or else, and on `recalibrate`, a new one.

    Raises ClockError if what is measured cannot be.
    """
    found = None if recalibrate else load_profile()
    if found is None:
        found = MachineProfile(
            cpu=cpu_name(), target=host_compiler().target.name, num_cpus=available_cpus(),
            roofs=measure_roofs(progress), tuning=measure_tuning(progress),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        save_profile(found)
    return found


def thread_counts(num_cpus: int) -> list[int]:
    """Powers of two, and all."""
    powers = [1 << i for i in range(num_cpus.bit_length())]
    return sorted({*powers, num_cpus})


def read_caches(folder: Path = _CPUS / "cpu0/cache") -> tuple[Cache, ...]:
    """The caches of the first CPU that hold data, nearest first, as Linux describes them."""
    found: dict[int, Cache] = {}
    try:
        for index in sorted(folder.glob("index*")):
            if (index / "type").read_text().strip() == "Instruction":
                continue
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            num_bytes = int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
            cores = len(_cpus_of((index / "shared_cpu_list").read_text()))
            if num_bytes > 0:
                found[level] = Cache(level, num_bytes, cores)
    except (OSError, ValueError):
        return DEFAULT_CACHES
    return tuple(found[level] for level in sorted(found)) or DEFAULT_CACHES


def _cpus_of(text: str) -> list[int]:
    """The numbers in a list like `0-3,8`."""
    ranges = [part.split("-") for part in text.strip().split(",")]
    return [cpu for part in ranges for cpu in range(int(part[0]), int(part[-1]) + 1)]


def measure_roofs(progress: Progress = lambda _: None) -> Roofs:
    """Measures; takes seconds. Raises ClockError if what comes out cannot be."""
    caches, counts = read_caches(), thread_counts(available_cpus())
    counter, instructions = open_counter(), rates(host_compiler().target)
    calibrations = []
    with ExitStack() as stack:
        cpus = stack.enter_context(_on_own_cpus())
        probes = _prepare(caches, counts, cpus, stack, progress)
        best = dict.fromkeys(probes, 0.0)
        cores = sum(_place_in_core(cpu) == 0 for cpu in cpus) or counts[-1]
        alone = [*instructions, *(cache.name for cache in caches if cache.cores == 1)]
        round_, late = 0, 0.0
        turns = list(probes)
        while turns:
            for index, key in enumerate(turns):
                done = (round_ + index / len(turns)) / ROUNDS
                progress(f"measuring this machine {_bar(done)} {key[0]}, {_threads(key[1])}")
                seconds = MEMORY_SECONDS if key[0] == "memory" else PROBE_SECONDS
                best[key] = max(best[key], probes[key].best(seconds))
                if key[0] in instructions:
                    calibrations.append(counter.calibrate())
            round_ += 1
            if round_ >= ROUNDS:
                late = late or time.perf_counter() + EXTRA_SECONDS
                turns = suspects(best, alone, cores) if time.perf_counter() < late else []
    found = {name: _scaling(best, name, counts) for name, _ in probes if name != "handover"}
    core_hertz = median(calibration.core_hertz for calibration in calibrations)
    fault = implausible(
        found, {unit: rate.operations for unit, rate in instructions.items()},
        core_hertz if calibrations[0].counts_cycles else None,
    )  # fmt: skip
    if fault is not None:
        raise ClockError(
            f"The roofs measured on this machine cannot be right: {fault}. "
            "Try again when it is less busy."
        )
    levels = [
        Level(cache.name, cache.num_bytes, cache.cores, found[cache.name]) for cache in caches
    ]
    return Roofs(
        core_hertz=core_hertz,
        levels=(*levels, Level("memory", 0, available_cpus(), found["memory"])),
        operations={unit: found[unit] for unit in instructions},
        instructions={unit: rate.instruction for unit, rate in instructions.items()},
        handover_seconds=1 / best["handover", 2] if counts[-1] > 1 else 0.0,
    )


def _prepare(
    caches: Sequence[Cache], counts: Sequence[int], cpus: Sequence[int], stack: ExitStack,
    progress: Progress,
) -> dict[Key, Probe]:  # fmt: skip
    """A probe of everything, on threads that end with the stack."""
    last = caches[-1]
    held = last.num_bytes * -(-counts[-1] // last.cores)
    buffer = touched(max(MEMORY_BYTES, min(MOST_MEMORY_BYTES, 4 * held)))
    probes: dict[Key, Probe] = {}
    for count in counts:
        progress(f"measuring this machine {_bar(0)} preparing {_threads(count)}")
        threads = Threads(count, 1)
        stack.callback(threads.close)
        for thread, cpu in zip(threads.thread_ids[1:], cpus[1:], strict=False):
            os.sched_setaffinity(thread, {cpu})
        for cache in caches:
            probes[cache.name, count] = cache_probe(threads, buffer, cache.share(count))
        probes["memory", count] = memory_probe(threads, buffer)
        for unit, rate in rates(host_compiler().target).items():
            probes[unit, count] = rate_probe(threads, rate)
        if count == 2:
            probes["handover", count] = handover_probe(threads)
    return probes


def suspects(best: dict[Key, float], alone: Iterable[str], cores: int) -> list[Key]:
    """Probes in which a thread got less than it must have got: somebody was in the way, on a
    virtual machine also where no process shows.

    Of what each core has alone a thread gets as much as in any company; of what is shared, as much
    as in larger company.
    """
    found = []
    for key, value in best.items():
        for other, theirs in best.items():
            any_company = key[0] in alone and max(key[1], other[1]) <= cores
            comparable = other[0] == key[0] and (any_company or other[1] > key[1])
            if comparable and value / key[1] < 0.9 * theirs / other[1]:
                found.append(key)
                break
    return found


def _scaling(best: dict[Key, float], name: str, counts: Iterable[int]) -> Scaling:
    """What up to so many threads can do: some may rest."""
    found: list[tuple[int, float]] = []
    for count in counts:
        found.append((count, max([best[name, count], *(value for _, value in found)])))
    return tuple(found)


def implausible(
    found: dict[str, Scaling], operations: dict[str, int], core_hertz: float | None
) -> str | None:
    """Why measured roofs cannot be right, or None.

    Args:
        found: by unit and by level, levels nearest first.
        operations: of one instruction of each unit.
        core_hertz: None where cycles are not counted.
    """
    for name, scaling in found.items():
        for count, value in scaling:
            if core_hertz is None:
                break
            each = value / (core_hertz * count)
            if name in operations and not 0.05 <= each / operations[name] <= 4.4:
                return f"{each / operations[name]:.2g} instructions ({name}) a cycle"
            if name not in operations and each > 220:
                return f"{each:.0f} bytes a cycle from {name}"
        for (few, less), (many, more) in pairwise(scaling):
            if more > 1.5 * less * many / few:
                times = f"{more / less:.1f} times"
                return f"{name} of {_threads(many)} is {times} that of {_threads(few)}"
    for near, far in pairwise(name for name in found if name not in operations):
        for (count, nearer), (_, farther) in zip(found[near], found[far], strict=True):
            if farther > 1.1 * nearer:
                return f"{far} is faster than {near} for {_threads(count)}"
    return None


@contextmanager
def _on_own_cpus() -> Iterator[list[int]]:
    """Keeps the calling thread on the first of the CPUs that it gives, cores before their
    siblings: a system that puts two threads on one core would be no roof. Empty where CPUs cannot
    be chosen.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield []
        return
    allowed = os.sched_getaffinity(0)
    cpus = sorted(allowed, key=lambda cpu: (_place_in_core(cpu), cpu))
    os.sched_setaffinity(0, cpus[:1])
    try:
        yield cpus
    finally:
        os.sched_setaffinity(0, allowed)


def _place_in_core(cpu: int) -> int:
    """Which of its core's hardware threads a CPU is."""
    try:
        text = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        return _cpus_of(text).index(cpu)
    except (OSError, ValueError):
        return 0


def _threads(count: int) -> str:
    return f"{count} threads" if count > 1 else "1 thread"


def _bar(done: float, width: int = 24) -> str:
    full = min(width, round(done * width))
    return "━" * full + "╌" * (width - full)
