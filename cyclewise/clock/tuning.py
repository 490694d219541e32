"""The engine's choices, made by measuring: register tiles, prefill chunk, number of threads.

`machine_profile` (`roofs.py`) calls `measure_tuning` and keeps what comes out; the machine reads it
at its next start. What is measured is the engine itself: its matrix kernels, and a program whose
weights mean nothing (`synthetic.py`). Candidates take turns, and a default gives way only to what
is clearly better. `benchmarks/search.py` tries all combinations on real models, and says how far
from the best these choices are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np

from cyclewise.clock.synthetic import SHAPE, synthetic_program
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.blocks import BLOCK_FORMATS, GROUP, ROWS, tile_bytes
from cyclewise.machine.kernels.compiler import Compiler, callable_at, host_compiler
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP
from cyclewise.machine.kernels.matmul import SCRATCH_BYTES, matmul_unit
from cyclewise.machine.machine import Chunk, Machine
from cyclewise.machine.packing import allocate
from cyclewise.machine.profile import Tuning

C = TypeVar("C", bound=Hashable)
Tiles = tuple[int, ...]

TILES: dict[str, tuple[Tiles, ...]] = {
    "avx512": ((12, 8, 4, 2, 1), (8, 4, 2, 1), (4, 2, 1)),
    "avxvnni": ((4, 2, 1), (2, 1)),
    "avx2": ((4, 2, 1), (2, 1)),
    "neon_i8mm": ((4, 2, 1), (2, 1)),
    "neon_dot": ((4, 2, 1), (2, 1)),
    "plain": ((4, 2, 1), (2, 1)),
}
"""Candidates for the tiles of matrix kernels; the first are the target's own."""
CHUNKS = (512, 256, 128)
"""Candidates for the prefill chunk; the first is the default."""
PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
"""The request whose time decides the number of threads."""

KERNEL_TILES, KERNEL_COLUMNS, KERNEL_TOKENS = 16, 1024, 256
"""The matrix, in tiles of 16 rows, and the batch that a kernel's tiles are chosen on."""
PREFILL_LAYERS = 6
"""Of the program, in which prefill is measured: one layer costs what another does."""
TURNS = 3
"""Of each candidate, at least; more while there is time."""
KERNEL_SECONDS, ENGINE_SECONDS = 0.1, 1.2
"""Time for a choice."""
DECODE_STEPS = 6
CLEARLY = 0.98
"""Of the default's time: from here on another candidate is taken."""


def measure_tuning(progress: Callable[[str], None] = lambda _: None) -> Tuning:
    """Measures the candidates; takes seconds."""
    target, tiles = host_compiler().target, {}
    progress("choosing the register tiles")
    compilers = {sizes: Compiler(target) for sizes in TILES[target.name]}
    for sizes, compiler in compilers.items():
        asked = None if sizes == target.token_tiles else sizes
        compiler.load([matmul_unit(name, asked) for name in BLOCK_FORMATS])
    for name in BLOCK_FORMATS:
        progress(f"choosing the register tiles of {name}")
        best = best_tiles(name, compilers)
        if best != target.token_tiles:
            tiles[name] = best
    progress("choosing the prefill chunk")
    most = available_cpus()
    whole = synthetic_program(most, "Q8_0", ffn_gate="Q4_1", ffn_up="Q4_1", ffn_down="Q4_1")
    part = whole.prefix(PREFILL_LAYERS)
    machine = Machine(part, most)
    prefills = {chunk: partial(prefill_seconds, machine, PROMPT_TOKENS, chunk) for chunk in CHUNKS}
    chunk = choose(prefills, ENGINE_SECONDS)
    machine.close()
    progress("choosing the number of threads")
    machines = {n: (Machine(whole, n), Machine(part, n)) for n in thread_candidates(most)}

    def request(count: int) -> float:
        decoder, prefiller = machines[count]
        prefill = prefill_seconds(prefiller, PROMPT_TOKENS, chunk)
        decode = decode_seconds(decoder, DECODE_STEPS, PROMPT_TOKENS)
        return prefill * SHAPE.num_layers / PREFILL_LAYERS + decode * ANSWER_TOKENS

    threads = choose({count: partial(request, count) for count in machines}, ENGINE_SECONDS)
    for pair in machines.values():
        for machine in pair:
            machine.close()
    return Tuning(threads, chunk, tiles)


