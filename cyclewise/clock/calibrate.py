"""What the kernels cost on this computer, for the predictor.

`predict.py` asks for the formats that it needs; what is measured is kept in the machine profile.
All of it comes from programs of SmolLM2's shape with weights of no meaning (`synthetic.py`), so no
other model takes part.

A matrix moment of R rows and C columns in one format, for M tokens on T threads, is taken to last

    fixed + R/16 / T * (per tile + C/32 * per group)

where *fixed* is what a moment costs whatever its size: handing over, and waiting for the last
thread. The three are fitted for each format, T and M to the five matrix moments of the shape, with
the weights displaced from the caches before each step where M is small.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, combinations
from math import inf
from statistics import median
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from cyclewise.clock.counter import open_counter
from cyclewise.clock.synthetic import SHAPE, synthetic_program
from cyclewise.engine.engine import Engine, Request
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.sampler import Sampler
from cyclewise.machine.kernels.blocks import GROUP, ROWS
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.layout import PAGE_TOKENS, QUERY_BLOCK, SPLIT
from cyclewise.machine.machine import Chunk, Machine
from cyclewise.machine.profile import MachineProfile, save_profile
from cyclewise.machine.program import Program
from cyclewise.machine.stamps import Stamps
from cyclewise.weights.formats import FORMATS

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512)
"""Tokens of a batch that are measured; between them the line that joins them."""
MOST_COLD = 16
"""Up to so many tokens the weights come from memory in the measurement, as they do in decode."""
NUM_LAYERS = 4
_ONE_PASS = 0.001
"""Seconds for which memory is read once."""
DECODE_POSITION = 64
CONTEXTS = (32, 256, 1000)
BASE_FORMAT = "Q8_0"
"""Of the matrices that a format of large blocks does not fit; and of everything that is no matrix
moment.
"""
FULL_FORMAT = "Q4_1"
"""Of a program with all layers, which displaces the caches between steps as a model does."""
LARGE_BLOCKS = 256
HOST_STEPS = 24
KINDS = ("qkv", "output", "gate_up", "down", "head")

ROUNDS = 3
PASSES = 9
"""Readings of memory whose median is taken for what is usual."""

MATRIX_COSTS = ("fixed", "tile", "group", "bandwidth")
ROW_KINDS = ("embed", "norm", "rope", "gate_up.quantize", "down.quantize")
OTHERS = {**dict.fromkeys(ROW_KINDS, len(COUNTS)), "attend": 4, "host": 3}

Progress = Callable[[str], None]
Costs = dict[str, dict[str, list[float]]]
"""Of one number of threads: by format what `matrix_costs` gives, and `others`."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a batch, as it was measured: means over repeats, since a run is a sum of steps."""

    moments: dict[str, float]
    """Seconds from a moment's start until it was over, by kind, mean over the layers."""
    work: dict[str, float]
    """Seconds of all threads' work on it."""
    bandwidth: float
    """Bytes a second that were read from memory right before; 0: not asked."""


