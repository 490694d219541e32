"""How cycles grow with the prompt, the context, the batch, the threads and the layers.

A loaded model comes in, from `cyclewise complexity` and `profile`; a `Growth` goes out: for every
moment, its layers together, and for their total, a law (`fit.py`) with the points that it was
fitted to and those that were held out to judge it. The machine is driven without the engine: what
grows is the program, not the scheduler. The layers are varied by running a prefix of the program.

On a shared machine the speed changes while one measures, and others only ever add time. So the
points of a variable are visited in rounds, in an order that is drawn anew each round, fitted and
held-out ones alike, until more than one visit of each went undisturbed; the median of those counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cyclewise.bench.host import busy_seconds
from cyclewise.clock.fit import (
    CONSTANT,
    GROWING,
    INVERSE,
    LINEAR,
    MIN_POINTS,
    QUADRATIC,
    Floats,
    Law,
    Term,
    combined,
    fit,
    fit_terms,
    median_error,
)
from cyclewise.clock.growth import TOTAL, Growth, MomentLaw, Phase, Point, Variable
from cyclewise.clock.steps import Batch, ClockedMachine, decode_step, prefill_steps, touch_cache
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.kernels.layout import PAGE_TOKENS
from cyclewise.machine.machine import Machine
from cyclewise.machine.names import collapsed
from cyclewise.machine.program import Program

if TYPE_CHECKING:
    from cyclewise.clock.counter import Calibration, Counter
    from cyclewise.models import Model

Progress = Callable[[str], None]

VARIABLES: tuple[Variable, ...] = ("prompt_tokens", "context", "batch", "threads", "layers")
SYMBOLS: dict[Variable, str] = {
    "prompt_tokens": "n", "context": "context", "batch": "batch", "threads": "threads",
    "layers": "layers",
}  # fmt: skip

ROUNDS = 3
CHEAPER = 2
"""Rounds of another variable for each round of prompts, which take much longer."""
DECODE_STEPS = 4
"""Steps of decode that count in a visit; one before them warms up."""
VISIT_TOKENS = 256
"""Shorter prompts are run several times a visit, until they have about that many tokens."""
RETRIES = 2
"""Rounds more, for each that was asked for, in which points are visited whose samples disagree."""
_WINDOW: dict[Phase, float] = {"prefill": 0.1, "decode": 0.3}
"""A sample is undisturbed if it took at most so much longer than the quickest. Prefill computes and
repeats closely; decode waits for memory, whose speed varies.
"""
SHORTEST, LONGEST = 64, 2048
"""Prompts, in tokens."""
DEEPEST = 4095
"""Tokens that a token of decode finds in the cache, at most."""
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40)
BATCH_CONTEXT = 63
FIXED_PROMPT, FIXED_CONTEXT = 128, 256
"""Where another variable grows."""
QUICK_SECONDS = 2.2
"""Of prefill, in `measure_growth_quickly`."""
QUICK_SHORTEST, QUICK_LONGEST = 32, 512
QUICK_POINTS = 9
QUICK_ROUNDS = 2

FREE_CHOICE = 8
"""Fitted points from which a law may have any term; fewer choose from the expected ones."""
_EXPECTED: dict[Variable, tuple[Term, ...]] = {
    "prompt_tokens": (LINEAR, QUADRATIC), "context": (LINEAR,), "batch": (LINEAR,),
    "threads": (INVERSE,), "layers": (LINEAR,),
}  # fmt: skip


@dataclass(slots=True)
class _Visited:
    """A point to visit, and what was measured there so far."""

    phase: Phase
    x: int
    held_out: bool
    clocked: ClockedMachine
    batches: list[Batch]
    """The steps of a prompt, or one step of decode."""
    runs: int
    """Samples of a visit."""
    samples: list[Floats] = field(default_factory=list)
    """Cycles (groups + 1)."""

    def visit(self) -> Floats:
        """(samples, groups + 1): ticks."""
        if self.phase == "decode":
            return self.clocked.run(self.batches * (self.runs + 1))[1:]
        return np.stack([self.clocked.run(self.batches).sum(0) for _ in range(self.runs)])

    @property
    def undisturbed(self) -> Floats:
        """(samples, groups + 1): cycles of the samples in which nobody else took the cores."""
        samples = np.stack(self.samples)
        total = samples[:, -1]
        quick = total <= (1 + _WINDOW[self.phase]) * total.min()
        return np.asarray(samples[quick])

    @property
    def agrees(self) -> bool:
        """More than one visit's worth of samples went undisturbed."""
        return len(self.undisturbed) > self.runs


