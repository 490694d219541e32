"""Probes: moments of their own that measure what the hardware can do; no model is needed.

The clock runs them on threads of its own for the machine profile (`clock/roofs.py`), and a machine
on its threads to read the memory's bandwidth beside a measurement (`Machine.read_bandwidth`).
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.kernels import rates, stream
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.layout import HANDOVER, LINE, RATE, SCHEDULE, STREAM, THREAD
from cyclewise.machine.packing import allocate
from cyclewise.machine.threads import Threads

PASS_SECONDS = 0.001
"""What a pass that can be of any length takes about: long beside the call, short beside a turn that
the operating system gives to somebody else.
"""
MEMORY_TILE_BYTES = 1 << 16
MEMORY_CLAIMS = 16
"""Into how many claims a thread's share of the memory is cut: who is late holds nobody up."""
_SCRATCH_BYTES = rates.OPERAND_BYTES


class Probe:
    """A kernel on threads, pass after pass."""

    def __init__(
        self, threads: Threads, kernel: str, record: list[int], memory: NDArray[np.uint8],
        *, num_tiles: int, grain: int = 1, work: float,
    ) -> None:  # fmt: skip
        """`work`: what a pass does, in bytes, operations or hand-overs; `memory`: what the record
        points to.
        """
        self._threads, self._memory, self._work = threads, memory, work
        self._call_seconds = 0.0
        self._record = np.array(record, np.int64)
        values = {
            "kernel": host_compiler().address(kernel), "moment": self._record.ctypes.data,
            "num_tiles": num_tiles, "grain": grain, "replicated": 0,
        }  # fmt: skip
        self._schedule = np.array([[values[name] for name in SCHEDULE]], np.int64)
        scratch = allocate(threads.num_threads * _SCRATCH_BYTES)
        self._scratch = scratch
        self._contexts = np.zeros((threads.num_threads, len(THREAD)), np.int64)
        self._contexts[:, THREAD.index("scratch")] = (
            scratch.ctypes.data + np.arange(threads.num_threads) * _SCRATCH_BYTES
        )

    def best(self, seconds: float) -> float:
        """Work a second in the best pass of so many seconds; 0 if there is no time for one."""
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            fastest = min(fastest, self._pass())
        return self._work / (fastest - self._call_seconds)

    def stretch(self, field: int) -> None:
        """Makes a pass `PASS_SECONDS` long by the field of the record that repeats its work, and
        has what a pass without any takes left out of account.
        """
        self._record[field] = 0
        self._call_seconds = min(self._pass() for _ in range(200))
        repeats, short = 1, 0.0
        while short < PASS_SECONDS / 2:
            factor = max(2, round(PASS_SECONDS / short)) if short > PASS_SECONDS / 64 else 16
            repeats *= factor
            self._threads.settle()
            self._record[field] = repeats
            short = min(self._pass() for _ in range(3))
        self._work *= repeats

    def _pass(self) -> float:
        start = time.perf_counter()
        self._threads.run(self._schedule, self._contexts)
        return time.perf_counter() - start


def touched(num_bytes: int) -> NDArray[np.uint8]:
    """A buffer to read: with pages of its own, where untouched memory is one page of zeros."""
    buffer = allocate(num_bytes)
    buffer[::4096] = 1
    return buffer


def memory_probe(threads: Threads, buffer: NDArray[np.uint8]) -> Probe:
    """Bytes read a second from a buffer, which should be far larger than the caches."""
    host_compiler().load([stream.stream_unit()])
    tiles = buffer.nbytes // MEMORY_TILE_BYTES
    return Probe(
        threads, "stream", [buffer.ctypes.data, MEMORY_TILE_BYTES, 1], buffer,
        num_tiles=tiles, grain=max(1, tiles // (MEMORY_CLAIMS * threads.num_threads)),
        work=tiles * MEMORY_TILE_BYTES,
    )  # fmt: skip


def cache_probe(threads: Threads, buffer: NDArray[np.uint8], share_bytes: int) -> Probe:
    """Bytes read a second by all threads, each again and again from its own share of a buffer."""
    host_compiler().load([stream.stream_unit()])
    share = share_bytes // stream.STRIDE * stream.STRIDE
    count = threads.num_threads
    assert 0 < count * share <= buffer.nbytes
    record = [buffer.ctypes.data, share, 1]
    probe = Probe(threads, "stream", record, buffer, num_tiles=count, work=count * share)
    probe.stretch(STREAM.index("repeats"))
    return probe


def rate_probe(threads: Threads, rate: rates.Rate) -> Probe:
    """Operations a second of a raw instruction, on all threads."""
    compiler = host_compiler()
    compiler.load([rates.rates_unit(compiler.target)])
    operands = np.zeros(rates.OPERAND_BYTES, np.uint8)
    words = operands.view(np.float32)
    words[:16], words[32:] = 1.0, 1.0  # chain * 1 + 0: floats stay what they are
    count = threads.num_threads
    work = count * rates.CHAINS * rates.UNROLL * rate.operations
    record = [operands.ctypes.data, 1]
    probe = Probe(threads, f"rate_{rate.unit}", record, operands, num_tiles=count, work=work)
    probe.stretch(RATE.index("repeats"))
    return probe


def handover_probe(threads: Threads) -> Probe:
    """Hand-overs of a cache line a second, there and back, between two of the threads."""
    assert threads.num_threads > 1
    compiler = host_compiler()
    compiler.load([rates.rates_unit(compiler.target)])
    line = allocate(LINE)
    probe = Probe(threads, "handover", [line.ctypes.data, 1], line, num_tiles=2, work=2)
    probe.stretch(HANDOVER.index("rounds"))
    return probe