class Bench:
    """Clocked steps of a synthetic program."""

    def __init__(self, program: Program, num_threads: int) -> None:
        self.machine = Machine(program, num_threads)
        moments = program.moments
        self._kinds = [kind_of(moment.name) for moment in moments]
        self._stamps = Stamps(len(moments), num_threads, HOST_STEPS)
        self.machine.clock(self._stamps)
        self._counter = open_counter()
        for memory in (
            *program.memory,
            program.cache.pages.reshape(-1),
        ):  # a page that was never written is not in memory
            if isinstance(memory, np.ndarray) and memory.dtype == np.uint8:
                memory[::4096] = memory[::4096]

    def close(self) -> None:
        self.machine.close()

    def step(
        self, batch: Sequence[tuple[int, int]], num_logits: int, repeats: int, cold: bool
    ) -> Step:
        """`batch`: (tokens, position of the first) of each chunk; `cold`: memory is read first, so
        that nothing of the program is in the caches.
        """
        starts = list(accumulate((count for count, _ in batch), initial=0))
        page, chunks = 0, []
        for start, (count, position) in zip(starts, batch, strict=False):
            needed = -(-(position + count) // PAGE_TOKENS)
            pages = np.arange(page, page + needed, dtype=np.int32) % self.machine.num_pages
            chunks.append(Chunk(start, count, position, pages))
            page += needed
        ends = [chunk.start + chunk.count - 1 for chunk in chunks][:num_logits]
        token_ids = (np.arange(starts[-1]) * 7919 % SHAPE.vocab_size).astype(np.int32)
        self.machine.step(token_ids, chunks, ends)
        self.clear()
        bandwidths = []
        for _ in range(repeats):
            bandwidths.append(self.machine.read_bandwidth(_ONE_PASS) if cold else 0.0)
            self.machine.step(token_ids, chunks, ends)
        self.machine.settle()
        return self._measured(median(bandwidths))

    def _measured(self, bandwidth: float) -> Step:
        rate = self._counter.ticks_per_second
        durations = np.diff(self._stamps.ticks[:, 0, :, 1], axis=1).mean(axis=0) / rate
        worked = self._stamps.spent()[:, :, :, 0].sum(axis=1).mean(axis=0) / rate
        return Step(_means(self._kinds, durations), _means(self._kinds, worked), bandwidth)

    def outside(self) -> float:
        """Seconds from the end of one step's moments to the start of the next one's."""
        self.machine.settle()
        ticks = self._stamps.ticks[:, 0]
        gaps = ticks[1:, 0, 0] - ticks[:-1, -1, 1]
        return float(np.median(gaps)) / self._counter.ticks_per_second

    def clear(self) -> None:
        """Forgets the steps so far."""
        self.machine.settle()
        self._stamps.clear()


def usual_bandwidth(machine: Machine, num_bytes: int) -> float:
    """Bytes a second that a machine's threads read now from a buffer of about `num_bytes`: the
    median of single passes, as `Bench.step` reads it too. The best of several, which is a roof, is
    what several threads reach seldom.
    """
    machine.read_bandwidth(_ONE_PASS, num_bytes)  # makes the buffer
    return median(machine.read_bandwidth(_ONE_PASS, num_bytes) for _ in range(PASSES))


def kind_of(name: str) -> str:
    """What a moment is, in whichever layer: `qkv`, `down`, `norm`, `attend`, `quantize`, `head`."""
    if name == "output":
        return "head"
    last = name.split(".")[-1]
    return f"{name.split('.')[-2]}.quantize" if last == "quantize" else last


def _means(kinds: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    gathered: dict[str, list[float]] = {}
    for kind, value in zip(kinds, values.tolist(), strict=True):
        gathered.setdefault(kind, []).append(value)
    return {kind: sum(found) / len(found) for kind, found in gathered.items()}


def batch_of(count: int) -> tuple[list[tuple[int, int]], int]:
    """A batch of so many tokens and its rows of logits: sequences that decode, if few; a prompt."""
    if count <= MOST_COLD:
        return [(1, DECODE_POSITION)] * count, count
    return [(count, 0)], 1


def calibrated(
    machine: MachineProfile, formats: Iterable[str], num_threads: int, progress: Progress
) -> tuple[MachineProfile, Costs]:
    """The costs of these formats on so many threads: those that the machine profile keeps, and
    those that were missing, measured and kept there.

    Kernels that were changed are measured again.
    """
    key = host_compiler().key
    kept = machine.predictor
    if kept.get("kernels") != key:
        kept = {"kernels": key}
    names = [f"{num_threads}/others", *(f"{num_threads}/{name}" for name in formats)]
    missing = [name for name in names if not _is_sound(kept.get(name), name)]
    for i, name in enumerate(missing):
        progress(f"measuring what kernels cost here: {i + 1} of {len(missing)}")
        which = name.split("/")[1]
        measure = other_costs if which == "others" else partial(matrix_costs, which)
        kept = {**kept, name: measure(num_threads)}
        machine = replace(machine, predictor=kept)
        save_profile(machine)
    progress("")
    costs: Costs = {name.split("/")[1]: kept[name] for name in names}
    return machine, costs


def _is_sound(costs: object, name: str) -> bool:
    """A file is not trusted: whether everything is there, and numbers."""
    lengths = OTHERS if name.endswith("/others") else dict.fromkeys(MATRIX_COSTS, len(COUNTS))
    return isinstance(costs, dict) and all(
        isinstance(costs.get(kind), list)
        and len(costs[kind]) == length
        and all(isinstance(value, float | int) and 0 <= value < inf for value in costs[kind])
        for kind, length in lengths.items()
    )


def measure_steps(program: Program, num_threads: int) -> list[Step]:
    """A step of each of COUNTS, in ROUNDS: on a computer shared with others a second may be slow,
    but rarely most of them.
    """
    bench = Bench(program, num_threads)
    found: list[list[Step]] = [[] for _ in COUNTS]
    try:
        for _ in range(ROUNDS):
            for count, steps in zip(COUNTS, found, strict=True):
                cold = count <= MOST_COLD
                steps.append(bench.step(*batch_of(count), 5 if cold else 1, cold))
    finally:
        bench.close()
    return [_middle(steps) for steps in found]


def _middle(steps: Sequence[Step]) -> Step:
    """The medians of the same step, measured several times."""

    def medians(times: Sequence[dict[str, float]]) -> dict[str, float]:
        return {kind: median(each[kind] for each in times) for kind in times[0]}

    return Step(
        medians([step.moments for step in steps]), medians([step.work for step in steps]),
        median(step.bandwidth for step in steps),
    )  # fmt: skip


def matrix_costs(format_name: str, num_threads: int) -> dict[str, list[float]]:
    """`fixed`, `tile`, `group` in seconds and `bandwidth`, a value for each of COUNTS."""
    large = FORMATS[format_name].block_size >= LARGE_BLOCKS
    if large:
        program = synthetic_program(
            num_threads, BASE_FORMAT, num_layers=NUM_LAYERS, ffn_down=format_name
        )
    else:
        program = synthetic_program(num_threads, format_name, num_layers=NUM_LAYERS)
    shapes = _tiles_and_groups()
    costs: dict[str, list[float]] = {name: [] for name in MATRIX_COSTS}
    for count, step in zip(COUNTS, measure_steps(program, num_threads), strict=True):
        kinds = ["down"] if large else [k for k in KINDS if k != "head" or count <= MOST_COLD]
        fixed, tile, group = _fit(
            [(shapes[kind], step.moments[kind]) for kind in kinds], num_threads
        )
        for name, value in zip(costs, (fixed, tile, group, step.bandwidth), strict=True):
            costs[name].append(value)
    return costs


def _tiles_and_groups() -> dict[str, tuple[int, int]]:
    """Tiles of 16 rows and groups of 32 columns of SmolLM2's matrix moments."""
    queries = SHAPE.num_heads * SHAPE.head_dim
    rows = {
        "qkv": queries + 2 * SHAPE.num_kv_heads * SHAPE.head_dim, "output": SHAPE.hidden_size,
        "gate_up": 2 * SHAPE.feed_forward, "down": SHAPE.hidden_size, "head": SHAPE.vocab_size,
    }  # fmt: skip
    return {
        kind: (
            count // ROWS,
            (SHAPE.feed_forward if kind == "down" else SHAPE.hidden_size) // GROUP,
        )
        for kind, count in rows.items()
    }


def _fit(
    measured: Sequence[tuple[tuple[int, int], float]], num_threads: int
) -> tuple[float, float, float]:
    """Fixed, per tile and per group, none negative, to the least relative errors."""
    rows = np.array(
        [
            [1.0, tiles / num_threads, tiles * groups / num_threads]
            for (tiles, groups), _ in measured
        ]
    )
    seconds = np.array([value for _, value in measured])
    design = rows / seconds[:, None]
    if len(measured) == 1:
        return 0.0, 0.0, float(1 / design[0, 2])
    fixed, tile, group = nonnegative(design).tolist()
    return fixed, tile, group


def nonnegative(design: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients of the columns, none negative, whose sum comes closest to 1 in every row: least
    squares of relative errors, over all choices of columns.
    """
    num_rows, num_columns = design.shape
    best, error = np.zeros(num_columns), np.inf
    for size in range(1, min(num_rows, num_columns) + 1):
        for chosen in combinations(range(num_columns), size):
            part, *_ = np.linalg.lstsq(design[:, chosen], np.ones(num_rows), rcond=None)
            left = float(np.square(design[:, chosen] @ part - 1).sum())
            if (part >= 0).all() and left < error - 1e-12:
                best, error = np.zeros(num_columns), left
                best[list(chosen)] = part
    return best


def other_costs(num_threads: int) -> dict[str, list[float]]:
    """What is no matrix: seconds of norms, quantizing, RoPE and embedding for each of COUNTS; of
    attention for each feature of `attention_features`, and beyond them; and `host_costs`.
    """
    program = synthetic_program(num_threads, BASE_FORMAT, num_layers=NUM_LAYERS)
    steps = measure_steps(program, num_threads)
    costs = {kind: [step.moments[kind] for step in steps] for kind in ROW_KINDS}
    costs["attend"] = _attention_costs(program, num_threads)
    costs["host"] = host_costs(num_threads)
    return costs


def attention_features(
    batch: Sequence[tuple[int, int]], num_heads: int, num_kv_heads: int, head_dim: int,
    window: int | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """(blocks, 3): of each block of queries and one key-value head, the pages' numbers that become
    float32, the multiply-adds with them, and 1. Pages that lie before the `window` are not read.
    """
    rows = []
    group = num_heads // num_kv_heads
    for count, position in batch:
        for first in range(0, count, QUERY_BLOCK):
            size = min(QUERY_BLOCK, count - first)
            oldest = 0 if window is None else max(0, position + first - window + 1)
            num_pages = -(-(position + first + size) // PAGE_TOKENS) - oldest // PAGE_TOKENS
            keys = num_pages * PAGE_TOKENS
            rows.append((keys * head_dim, keys * head_dim * group * size, 1.0))
    return np.array(rows, np.float64)


def attention_tiles(batch: Sequence[tuple[int, int]], num_kv_heads: int) -> int:
    """Parts that threads can share: splits of the keys of each block, and key-value heads."""
    ends = (
        position + min(first + QUERY_BLOCK, count)
        for count, position in batch
        for first in range(0, count, QUERY_BLOCK)
    )
    return num_kv_heads * sum(-(-end // SPLIT) for end in ends)


def _attention_costs(program: Program, num_threads: int) -> list[float]:
    """Seconds of a thread for each of the features, and of a moment beyond its work."""
    bench = Bench(program, num_threads)
    rows, works, gaps = [], [], []
    try:
        for context in CONTEXTS:
            for count in (1, 2, 4, 16, 128):
                if context < count:
                    continue
                batch = [(count, context - count)]
                step = bench.step(batch, 1, 7 if count <= 16 else 3, count <= 16)
                features = attention_features(
                    batch, SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
                )
                tiles = attention_tiles(batch, SHAPE.num_kv_heads)
                rows.append(features.sum(axis=0) * SHAPE.num_kv_heads)
                works.append(step.work["attend"])
                share = -(-tiles // num_threads) / tiles
                gaps.append(step.moments["attend"] - step.work["attend"] * share)
    finally:
        bench.close()
    found = nonnegative(np.array(rows) / np.array(works)[:, None])
    return [*found.tolist(), max(0.0, median(gaps))]


def host_costs(num_threads: int) -> list[float]:
    """Seconds outside the moments: of any step, of each sequence, and of each logit of each."""
    program = synthetic_program(num_threads, FULL_FORMAT)
    bench = Bench(program, num_threads)
    config = SimpleNamespace(context_length=SHAPE.context_length, vocab_size=SHAPE.vocab_size)
    engine = Engine(SimpleNamespace(config=config, machine=bench.machine))
    # The program's own logits are all alike, which no model's are.
    logits = np.random.default_rng(0).standard_normal((8, SHAPE.vocab_size)).astype(np.float32)
    outside: dict[int, float] = {}
    draws: list[float] = []
    try:
        for count in (1, 4):
            sequences = [engine.new_sequence() for _ in range(count)]
            samplers = [Sampler(SamplingParams(seed=i)) for i in range(count)]
            for sequence in sequences:
                sequence.reserve(HOST_STEPS)
            bench.clear()
            for step in range(HOST_STEPS):
                requests = [Request(s, np.array([1], np.int32), "last") for s in sequences]
                engine.step(requests)
                start = time.perf_counter()
                for i, sampler in enumerate(samplers):
                    sampler.sample(logits[(4 * step + i) % len(logits)], [1, 2])
                draws.append((time.perf_counter() - start) / count)
            outside[count] = bench.outside()
            for sequence in sequences:
                engine.free(sequence)
    finally:
        bench.close()
    each = max(0.0, (outside[4] - outside[1]) / 3)
    per_logit = min(median(draws), each) * _growing_share() / SHAPE.vocab_size
    return [max(0.0, outside[1] - each), each - per_logit * SHAPE.vocab_size, per_logit]


def _growing_share() -> float:
    """Of a draw from SmolLM2's vocabulary, what grows with it."""
    sampler, seconds = Sampler(SamplingParams(seed=0)), []
    for size in (SHAPE.vocab_size, 4 * SHAPE.vocab_size):
        logits = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            sampler.sample(logits, [1, 2])
            times.append(time.perf_counter() - start)
        seconds.append(median(times))
    return min(1.0, max(0.0, (seconds[1] - seconds[0]) / 3 / seconds[0]))
