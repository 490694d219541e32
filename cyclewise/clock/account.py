"""The bookkeeping of ticks: every tick of every thread belongs somewhere.

Stamps of the clocked loop and spans of Python come in, on one tick scale; a `Ledger` goes out. For
each thread, in whole ticks:

    moments + waiting + python + unaccounted = wall

*Waiting* is for other threads: inside a step for a moment to be over, and for a helper the time
between steps. Python runs on the calling thread alone, which is thread 0. What lies between its
spans and the steps is *unaccounted*: the calls into compiled code, the waking of helpers, and
whatever nobody stamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.stamps import spent

Ticks = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that Python did between two ticks."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Account:
    """Where the ticks of one thread went."""

    moments: int
    waiting: int
    python: int
    unaccounted: int
    wall: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where the ticks of a window went."""

    work: Ticks
    """(steps, threads, moments): a thread's work on a moment."""
    waiting: Ticks
    """(steps, threads, moments): from the end of its work until the moment was over."""
    starts: Ticks
    """(steps, threads, moments): when a thread came to a moment."""
    accounts: tuple[Account, ...]
    """One a thread."""


def keep_books(ticks: Ticks, spans: Sequence[Span], window: tuple[int, int]) -> Ledger:
    """Books the ticks of a window.

    Args:
        ticks: (steps, threads, moments + 1, 2), as `Stamps.ticks` has them; zeros where a thread
            was not there.
        spans: what Python did outside the steps, in order, none overlapping another.
        window: first and last tick.
    """
    steps, threads, rows, _ = ticks.shape
    flat = ticks.reshape(steps, threads, 2 * rows)
    reached = np.maximum.accumulate(flat, axis=2)
    work, waiting = np.moveaxis(spent(ticks), 3, 0)
    starts = reached[:, :, 1:-1:2]
    start, end = window
    accounts = []
    for thread in range(threads):
        entries, exits = reached[:, thread, 0], reached[:, thread, -1]
        was_there = entries > 0
        edges = np.stack([entries, exits], axis=1)[was_there]
        python = 0
        if thread == 0:
            python = sum(span.end - span.start for span in spans)
            edges = (
                np.concatenate([edges, [[span.start, span.end] for span in spans]])
                if (spans)
                else edges
            )
            edges = edges[np.argsort(edges[:, 0], kind="stable")]
        borders = np.concatenate([[start], edges.reshape(-1), [end]]).reshape(-1, 2)
        outside = int((borders[:, 1] - borders[:, 0]).sum())
        inside_waiting = int(waiting[:, thread].sum())
        accounts.append(
            Account(
                moments=int(work[:, thread].sum()),
                waiting=inside_waiting + (outside if thread else 0),
                python=python,
                unaccounted=0 if thread else outside,
                wall=end - start,
            )
        )
    return Ledger(work, waiting, starts, tuple(accounts))