def thread_candidates(num_cpus: int) -> list[int]:
    """All CPUs first, the default; then every smaller number of a few, or three quarters, a half, a
    quarter and so on of many.
    """
    if num_cpus <= 4:
        return list(range(num_cpus, 0, -1))
    halves = {num_cpus >> i for i in range(1, num_cpus.bit_length())}
    return [num_cpus, *sorted({num_cpus * 3 // 4, *halves}, reverse=True)]


def choose(candidates: Mapping[C, Callable[[], float]], seconds: float) -> C:
    """The candidate of the least time: the first, unless another is clearly better.

    Every turn measures all of them, and only ratios within a turn are compared.
    """
    names = list(candidates)
    if len(names) == 1:
        return names[0]
    turns: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(turns) < TURNS or time.perf_counter() < end:
        turns.append([measure() for measure in candidates.values()])
    ratios = [
        statistics.median(turn[index] / turn[0] for turn in turns) for index in range(len(names))
    ]
    best = min(range(len(names)), key=lambda index: ratios[index])
    return names[best] if ratios[best] < CLEARLY else names[0]


def best_tiles(name: str, compilers: Mapping[Tiles, Compiler]) -> Tiles:
    """Whose matrix kernel of a format is the fastest, on this thread alone."""
    groups = KERNEL_COLUMNS // GROUP
    size = tile_bytes(name, KERNEL_COLUMNS)
    # What the bytes mean is nothing, but as scales they must be common numbers: others are slow.
    weights, x = allocate(KERNEL_TILES * size), allocate(KERNEL_TOKENS * groups * ACTIVATION_GROUP)
    weights[:], x[:] = 0x24, 0x24
    sums, scratch = allocate(KERNEL_TOKENS * ROWS * 4), allocate(SCRATCH_BYTES)

    def timed(compiler: Compiler) -> Callable[[], float]:
        kernel = callable_at(compiler.address(f"tile_{name}"), 7)

        def run() -> float:
            start = time.perf_counter()
            for at in range(weights.ctypes.data, weights.ctypes.data + KERNEL_TILES * size, size):
                kernel(
                    at, KERNEL_COLUMNS, x.ctypes.data, 0, KERNEL_TOKENS, sums.ctypes.data,
                    scratch.ctypes.data,
                )  # fmt: skip
            return time.perf_counter() - start

        run()
        return run

    return choose({tiles: timed(each) for tiles, each in compilers.items()}, KERNEL_SECONDS)


def prefill_seconds(machine: Machine, num_tokens: int, chunk: int) -> float:
    """Of a prompt from an empty context, in steps of at most `chunk` tokens, without logits."""
    pages = np.arange(machine.num_pages, dtype=np.int32)
    ids = np.zeros(num_tokens, np.int32)
    start = time.perf_counter()
    for first in range(0, num_tokens, chunk):
        count = min(chunk, num_tokens - first)
        machine.step(ids[first : first + count], [Chunk(0, count, first, pages)], [])
    return time.perf_counter() - start


def decode_seconds(machine: Machine, num_steps: int, context: int) -> float:
    """Of a step of one token, the median of so many, behind a context of meaningless tokens."""
    pages = np.arange(machine.num_pages, dtype=np.int32)
    ids = np.zeros(1, np.int32)
    times = []
    for index in range(num_steps):
        start = time.perf_counter()
        machine.step(ids, [Chunk(0, 1, context + index, pages)], [0])
        times.append(time.perf_counter() - start)
    return statistics.median(times)
