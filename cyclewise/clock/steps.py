"""Steps to measure: a prompt, or a token of decode at any depth, and the machine under the clock.

`complexity.py` comes here. The machine is driven without the engine, with page tables made on the
spot: a token of decode finds as deep a cache as is wanted, without the prompt that would fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.kernels.layout import PAGE_TOKENS
from cyclewise.machine.machine import Chunk, Machine
from cyclewise.machine.names import collapsed
from cyclewise.machine.program import Program
from cyclewise.machine.stamps import Stamps

TENTH = 0x2E
"""Twice that byte is about 0.1 in float16."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's arguments, see `Machine.step`."""

    token_ids: NDArray[np.int32]
    chunks: list[Chunk]
    logit_rows: list[int]


class ClockedMachine:
    """A machine under the clock."""

    def __init__(self, machine: Machine, groups: Sequence[str], capacity: int) -> None:
        moments = machine.program.moments
        self.machine = machine
        self._stamps = Stamps(len(moments), machine.num_threads, capacity)
        named = [[collapsed(moment.name) == group for group in groups] for moment in moments]
        self._sums = np.column_stack([named, np.ones(len(moments))])
        machine.clock(self._stamps)

    def run(self, batches: Sequence[Batch]) -> NDArray[np.float64]:
        """(steps, groups + 1): ticks of each group of moments, working and waiting, mean over the
        threads that were there; then their sum.
        """
        self.machine.settle()
        self._stamps.clear()
        for batch in batches:
            self.machine.step(batch.token_ids, batch.chunks, batch.logit_rows)
        self.machine.settle()
        over = self._stamps.ticks[..., 1]  # (steps, threads, moments + 1)
        there = (over[:, :, -1] > 0)[..., None]
        spent = (np.diff(over, axis=2) * there).sum(1) / there.sum(1)
        return np.asarray(spent @ self._sums)


def prefill_steps(program: Program, num_tokens: int, chunk: int) -> list[Batch]:
    """The steps of a prompt, in chunks, with the logits of its last token."""
    pages = np.arange(-(-num_tokens // PAGE_TOKENS), dtype=np.int32)
    token_ids = _token_ids(program, num_tokens)
    batches = []
    for first in range(0, num_tokens, chunk):
        part = token_ids[first : first + chunk]
        last = first + len(part) == num_tokens
        rows = [len(part) - 1] if last else []
        batches.append(Batch(part, [Chunk(0, len(part), first, pages)], rows))
    return batches


def decode_step(program: Program, context: int, batch: int) -> Batch:
    """A step of so many sequences, each with a context of its own."""
    size = context // PAGE_TOKENS + 1
    pages = np.arange(batch * size, dtype=np.int32).reshape(batch, size)
    chunks = [Chunk(i, 1, context, pages[i]) for i in range(batch)]
    return Batch(_token_ids(program, batch), chunks, list(range(batch)))


def _token_ids(program: Program, count: int) -> NDArray[np.int32]:
    return np.random.default_rng(count).integers(0, program.vocab_size, count, dtype=np.int32)


def touch_cache(program: Program, num_tokens: int) -> None:
    """Fills the KV cache's pages of so many tokens with small numbers: memory that was never
    written is one page of zeros for the operating system, and reading it costs nothing.
    """
    program.cache.pages[: -(-num_tokens // PAGE_TOKENS)] = TENTH
