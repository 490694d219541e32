"""What a change would bring, predicted before anything is changed.

`cyclewise whatif`, the profile's `whatif` and its advice come here. A change that the project can
make already is measured too, and both figures go to the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from cyclewise.clock import ledger
from cyclewise.clock.calibrate import calibrated, usual_bandwidth
from cyclewise.clock.changes import ACCEPTED, Case, Change, parse_change
from cyclewise.clock.limits import Limits
from cyclewise.clock.machines import Hardware
from cyclewise.clock.predict import Predictor, Times, View, prefill_shapes
from cyclewise.clock.run import ClockedRun, Settings
from cyclewise.clock.speculated import speculated_times
from cyclewise.clock.validate import measured_times
from cyclewise.machine.costs import BatchShape
from cyclewise.machine.host import available_cpus
from cyclewise.machine.machine import Machine
from cyclewise.machine.names import CacheKind

if TYPE_CHECKING:
    from rich.console import Console

    from cyclewise.machine.profile import MachineProfile
    from cyclewise.models import Model
    from cyclewise.text.tokenizer import Tokenizer

BAND = 0.12
"""Of a prediction, until `cyclewise validate` has said how large nine in ten of its errors are."""
ELSEWHERE_BAND = 0.5
"""Of a prediction for another machine: that it reaches the same share of its limits is assumed."""
LEAST_GAIN = 0.03
MOST_ADVICE = 3

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A predicted quantity and its band."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predicted times with their bands; seconds and tokens a second."""

    time_to_first_token: Estimate
    time_per_token: Estimate
    tokens_per_second: Estimate


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change, and what would come of it."""

    change: str
    meaning: str
    before: Times
    """Predicted too, so that the gain is of two predictions."""
    after: Outcome
    gain: float
    """Of tokens a second, all sequences together, as a share."""
    measured: Times | None
    watts: float | None
    batch: int
    """Sequences, after the change."""
    usual_speed: float
    """Tokens a second before it, predicted."""

    def as_dict(self, price_per_hour: float | None = None) -> dict[str, Any]:
        """Plain values for JSON."""
        speed = self.after.tokens_per_second.value
        measured = None if self.measured is None else {
            "time_to_first_token": self.measured.first_token,
            "time_per_token": self.measured.per_token,
            "tokens_per_second": self.measured.tokens_per_second(self.batch),
        }  # fmt: skip
        return {
            "change": self.change,
            "meaning": self.meaning,
            "before": {
                "time_to_first_token": self.before.first_token,
                "time_per_token": self.before.per_token,
            },
            **asdict(self.after),
            "gain_fraction": self.gain,
            "measured": measured,
            "tokens_per_joule": speed / self.watts if self.watts else None,
            "cost_per_million_tokens": (
                None if price_per_hour is None else price_per_hour / 3600 / speed * 1e6
            ),
            "provenance": "modelled",
        }


class WhatIfs:
    """Predicts changes to one model on this machine."""

    def __init__(
        self, model: Model, settings: Settings, machine: MachineProfile, progress: Progress
    ) -> None:
        self._model, self._machine, self._progress = model, machine, progress
        self._bandwidths: dict[int, float] = {}
        self._case = Case(View.of(model), settings, model.machine.num_threads)

    def ask(self, change: Change) -> WhatIf:
        """Predicts before and after."""
        changed = change.apply(self._case)
        before, after = self._times(self._case), self._times(changed)
        times = after[1]
        batch = changed.settings.batch
        speed, usual = (
            times.tokens_per_second(batch),
            before[1].tokens_per_second(self._case.settings.batch),
        )
        watts = changed.hardware.watts if changed.hardware else None
        return WhatIf(
            change.text, change.meaning, before[1], self._outcome(changed, after, batch),
            speed / usual - 1, None, watts, batch, usual,
        )  # fmt: skip

    def measure(self, change: Change, answer: WhatIf, tokenizer: Tokenizer) -> WhatIf:
        """Makes the change, measures it, and writes both to the ledger.

        Raises InvalidParameterError if the model's context is too short for it.
        """
        from cyclewise.clock.counter import open_counter

        changed = change.apply(self._case)
        self._progress(f"measuring {change.text}")
        num_layers = sum(part.name.endswith("ffn.down") for part in changed.view.parts)
        model = self._with_cache(changed.view.kv)
        program = model.program
        if num_layers < self._model.config.num_layers:
            program = program.prefix(num_layers)
        machine = Machine(program, changed.threads)
        try:
            clocked = replace(model, machine=machine)
            if changed.drafted:
                times = speculated_times(clocked, changed.settings, changed.drafted, ACCEPTED[1])
            else:
                with ClockedRun(clocked, tokenizer, open_counter()) as run:
                    turns = [measured_times(turn) for turn in run.turns(changed.settings)]
                times = Times(
                    median(turn.first_token for turn in turns),
                    median(turn.per_token for turn in turns),
                )
        finally:
            machine.close()
            if model is not self._model:
                model.close()
        self._progress("")
        settings = changed.settings
        ledger.append(
            [
                ledger.Entry(
                    self._model.path.name, self._machine.cpu, change.text, settings.prompt_tokens,
                    settings.generate_tokens, settings.batch, changed.threads, quantity,
                    told.value, told.low, told.high, found,
                )
                for quantity, told, found in (
                    ("time_to_first_token", answer.after.time_to_first_token, times.first_token),
                    ("time_per_token", answer.after.time_per_token, times.per_token),
                )
            ]
        )  # fmt: skip
        return replace(answer, measured=times)

    def _with_cache(self, kv: CacheKind) -> Model:
        """The model, loaded once more where its cache must hold something else."""
        from cyclewise.models import load_model

        model = self._model
        if kv == model.kv:
            return model
        threads, context = model.machine.num_threads, model.config.context_length
        return load_model(model.path, context=context, threads=threads, kv=kv)

    def _predictor(self, case: Case) -> Predictor:
        self._machine, costs = calibrated(
            self._machine, case.view.formats, case.threads, self._progress
        )
        return Predictor(costs, case.threads, self._bandwidth(case))

    def _bandwidth(self, case: Case) -> float:
        """Of so many threads, read now: once, so that before and after differ by the change."""
        if case.threads not in self._bandwidths:
            self._bandwidths[case.threads] = self._read_bandwidth(case.threads)
        here = self._bandwidths[case.threads]
        if case.bandwidth is None:
            return here
        return case.bandwidth if case.bandwidth >= 1000 else here * case.bandwidth

    def _read_bandwidth(self, num_threads: int) -> float:
        model, num_bytes = self._model, self._case.view.weight_bytes
        if num_threads == model.machine.num_threads:
            return usual_bandwidth(model.machine, num_bytes)
        machine = Machine(model.program, num_threads)
        try:
            return usual_bandwidth(machine, num_bytes)
        finally:
            machine.close()

    def _times(self, case: Case) -> tuple[Times, Times, Times]:
        """At the worst, as assumed, and at the best: they differ where a change assumes much."""
        predictor = self._predictor(case)
        if case.hardware is not None:
            elsewhere = self._elsewhere(case, case.hardware, predictor)
            return elsewhere, elsewhere, elsewhere
        times = predictor.times(case.view, case.settings)
        if not case.drafted:
            return times, times, times
        settings = case.settings
        middle = settings.prompt_tokens + (settings.generate_tokens - 1) // 2
        rows = case.drafted + 1
        shape = BatchShape(((rows, middle),) * settings.batch, rows * settings.batch)
        step = predictor.step(case.view, shape)
        low, assumed, high = (
            replace(times, per_token=step / expected_tokens(case.drafted, share))
            for share in ACCEPTED
        )
        return low, assumed, high

    def _elsewhere(self, case: Case, hardware: Hardware, predictor: Predictor) -> Times:
        """Each moment at the share of its limit that it reaches here; Python as fast as here."""
        program = self._model.program
        here = Limits(
            self._machine.roofs, program, case.threads, memory_bandwidth=self._bandwidth(case)
        )
        there = Limits(hardware.roofs, program, hardware.cores)

        def seconds(shape: BatchShape) -> float:
            total = predictor.outside(case.view, shape)
            for part in case.view.parts:
                limit = here.seconds(part.form, shape).seconds
                if limit:
                    slower = predictor.moment(case.view, part, shape) / limit
                    total += there.seconds(part.form, shape).seconds * max(1.0, slower)
            return total

        settings = case.settings
        middle = settings.prompt_tokens + (settings.generate_tokens - 1) // 2
        return Times(
            sum(seconds(shape) for shape in prefill_shapes(case.view, settings)),
            seconds(BatchShape(((1, middle),) * settings.batch, settings.batch)),
        )

    def _outcome(self, case: Case, times: tuple[Times, Times, Times], batch: int) -> Outcome:
        worst, assumed, best = times
        first_band, token_band = (
            [ELSEWHERE_BAND] * 2 if case.hardware else bands(self._machine)
        )  # fmt: skip

        def estimate(low: float, value: float, high: float, band: float) -> Estimate:
            return Estimate(value, low / (1 + band), high * (1 + band))

        token = estimate(best.per_token, assumed.per_token, worst.per_token, token_band)
        first = estimate(best.first_token, assumed.first_token, worst.first_token, first_band)
        speed = Estimate(batch / token.value, batch / token.high, batch / token.low)
        return Outcome(first, token, speed)


def bands(machine: MachineProfile) -> tuple[float, float]:
    """Relative bands of prefill and decode: what `cyclewise validate` found for nine in ten cases
    here, or BAND.
    """
    found = machine.predictor.get("bands")
    if isinstance(found, list) and len(found) == 2:
        sound = all(isinstance(band, float) and 0 < band < 1 for band in found)
        if sound:
            return found[0], found[1]
    return BAND, BAND


def expected_tokens(drafted: int, accepted: float) -> float:
    """Tokens that a step of speculation yields on average (Leviathan et al., 2023,
    arXiv:2211.17192).
    """
    return float((1 - accepted ** (drafted + 1)) / (1 - accepted))


def usual_questions(model: Model, settings: Settings) -> list[Change]:
    """What a profile asks by itself."""
    threads = model.machine.num_threads
    counts = [count for count in (threads // 2, available_cpus()) if count not in (0, threads)]
    texts = [f"threads={count}" for count in counts]
    texts += [f"batch={4 * settings.batch}", "q4_0", "q8_0", "kv=int8", "speculate", "bandwidth=2x"]
    return [parse_change(text) for text in texts]


def advice(answers: Sequence[WhatIf]) -> list[dict[str, Any]]:
    """At most three changes that the project can make, the largest gain first."""
    sentences = {
        "threads": "run with --threads {value}: {gain:+.0%} tokens/s",
        "batch": "decode {value} sequences in each step: {gain:+.0%} tokens/s, "
        "each {slower:.1f} x slower",
    }
    found: list[tuple[float, dict[str, Any]]] = []
    for answer in answers:
        name, _, value = answer.change.partition("=")
        gain = answer.gain
        if name in sentences and gain >= LEAST_GAIN:
            slower = answer.after.time_per_token.value / answer.before.per_token
            speed = answer.after.tokens_per_second
            usual = answer.usual_speed
            told = {
                "change": answer.change,
                "sentence": sentences[name].format(value=value, gain=gain, slower=slower),
                "gain_fraction": gain,
                "low": speed.low / usual - 1,
                "high": speed.high / usual - 1,
            }
            found.append((gain, told))
    found.sort(key=lambda pair: -pair[0])
    return [told for _, told in found[:MOST_ADVICE]]


def print_whatif(
    answers: Sequence[WhatIf], price_per_hour: float | None = None, console: Console | None = None
) -> None:
    """Prints what each change would bring."""
    from rich.console import Console

    console = console or Console(width=80, highlight=False)

    def say(name: str, first: str, token: str, speed: str, last: str = "", style: str = "") -> None:
        line = f"{name[:17]:18}{first:>20}{token:>22}{speed:>10}{last:>10}"
        console.print(line, style=style, no_wrap=True)

    say("change", "first token, ms", "per token, ms", "tokens/s", style="bold")
    before = answers[0].before
    first, token = (f"{seconds * 1e3:.3g}" for seconds in (before.first_token, before.per_token))
    say("as it is", first, token, f"{answers[0].usual_speed:.1f}")
    for answer in answers:
        after = answer.after
        say(
            answer.change, _range(after.time_to_first_token), _range(after.time_per_token),
            f"{after.tokens_per_second.value:.1f}", f"{answer.gain:+.0%}",
        )  # fmt: skip
        found = answer.measured
        if found is not None:
            error = after.time_per_token.value / found.per_token - 1
            say(
                "  measured", f"{found.first_token * 1e3:.3g}", f"{found.per_token * 1e3:.3g}",
                f"{found.tokens_per_second(answer.batch):.1f}", f"{error:+.0%} off", "green",
            )  # fmt: skip
        extra = answer.as_dict(price_per_hour)
        costs = []
        if extra["tokens_per_joule"]:
            costs.append(f"{extra['tokens_per_joule']:.2g} tokens a joule of its rated power")
        if extra["cost_per_million_tokens"] is not None:
            costs.append(f"{extra['cost_per_million_tokens']:.3g} for a million tokens")
        for line in wrap("; ".join([answer.meaning, *costs]), 76):
            console.print(f"  {line}", style="dim")


def _range(estimate: Estimate) -> str:
    """In milliseconds, with its band."""
    value, low, high = (
        f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"
        for seconds in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} ({low}-{high})"
