"""The machine: threads that execute a program for one batch of tokens.

`Machine.step` takes a flat batch (any tokens of any sequences), checks it, writes the batch's
record and hands the program's schedule to its threads (`threads.py`), of which the calling one is
the first.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cyclewise.errors import InvalidParameterError
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.attention import partial_bytes
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.layout import (
    BATCH,
    LINE,
    PAGE_TOKENS,
    QUERY_BLOCK,
    QUERY_BLOCK_FIELDS,
    RUN,
    SCHEDULE,
    SPLIT,
    THREAD,
)
from cyclewise.machine.kernels.linear import MAX_BATCH_TOKENS
from cyclewise.machine.kernels.loop import MAX_TILES, clocked_loop_unit
from cyclewise.machine.kernels.lora import BLOCK_TOKENS
from cyclewise.machine.packing import allocate
from cyclewise.machine.profile import load_tuning
from cyclewise.machine.program import Moment, Program
from cyclewise.machine.stamps import Stamps
from cyclewise.machine.threads import Threads

if TYPE_CHECKING:
    from cyclewise.machine.probe import Probe

REPLICATE_UP_TO = 4
"""Tokens of a batch in which every thread normalizes and quantizes for itself."""
CLAIMS_PER_THREAD = 8
"""Into how many claims a thread's share of a moment is cut at least, where it has the tiles."""
CLAIM_BYTES = 1 << 17
"""Most bytes of weights, times tokens, of a claim: others may have to wait for it."""
PARTS_PER_THREAD = 16
"""Into how many parts a thread's share of attention is cut at least, where the keys suffice."""
PARTIALS_BYTES = 1 << 26
"""What parts of attention leave for the one that comes last, at most."""
MAX_SCHEDULES = 512
"""Shapes of batches whose schedules are kept."""
PROBE_BYTES = 1 << 28
"""The buffer that `read_bandwidth` reads."""
LEAST_PROBE_BYTES = 1 << 24
"""Less is read too fast for the call not to count."""


_Shape = tuple[int, int, int, bool]
"""What a schedule depends on: tokens, rows of logits, records of query blocks, and whether tokens
have adapters.
"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` consecutive tokens of the flat batch from `start`, the first at `position` of a
    sequence.
    """

    start: int
    count: int
    position: int
    pages: NDArray[np.int32]
    """The sequence's page table."""
    adapter: int | None = None
    """The number of the LoRA adapter that the tokens have."""


def resolve_threads(num_threads: int | None) -> int:
    """The number of threads to run: what is asked for, or else what the machine profile says, or
    else one for each CPU; never more than those, since that only makes them wait.
    """
    if num_threads is not None and num_threads < 1:
        raise InvalidParameterError(f"threads is {num_threads}; it must be at least 1.")
    available = available_cpus()
    return min(num_threads or load_tuning().num_threads or available, available)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvalidParameterError(f"The batch is not sound: {what} is out of range.")


