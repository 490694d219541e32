"""How far the predictor is off: settings that it has not seen, measured and predicted in turns.

Everything that was fitted comes from programs of SmolLM2's shape (`calibrate.py`); the settings
here are those of whichever model is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cyclewise.clock.calibrate import calibrated, usual_bandwidth
from cyclewise.clock.counter import open_counter
from cyclewise.clock.predict import Predictor, Times, View
from cyclewise.clock.roofs import thread_counts
from cyclewise.clock.run import ClockedRun, Settings, Turn
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.machine import Machine
from cyclewise.machine.profile import save_profile

if TYPE_CHECKING:
    from rich.console import Console

    from cyclewise.machine.profile import MachineProfile
    from cyclewise.models import Model
    from cyclewise.text.tokenizer import Tokenizer

GRID = ((40, 1), (200, 1), (700, 1), (1100, 1), (96, 2), (300, 2), (150, 4), (50, 6))
"""Prompt tokens and batch; the context of a decode begins with its prompt."""
ANSWER_TOKENS = 12
ROUNDS = 3
LEAST_BAND = 0.03

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Case:
    """A setting, measured and predicted: medians over the rounds."""

    phase: Phase
    prompt_tokens: int
    batch: int
    threads: int
    measured: float
    """Seconds: of the whole prefill, or of a step of decode."""
    predicted: float
    error: float
    """Predicted over measured, less one: median of the rounds, each with its own bandwidth."""


@dataclass(frozen=True, slots=True)
class Errors:
    """The errors of a phase. At a percentile stands the error, with its sign, of which so many have
    no larger magnitude.
    """

    cases: int
    mean: float
    p50: float
    p90: float
    p99: float
    median_absolute: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> Errors:
        """The summary of at least one error."""
        ordered = sorted(errors, key=abs)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(np.ceil(share * len(ordered))) - 1)]

        return cls(
            len(errors), fmean(errors), at(0.5), at(0.9), at(0.99),
            median(abs(error) for error in errors),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Validation:
    """What `cyclewise validate` found."""

    model: str
    cases: tuple[Case, ...]

    def errors(self, phase: Phase) -> Errors:
        """Of all cases of a phase."""
        return Errors.of([case.error for case in self.cases if case.phase == phase])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": "cyclewise.validation",
            "schema_version": 1,
            "model": self.model,
            **{phase: asdict(self.errors(phase)) for phase in PHASES},
            "cases": [asdict(case) for case in self.cases],
        }


def measured_times(turn: Turn) -> Times:
    """What a turn took."""
    rate = turn.calibration.ticks_per_second
    prefill, decode = (
        (phase.window[1] - phase.window[0]) / rate for phase in (turn.prefill, turn.decode)
    )
    return Times(prefill, decode / len(turn.decode.shapes))


def validate_model(
    model: Model, tokenizer: Tokenizer, machine: MachineProfile,
    progress: Callable[[str], None] = lambda _: None,
) -> Validation:  # fmt: skip
    """Measures and predicts what of the grid fits into the model's context; how large nine in ten
    of the errors are becomes the band of later predictions.

    Raises InvalidParameterError if nothing does.
    """
    context = model.config.context_length
    settings = [
        Settings(prompt, ANSWER_TOKENS, batch, 1)
        for prompt, batch in GRID
        if batch * (prompt + 2 * ANSWER_TOKENS) <= context
    ]
    if not settings:
        raise InvalidParameterError(f"a context of {context} is too short to validate in")
    counter, view = open_counter(), View.of(model)
    runs, predictors = {}, {}
    for threads in thread_counts(model.machine.num_threads):
        machine, costs = calibrated(machine, view.formats, threads, progress)
        narrowed = replace(model, machine=Machine(model.program, threads))
        runs[threads] = ClockedRun(narrowed, tokenizer, counter)
        predictors[threads] = costs
    keys = [(threads, setting) for threads in runs for setting in settings]
    found: dict[tuple[int, Settings], list[tuple[Times, Times]]] = {key: [] for key in keys}
    order = random.Random(0)
    try:
        for turn in range(ROUNDS * len(keys)):
            if turn % len(keys) == 0:
                order.shuffle(keys)
            progress(f"setting {turn + 1} of {ROUNDS * len(keys)}")
            threads, setting = keys[turn % len(keys)]
            run = runs[threads]
            bandwidth = usual_bandwidth(run.model.machine, view.weight_bytes)
            predictor = Predictor(predictors[threads], threads, bandwidth)
            (measured,) = run.turns(setting)
            pair = measured_times(measured), predictor.times(view, setting)
            found[threads, setting].append(pair)
    finally:
        for run in runs.values():
            run.close()
            run.model.machine.close()
        progress("")
    validation = Validation(
        model.path.name,
        tuple(
            _case(phase, setting, threads, pairs)
            for phase in PHASES
            for (threads, setting), pairs in found.items()
        ),
    )
    found_bands = [max(LEAST_BAND, abs(validation.errors(phase).p90)) for phase in PHASES]
    save_profile(replace(machine, predictor={**machine.predictor, "bands": found_bands}))
    return validation


def _case(
    phase: Phase, setting: Settings, threads: int, pairs: Sequence[tuple[Times, Times]]
) -> Case:
    name = "first_token" if phase == "prefill" else "per_token"
    values = [(getattr(measured, name), getattr(told, name)) for measured, told in pairs]
    return Case(
        phase, setting.prompt_tokens, setting.batch, threads,
        median(measured for measured, _ in values), median(told for _, told in values),
        median(told / measured - 1 for measured, told in values),
    )  # fmt: skip


def print_validation(validation: Validation, console: Console | None = None) -> None:
    """Prints the cases and their errors."""
    from rich.console import Console

    console = console or Console(width=80, highlight=False)
    console.print(
        f"{validation.model}: predicted against measured", style="bold", overflow="ellipsis"
    )
    console.print(
        f"{'phase':9}{'prompt':>7}{'batch':>7}{'threads':>9}{'measured':>13}{'predicted':>13}"
        f"{'error':>9}",
        style="bold",
    )
    for case in validation.cases:
        console.print(
            f"{case.phase:9}{case.prompt_tokens:>7}{case.batch:>7}{case.threads:>9}"
            f"{case.measured * 1e3:>10.2f} ms{case.predicted * 1e3:>10.2f} ms{case.error:>+9.1%}"
        )
    console.print(
        f"\n{'signed error':14}{'cases':>6}{'mean':>9}{'P50':>9}{'P90':>9}{'P99':>9}"
        f"{'median absolute':>19}",
        style="bold",
    )
    for phase in PHASES:
        errors = validation.errors(phase)
        console.print(
            f"{phase:14}{errors.cases:>6}{errors.mean:>+9.1%}{errors.p50:>+9.1%}"
            f"{errors.p90:>+9.1%}{errors.p99:>+9.1%}{errors.median_absolute:>19.1%}"
        )
