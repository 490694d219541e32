"""A clock that may stay on: of sixteen steps one is stamped, and the sums only grow.

A process that runs for days makes a `LightClock` and reads it now and then, to log it or to export
it. It costs a sixteenth of the clock that `cyclewise profile` uses, which is at most a hundredth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.names import collapsed
from cyclewise.machine.stamps import Stamps

if TYPE_CHECKING:
    from cyclewise.clock.counter import Counter
    from cyclewise.machine.machine import Machine

EVERY = 16
CAPACITY = 64
"""Stamped steps that are kept between two readings; those beyond are not stamped."""


@dataclass(slots=True)
class Reading:
    """Sums since the clock was made, of the stamped steps alone."""

    steps: int = 0
    """Steps that were stamped."""
    tokens: int = 0
    """Tokens in them."""
    seconds: float = 0.0
    """From their start to their end."""
    working: dict[str, float] = field(default_factory=dict)
    """Seconds by moment, its layers together: mean over the threads."""
    waiting: dict[str, float] = field(default_factory=dict)
    """Seconds that threads waited for each other at the end of it: mean over the threads."""


class LightClock:
    """Counts while a machine works. Read and close it between steps, where the machine is used."""

    def __init__(self, machine: Machine, counter: Counter) -> None:
        self._machine, self._counter = machine, counter
        moments = machine.program.moments
        names = list(dict.fromkeys(collapsed(moment.name) for moment in moments))
        self._names = names
        self._index = np.array([names.index(collapsed(moment.name)) for moment in moments])
        self._stamps = Stamps(len(moments), machine.num_threads, CAPACITY, EVERY)
        self._sums: dict[Literal["prefill", "decode"], Reading] = {
            "prefill": Reading(), "decode": Reading(),
        }  # fmt: skip
        machine.clock(self._stamps)

    def read(self) -> dict[Literal["prefill", "decode"], Reading]:
        """The sums of steps that held a prompt, and of those that did not."""
        self._machine.settle()
        stamps, rate = self._stamps, self._counter.ticks_per_second
        spent = stamps.spent() / rate
        for step, shape in enumerate(stamps.shapes):
            if not shape.num_tokens:
                continue
            prefill = any(count > 1 for count, _ in shape.chunks)
            sums = self._sums["prefill" if prefill else "decode"]
            sums.steps += 1
            sums.tokens += shape.num_tokens
            sums.seconds += float(spent[step, 0].sum())
            means = spent[step].mean(axis=0)
            self._add(sums.working, means[:, 0])
            self._add(sums.waiting, means[:, 1])
        stamps.clear()
        return self._sums

    def close(self) -> None:
        """Gives the machine back to the plain loop."""
        self._machine.clock(None)

    def _add(self, sums: dict[str, float], seconds: NDArray[np.float64]) -> None:
        totals = np.bincount(self._index, seconds, len(self._names)).tolist()
        for name, total in zip(self._names, totals, strict=True):
            sums[name] = sums.get(name, 0.0) + total
