"""The machine profile: a file that says what this computer can do, and how to run on it best.

The clock measures it and writes it (`clock/roofs.py`); the machine and the engine read it here and
know nothing of the clock. It is keyed by the processor, so a cache that moves to another computer
is not believed there. Without one, defaults serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VERSION = 1

Scaling = tuple[tuple[int, float], ...]
"""A quantity measured at several numbers of threads: (threads, all of them together)."""


def at_threads(scaling: Scaling, num_threads: int) -> float:
    """The quantity at a number of threads: between measured ones on the line that joins them."""
    points = sorted(scaling)
    below = [p for p in points if p[0] <= num_threads] or points[:1]
    above = [p for p in points if p[0] >= num_threads] or points[-1:]
    (low, first), (high, last) = below[-1], above[0]
    if low == high:
        return first
    return first + (last - first) * (num_threads - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the memory hierarchy."""

    name: str
    """`L1`, `L2`, `L3` or `memory`."""
    num_bytes: int
    """Of the data that one instance holds; 0 for memory."""
    cores: int
    """How many share an instance."""
    bandwidth: Scaling
    """Bytes read a second."""


@dataclass(frozen=True, slots=True)
class Roofs:
    """What the hardware can do, measured; never what a kernel of ours does."""

    core_hertz: float
    """Of a core under load."""
    levels: tuple[Level, ...]
    """Nearest first; the last is memory."""
    operations: dict[str, Scaling]
    """Operations a second by unit (`costs.Unit`); a multiply-add is two."""
    instructions: dict[str, str]
    """The instruction that each unit's rate was measured with."""
    handover_seconds: float
    """From one thread's store until another has seen it."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The choices that measurements make; None leaves a default in place."""

    num_threads: int | None = None
    prefill_chunk: int | None = None
    token_tiles: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """One computer, as measured."""

    cpu: str
    target: str
    num_cpus: int
    roofs: Roofs
    tuning: Tuning = Tuning()
    predictor: dict[str, Any] = field(default_factory=dict)
    """What `clock/predict.py` was calibrated to; nobody else reads it."""
    date: str = ""
    version: int = VERSION