class Machine:
    """Threads and the records they read. One caller at a time: the engine takes turns."""

    def __init__(self, program: Program, num_threads: int) -> None:
        if not 1 <= num_threads <= program.num_threads:
            raise InvalidParameterError(
                f"The program was built for {program.num_threads} threads, not {num_threads}."
            )
        self.program = program
        self.num_threads = num_threads
        chunk = load_tuning().prefill_chunk or MAX_BATCH_TOKENS
        self.max_batch_tokens = min(chunk, MAX_BATCH_TOKENS)
        self.page_tokens = PAGE_TOKENS
        self.num_pages = program.num_pages
        compiler = host_compiler()
        self._kernels = {m.kernel: compiler.address(m.kernel) for m in program.moments}
        self._schedules: dict[_Shape, tuple[NDArray[np.int64], bool]] = {}

        # Two tables, because a helper that comes late must find its own: in a small batch each
        # thread has private buffers, in a large one they are shared.
        stride = -(-program.scratch_bytes // 4096) * 4096 + 4096
        self._scratch = allocate(num_threads * stride)
        contexts = np.zeros((2, num_threads, len(THREAD)), np.int64)
        indices = np.arange(num_threads)
        contexts[:, :, THREAD.index("scratch")] = self._scratch.ctypes.data + indices * stride
        contexts[1, :, THREAD.index("private")] = indices * program.private_bytes
        self._contexts = contexts
        self._token_ids = np.zeros(MAX_BATCH_TOKENS, np.int32)
        self._positions = np.zeros(MAX_BATCH_TOKENS, np.int32)
        self._slots = np.zeros(MAX_BATCH_TOKENS, np.int32)
        self._logit_rows = np.zeros(MAX_BATCH_TOKENS, np.int32)
        self._blocks = np.zeros((2 * MAX_BATCH_TOKENS, len(QUERY_BLOCK_FIELDS)), np.int64)
        self._runs = np.zeros((MAX_BATCH_TOKENS, len(RUN)), np.int64)
        self._partials = allocate(PARTIALS_BYTES)
        self._counters = allocate(MAX_BATCH_TOKENS * program.cache.heads.num_kv_heads * LINE)
        self._batch = np.zeros(len(BATCH), np.int64)
        for name, array in (
            ("token_ids", self._token_ids),
            ("positions", self._positions),
            ("slots", self._slots),
            ("logit_rows", self._logit_rows),
            ("query_blocks", self._blocks),
            ("runs", self._runs),
        ):
            self._batch[BATCH.index(name)] = array.ctypes.data
        self._stamps: Stamps | None = None
        self._probes: dict[int, Probe] = {}
        self._probe_memory: NDArray[np.uint8] | None = None
        self._threads = Threads(num_threads, len(program.moments))
        # Also when the machine is forgotten: a helper must not outlive what it writes to.
        self._end = weakref.finalize(self, self._threads.close)

    @property
    def threads(self) -> Threads:
        """For what measures them beside the steps."""
        return self._threads

    def close(self) -> None:
        """Ends the helper threads."""
        self._end()

    def clock(self, stamps: Stamps | None) -> None:
        """From the next step on the clocked loop writes each moment's ticks to `stamps`; None: the
        plain one runs again.

        A step that finds the stamps full is not stamped.
        """
        self.settle()
        if stamps is not None:
            shape = (len(self.program.moments), self.num_threads)
            assert (stamps.num_moments, stamps.num_threads) == shape
            host_compiler().load([clocked_loop_unit()])
        self._stamps = stamps

    def settle(self) -> None:
        """Waits until every helper has left the last step, and with it all that it may write to."""
        self._threads.settle()

    def step(
        self,
        token_ids: Sequence[int] | NDArray[np.int32],
        chunks: Sequence[Chunk],
        logit_rows: Sequence[int],
    ) -> NDArray[np.float32]:
        """Runs the program on a batch; float32 (len(logit_rows), vocabulary), a view until the
        next step.

        Args:
            token_ids: the flat batch, at most MAX_BATCH_TOKENS.
            chunks: they cover the batch, in order.
            logit_rows: tokens of the batch, ascending, whose logits are wanted.
        """
        num_tokens, num_logits = len(token_ids), len(logit_rows)
        self._check(token_ids, chunks, logit_rows)
        self._token_ids[:num_tokens] = token_ids
        self._logit_rows[:num_logits] = logit_rows
        num_blocks, num_runs = self._place(chunks), self._note_runs(chunks)
        self._batch[0], self._batch[1] = num_tokens, num_logits
        self._batch[BATCH.index("num_runs")] = num_runs
        shape = (num_tokens, num_logits, num_blocks, num_runs > 0)
        schedule, replicated = self._schedule(shape)
        stamps = self._stamps
        slot = stamps.take() if stamps else 0
        before = time.perf_counter_ns()
        contexts = self._contexts[int(replicated)]
        self._threads.run(schedule, contexts, self._batch.ctypes.data, slot)
        if stamps and slot:
            stamps.note(chunks, num_logits, before, time.perf_counter_ns())
        return self.program.logits[:num_logits, : self.program.vocab_size]

    def copy_page(self, source: int, to: int) -> None:
        """Copies a page of the KV cache: keys and values of all layers."""
        self.program.cache.copy_page(source, to)

    def read_bandwidth(self, seconds: float = 0.3, num_bytes: int = PROBE_BYTES) -> float:
        """Bytes a second that this machine's threads read from memory, each its own part: the
        best pass.

        The buffer is far larger than the caches, or as large as what it is to be compared with, if
        that is smaller: from pass to pass a cache keeps some of a buffer that is not much larger.
        No pass writes to it. What a machine shared with others can read drifts: this is for the
        time around it alone.
        """
        from cyclewise.machine.probe import memory_probe, touched

        if self._probe_memory is None:
            self._probe_memory = touched(PROBE_BYTES)
        size = min(max(num_bytes, LEAST_PROBE_BYTES), PROBE_BYTES)
        if size not in self._probes:
            self._probes[size] = memory_probe(self._threads, self._probe_memory[:size])
        return self._probes[size].best(seconds)

    def _check(
        self,
        token_ids: Sequence[int] | NDArray[np.int32],
        chunks: Sequence[Chunk],
        logit_rows: Sequence[int],
    ) -> None:
        """Kernels trust their arguments: everything that they index by is proved here."""
        num_tokens = len(token_ids)
        _require(0 < num_tokens <= MAX_BATCH_TOKENS, "the number of tokens")
        low, high = min(token_ids), max(token_ids)
        _require(low >= 0 and high < self.program.vocab_size, "a token id")
        covered = 0
        for chunk in chunks:
            in_order = chunk.start == covered and chunk.count > 0 and chunk.position >= 0
            _require(in_order, "the chunks' order")
            covered += chunk.count
            end = chunk.position + chunk.count
            pages = chunk.pages[: -(-end // PAGE_TOKENS)]
            _require(end <= self.program.context_length, "a position")
            _require(len(pages) * PAGE_TOKENS >= end, "the length of a page table")
            _require(
                pages.dtype == np.int32 and pages.flags.c_contiguous, "the layout of a page table"
            )
            _require(pages.min() >= 0 and pages.max() < self.num_pages, "a page")
            adapter = chunk.adapter
            known = adapter is None or 0 <= adapter < self.program.num_adapters
            _require(known, "an adapter")
        _require(covered == num_tokens, "the number of tokens in chunks")
        ascending = all(a < b for a, b in pairwise(logit_rows))
        _require(ascending and all(0 <= row < num_tokens for row in logit_rows), "a row of logits")

    def _place(self, chunks: Sequence[Chunk]) -> int:
        """Writes positions, cache slots and query blocks; returns the number of blocks' records."""
        blocks = []
        for chunk in chunks:
            pages = chunk.pages
            if chunk.count == 1:
                position = chunk.position
                self._positions[chunk.start] = position
                page = int(pages[position // PAGE_TOKENS])
                self._slots[chunk.start] = page * PAGE_TOKENS + position % PAGE_TOKENS
            else:
                positions = np.arange(chunk.position, chunk.position + chunk.count, dtype=np.int32)
                where = slice(chunk.start, chunk.start + chunk.count)
                self._positions[where] = positions
                self._slots[where] = (
                    pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
                )
            address = pages.ctypes.data
            for first in range(0, chunk.count, QUERY_BLOCK):
                size = min(QUERY_BLOCK, chunk.count - first)
                blocks.append((chunk.start + first, size, chunk.position + first, address))
        records = self._records(blocks)
        self._blocks[: len(records)] = records
        return len(records)

    def _note_runs(self, chunks: Sequence[Chunk]) -> int:
        """Writes the runs of tokens that have one adapter; returns their number."""
        runs: list[list[int]] = []
        for chunk in chunks:
            if chunk.adapter is None:
                continue
            if runs and runs[-1][2] == chunk.adapter and sum(runs[-1][:2]) == chunk.start:
                runs[-1][1] += chunk.count
            else:
                runs.append([chunk.start, chunk.count, chunk.adapter])
        if runs:
            self._runs[: len(runs)] = runs
        return len(runs)

    def _records(self, blocks: list[tuple[int, int, int, int]]) -> list[tuple[int, ...]]:
        """The records of query blocks (layout.QUERY_BLOCK_FIELDS). The splits of a block's keys are
        cut into parts, records of their own, where it is so much of the batch that a thread would
        have to wait for it.
        """
        heads = self.program.cache.heads
        splits = [-(-(position + size) // SPLIT) for _, size, position, _ in blocks]
        work = sum(size * count for (_, size, _, _), count in zip(blocks, splits, strict=True))
        share = work * heads.num_kv_heads // (PARTS_PER_THREAD * self.num_threads)
        records: list[tuple[int, ...]] = []
        spare, used, counters = len(self._blocks) - len(blocks), 0, self._counters.ctypes.data
        for block, num_splits in zip(blocks, splits, strict=True):
            size = block[1]
            step = max(1, share // size)
            num_parts = -(-num_splits // step) if self.num_threads > 1 else 1
            rows = size * (heads.num_heads // heads.num_kv_heads)
            needed = num_splits * heads.num_kv_heads * partial_bytes(rows, heads.padded_head_dim)
            if num_parts == 1 or num_parts > spare or used + needed > PARTIALS_BYTES:
                records.append((*block, 0, num_splits, num_splits, 1, 0, 0))
                continue
            partials = self._partials.ctypes.data + used
            for first in range(0, num_splits, step):
                last = min(first + step, num_splits)
                records.append((*block, first, last, num_splits, num_parts, partials, counters))
            spare, used = spare - num_parts, used + needed
            counters += heads.num_kv_heads * LINE
        return records

    def _schedule(self, shape: _Shape) -> tuple[NDArray[np.int64], bool]:
        found = self._schedules.get(shape)
        if found is None:
            replicated = shape[0] <= REPLICATE_UP_TO
            rows = [self._entry(moment, shape, replicated) for moment in self.program.moments]
            found = np.array(rows, np.int64), replicated
            # A helper that has not left its last step may still read that step's schedule.
            if len(self._schedules) >= MAX_SCHEDULES and self._threads.settled:
                self._schedules.clear()
            self._schedules[shape] = found
        return found

    def _entry(self, moment: Moment, shape: _Shape, replicated: bool) -> list[int]:
        num_tokens, num_logits, num_blocks, has_adapters = shape
        match moment.tiles:
            case "tokens":
                tiles = num_tokens
            case "logits":
                tiles = num_logits
            case "queries":
                tiles = num_blocks * moment.tiles_per_block
            case "experts":
                form = moment.form
                chosen = min(form.num_experts, num_tokens * form.num_chosen)
                tiles = chosen * moment.tiles_per_block
            case "adapters":
                blocks = -(-num_tokens // BLOCK_TOKENS) if has_adapters else 0
                tiles = blocks * moment.tiles_per_block
            case int(number):
                tiles = number
        if moment.of_logits and not num_logits:
            tiles = 0
        _require(tiles <= MAX_TILES, "the number of tiles")
        grain = tiles // (CLAIMS_PER_THREAD * self.num_threads)
        if moment.kind == "matmul":
            rows = num_logits if moment.of_logits else num_tokens
            grain = min(grain, CLAIM_BYTES * tiles // (moment.weight_bytes * max(1, rows)))
        values = {
            "kernel": self._kernels[moment.kernel],
            "moment": moment.record.ctypes.data,
            "num_tiles": tiles,
            "grain": max(1, grain),
            "replicated": int(tiles == 0 or (replicated and moment.replicable)),
        }
        return [values[name] for name in SCHEDULE]