def measure_growth(
    model: Model,
    variables: Sequence[Variable] = VARIABLES,
    rounds: int = ROUNDS,
    progress: Progress = lambda _: None,
) -> Growth:
    """Measures a model and fits the laws; a minute or two for a model of half a billion weights.

    What lies in the KV cache is overwritten: no sequence of the model may be in use.

    Raises:
        InvalidParameterError: `rounds` is below 1.
        ClockError: this machine's ticks are not time.
    """
    if rounds < 1:
        raise InvalidParameterError(f"rounds must be at least 1, not {rounds}.")
    with _Measurement(model, progress) as measurement:
        for variable in variables:
            count = rounds if variable == "prompt_tokens" else CHEAPER * rounds
            measurement.grow(variable, _values(variable, model), count, RETRIES * count)
        return measurement.growth()


def measure_growth_quickly(model: Model, progress: Progress = lambda _: None) -> Growth:
    """Prompt tokens and context alone, in a few seconds: prompts are as long as that allows.
    Otherwise as `measure_growth`.
    """
    context = model.program.context_length
    with _Measurement(model, progress) as measurement:
        prompts = _spread(QUICK_SHORTEST, min(QUICK_LONGEST, context), QUICK_POINTS)
        tokens = measurement.tokens_in(QUICK_SECONDS)
        while prompts[-1] > 4 * QUICK_SHORTEST and sum(prompts) > tokens:
            prompts = _spread(QUICK_SHORTEST, int(prompts[-1] * 0.95), QUICK_POINTS)
        rounds = min(QUICK_ROUNDS, max(1, tokens // sum(prompts)))
        measurement.grow("prompt_tokens", prompts, rounds, retries=0, visit_tokens=1)
        contexts = _steps(SHORTEST, min(DEEPEST, context - 1), QUICK_POINTS)
        measurement.grow("context", contexts, QUICK_ROUNDS, retries=0)
        return measurement.growth()


class _Measurement:
    """Machines under the clock, closed or set free in the end."""

    def __init__(self, model: Model, progress: Progress) -> None:
        from cyclewise.clock.counter import open_counter

        self._counter: Counter = open_counter()
        self._program: Program = model.program
        self._machine: Machine = model.machine
        self._progress = progress
        kinds = {collapsed(moment.name): moment.kind for moment in self._program.moments}
        self._kinds: dict[str, str] = {**kinds, TOTAL: TOTAL}
        self._clocked: dict[tuple[int, int], ClockedMachine] = {}
        self._hertz: list[float] = []
        self._counts_cycles = self._calibrate().counts_cycles
        self._laws: list[MomentLaw] = []
        self._left_out: list[str] = []
        self._stack = ExitStack()
        self._start, self._others_start = time.perf_counter(), _others_seconds()
        touch_cache(self._program, DEEPEST + 1)

    def __enter__(self) -> _Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._progress("")

    def growth(self) -> Growth:
        return Growth(
            tuple(self._laws),
            float(np.median(self._hertz)),
            self._counts_cycles,
            tuple(self._left_out),
            self._others_cpu_share(),
        )

    def _others_cpu_share(self) -> float | None:
        others = _others_seconds()
        if others is None or self._others_start is None:
            return None
        available = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return max(0.0, (others - self._others_start) / available)

    def _calibrate(self) -> Calibration:
        calibration = self._counter.calibrate(self._machine.threads)
        self._hertz.append(calibration.core_hertz)
        return calibration

    def tokens_in(self, seconds: float) -> int:
        """Tokens of short prompts that run in about that time."""
        batches = prefill_steps(self._program, QUICK_SHORTEST, self._machine.max_batch_tokens)
        clocked = self._at(self._machine.num_threads, self._program.num_layers)
        ticks = min(float(clocked.run(batches)[:, -1].sum()) for _ in range(3))
        return int(QUICK_SHORTEST * seconds * self._counter.ticks_per_second / ticks)

    def grow(
        self,
        variable: Variable,
        values: Sequence[int],
        rounds: int,
        retries: int,
        visit_tokens: int = VISIT_TOKENS,
    ) -> None:
        """Measures one variable at these values, and fits its laws."""
        name = variable.replace("_", " ")
        if len(values) < 2:
            self._left_out.append(f"The {name} cannot grow here.")
            return
        points = self._points(variable, values, visit_tokens)
        for index in range(rounds):
            self._progress(f"{name}: round {index + 1} of {rounds}")
            self._round(points, index)
        for index in range(retries):
            unclear = [point for point in points if not point.agrees]
            if not unclear:
                break
            self._progress(f"{name}: {len(unclear)} of {len(points)} points again")
            self._round(unclear, rounds + index)
        for phase in ("prefill", "decode"):
            self._laws += self._fit(variable, [p for p in points if p.phase == phase])

    def _round(self, points: Sequence[_Visited], seed: int) -> None:
        """Visits each point once."""
        visits, worth = [], []
        for at in np.random.default_rng(seed).permutation(len(points)).tolist():
            worth.append(self._calibrate().cycles_per_tick)
            visits.append((points[at], points[at].visit()))
        for point, ticks in visits:
            point.samples += list(ticks * float(np.median(worth)))

    def _at(self, num_threads: int, num_layers: int) -> ClockedMachine:
        """The machine of so many threads on a prefix of so many layers."""
        key = (num_threads, num_layers)
        if key not in self._clocked:
            whole = num_layers == self._program.num_layers
            if whole and num_threads == self._machine.num_threads:
                machine = self._machine
                self._stack.callback(machine.clock, None)
            else:
                program = self._program if whole else self._program.prefix(num_layers)
                machine = Machine(program, num_threads)
                self._stack.callback(machine.close)
            steps = max(DECODE_STEPS + 1, -(-LONGEST // machine.max_batch_tokens))
            self._clocked[key] = ClockedMachine(machine, [*self._kinds][:-1], steps)
        return self._clocked[key]

    def _points(
        self, variable: Variable, values: Sequence[int], visit_tokens: int
    ) -> list[_Visited]:
        program, chunk = self._program, self._machine.max_batch_tokens
        threads, layers = self._machine.num_threads, program.num_layers
        prompt = min(FIXED_PROMPT, program.context_length)
        context = min(FIXED_CONTEXT, program.context_length - 1)
        points = []
        for x, held_out in zip(values, _held_out(values), strict=True):
            at = self._at(
                x if variable == "threads" else threads, x if variable == "layers" else layers
            )
            if variable in ("prompt_tokens", "threads", "layers"):
                tokens = x if variable == "prompt_tokens" else prompt
                batches = prefill_steps(program, tokens, chunk)
                runs = max(1, visit_tokens // tokens)
                points.append(_Visited("prefill", x, held_out, at, batches, runs))
            if variable != "prompt_tokens":
                depth = {"context": x, "batch": BATCH_CONTEXT}.get(variable, context)
                batch = decode_step(program, depth, x if variable == "batch" else 1)
                points.append(_Visited("decode", x, held_out, at, [batch], DECODE_STEPS))
        return points

    def _fit(self, variable: Variable, points: Sequence[_Visited]) -> Iterator[MomentLaw]:
        if not points:
            return
        x = np.array([point.x for point in points])
        samples = [np.median(point.undisturbed, axis=0) for point in points]
        cycles = np.maximum(samples, 1)  # a moment may be shorter than a tick
        held_out = np.array([point.held_out for point in points])
        fitted = x[~held_out]
        laws = [_law(variable, fitted, y) for y in cycles[~held_out].T]
        if len(fitted) < FREE_CHOICE:
            # Few points tell the moments' laws apart better than the parts of their sum.
            laws[-1] = combined(laws[:-1], SYMBOLS[variable])
        for (name, kind), law, y in zip(self._kinds.items(), laws, cycles.T, strict=True):
            error = median_error(law, x[held_out], y[held_out]) if held_out.any() else None
            rows = zip(x.tolist(), y.tolist(), held_out.tolist(), strict=True)
            measured = tuple(Point(*row) for row in rows)
            yield MomentLaw(name, kind, points[0].phase, variable, law, measured, error)


def _others_seconds() -> float | None:
    """Processor time that was used by none of ours."""
    busy = busy_seconds()
    return None if busy is None else busy - time.process_time()


def _law(variable: Variable, x: NDArray[np.int64], y: Floats) -> Law:
    symbol, expected = SYMBOLS[variable], _EXPECTED[variable]
    if len(x) < MIN_POINTS:
        return fit_terms(x, y, (CONSTANT, *expected)[: len(x)], symbol)
    return fit(x, y, symbol, expected if len(x) < FREE_CHOICE or INVERSE in expected else GROWING)


def _values(variable: Variable, model: Model) -> list[int]:
    """Where a variable is measured, ascending."""
    program: Program = model.program
    match variable:
        case "prompt_tokens":
            return _spread(SHORTEST, min(LONGEST, program.context_length), 15)
        case "context":
            return _steps(SHORTEST, min(DEEPEST, program.context_length - 1), 15)
        case "batch":
            pages = -(-(BATCH_CONTEXT + 1) // PAGE_TOKENS)
            fitting = program.num_pages // pages if program.context_length > BATCH_CONTEXT else 0
            return [size for size in BATCHES if size <= fitting]
        case "threads":
            return _spread(1, model.machine.num_threads, 9)
        case "layers":
            # Fewer layers would lie in the caches, where the whole program does not.
            return _steps(-(-program.num_layers // 4), program.num_layers, 11)


def _spread(low: int, high: int, count: int) -> list[int]:
    """Values whose neighbours have about one ratio; one where there is no room for more."""
    values = np.geomspace(min(low, high), high, count).round()
    return [int(value) for value in np.unique(values)]


def _steps(low: int, high: int, count: int) -> list[int]:
    """Values whose neighbours have about one difference; one where there is no room for more."""
    values = np.linspace(min(low, high), high, count).round()
    return [int(value) for value in np.unique(values)]


def _held_out(values: Sequence[int]) -> list[bool]:
    """Every other value, if enough are left; the first and the last never."""
    count = len(values)
    if count - (count - 1) // 2 < MIN_POINTS:
        return [False] * count
    return [index % 2 == 1 and index < count - 1 for index in range(count)]
