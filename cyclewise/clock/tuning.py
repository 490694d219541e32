"""The engine's choices, made by measuring: register tiles, prefill chunk, number of threads.

`machine_profile` (`roofs.py`) calls `measure_tuning` and keeps what comes out; the machine reads it
at its next start. What is measured is the engine itself, on a program of SmolLM2's shape with
weights of no meaning, so that nothing has to be fetched. Candidates take turns, and a default
gives way only to what is clearly better. `benchmarks/search.py` tries all combinations on real
models, and says how far from the best these choices are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.compiler import Compiler, host_compiler
from cyclewise.machine.kernels.matmul import matmul_unit
from cyclewise.machine.machine import Chunk, Machine
from cyclewise.machine.packing import Weights
from cyclewise.machine.profile import Tuning
from cyclewise.machine.program import Program, load_kernels
from cyclewise.models.config import Config
from cyclewise.models.llama import build
from cyclewise.weights.formats import FORMATS
from cyclewise.weights.gguf import GGUFFile, Tensor

SHAPE = Config(
    architecture="llama", name="SmolLM2-135M", num_layers=30, hidden_size=576, num_heads=9,
    num_kv_heads=3, head_dim=64, feed_forward=1536, vocab_size=49152, context_length=1024,
    trained_context=1024, norm_epsilon=1e-5, rope_dim=64, rope_base=1e5, rope_scaling=1.0,
)  # fmt: skip
FEED_FORWARD_FORMAT, FORMAT = "Q4_1", "Q8_0"
"""Of the feed-forward matrices, and of the others: codes of four bits and of eight."""
PREFILL_LAYERS = 6
"""Of the program, in which prefill is measured: one layer costs what another does."""
PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
"""The request whose time decides the number of threads."""
CHUNKS = (512, 256, 128)
"""The first is the default."""
TURNS, STAGE_SECONDS = 3, 1.2
"""Turns of each candidate at least, and more while there is time."""
DECODE_STEPS = 6
CLEARLY = 0.98
"""Of the default's time: from here on another choice is taken."""

C = TypeVar("C", bound=Hashable)

TILES: dict[str, tuple[tuple[int, ...], ...]] = {
    "avx512": ((12, 8, 4, 2, 1), (8, 4, 2, 1), (4, 2, 1)),
    "avx2": ((4, 2, 1), (2, 1)),
    "plain": ((4, 2, 1), (2, 1)),
}
"""Candidates for `Target.token_tiles`; the first is the target's default."""


def measure_tuning(progress: Callable[[str], None] = lambda _: None) -> Tuning:
    """Measures the candidates; takes seconds."""
    progress("choosing tiles, chunk and threads: preparing")
    most = available_cpus()
    program = meaningless_program(most)
    start = program.prefix(PREFILL_LAYERS)
    all_tiles = TILES[host_compiler().target.name]
    machines = {tiles: Machine(retiled(start, tiles), most) for tiles in all_tiles}

    progress("choosing the tiles of the matrix kernels")
    tiles = choose(
        {t: partial(prefill_seconds, m, PROMPT_TOKENS, CHUNKS[0]) for t, m in machines.items()}
    )
    progress("choosing the prefill chunk")
    chunk = choose({c: partial(prefill_seconds, machines[tiles], PROMPT_TOKENS, c) for c in CHUNKS})
    for machine in machines.values():
        machine.close()
    progress("choosing the number of threads")
    whole, part = retiled(program, tiles), retiled(start, tiles)
    pairs = {
        count: (Machine(whole, count), Machine(part, count)) for count in thread_candidates(most)
    }

    def request(count: int) -> float:
        decoder, prefiller = pairs[count]
        layers = prefill_seconds(prefiller, PROMPT_TOKENS, chunk)
        decoding = ANSWER_TOKENS * decode_seconds(decoder, DECODE_STEPS, PROMPT_TOKENS)
        return decoding + layers * SHAPE.num_layers / PREFILL_LAYERS

    threads = choose({count: partial(request, count) for count in pairs})
    for pair in pairs.values():
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


def choose(candidates: Mapping[C, Callable[[], float]]) -> C:
    """The candidate of the least time: the first, unless another is clearly better.

    Every turn measures all of them, and only ratios within a turn are compared.
    """
    names = list(candidates)
    if len(names) == 1:
        return names[0]
    turns: list[list[float]] = []
    end = time.perf_counter() + STAGE_SECONDS
    while len(turns) < TURNS or time.perf_counter() < end:
        turns.append([measure() for measure in candidates.values()])
    ratios = [
        statistics.median(turn[index] / turn[0] for turn in turns) for index in range(len(names))
    ]
    best = min(range(len(names)), key=lambda index: ratios[index])
    return names[best] if ratios[best] < CLEARLY else names[0]


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


def retiled(program: Program, token_tiles: tuple[int, ...]) -> Program:
    """The program with matrix kernels of other tiles, in the same memory: its records hold the
    addresses of kernels, and another compiler's take their place. Its results are the same bits.
    """
    ours = host_compiler()
    if token_tiles == ours.target.token_tiles:
        return program
    formats = sorted({matrix.format for m in program.moments for matrix in m.form.matrices})
    theirs = Compiler(replace(ours.target, token_tiles=token_tiles))
    theirs.load(matmul_unit(name) for name in formats)
    names = [f"tile_{name}" for name in formats]
    swaps = {ours.address(name): theirs.address(name) for name in names}
    moments = tuple(
        replace(
            moment, record=np.array([swaps.get(x, x) for x in moment.record.tolist()], np.int64)
        )
        for moment in program.moments
    )
    return replace(program, moments=moments, memory=(*program.memory, theirs))


class _MeaninglessFile(GGUFFile):
    """What a file of SmolLM2's shape would hold, with the same bytes everywhere: small scales."""

    def __init__(self) -> None:
        hidden, keys = SHAPE.hidden_size, SHAPE.num_kv_heads * SHAPE.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (SHAPE.vocab_size, hidden)}
        for layer in range(SHAPE.num_layers):
            parts: dict[str, tuple[int, ...]] = {
                "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (keys, hidden),
                "attn_v": (keys, hidden), "attn_output": (hidden, hidden), "ffn_norm": (hidden,),
                "ffn_gate": (SHAPE.feed_forward, hidden), "ffn_up": (SHAPE.feed_forward, hidden),
                "ffn_down": (hidden, SHAPE.feed_forward),
            }  # fmt: skip
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
        shapes["output_norm"] = (hidden,)
        self.tensors = {f"{name}.weight": _tensor(name, shape) for name, shape in shapes.items()}
        self._bytes = np.full(
            max(tensor.nbytes for tensor in self.tensors.values()), 0x24, np.uint8
        )
        self._ones = np.ones(hidden, np.float32).view(np.uint8)

    def data(self, name: str) -> NDArray[np.uint8]:
        tensor = self.tensors[name]
        source = self._ones if tensor.format.name == "F32" else self._bytes
        return source[: tensor.nbytes]

    def release(self, name: str) -> None:
        pass


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    matrix = FEED_FORWARD_FORMAT if ".ffn" in name else FORMAT
    format_ = FORMATS[matrix if len(shape) == 2 else "F32"]
    return Tensor(name, format_, shape, 0, prod(shape) // format_.block_size * format_.block_bytes)


def meaningless_program(num_threads: int) -> Program:
    """A program of SmolLM2's shape whose results mean nothing."""
    load_kernels([FEED_FORWARD_FORMAT, FORMAT])
    weights = Weights(_MeaninglessFile(), num_threads)
    try:
        return build(SHAPE, weights, num_threads)
    finally:
        weights.close()
