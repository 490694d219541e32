"""Ticks become a profile: cycles, operations, bytes and limits of every moment.

Turns of a `ClockedRun` come in, with the roofs of this machine; a plain dictionary goes out, which
`--json` prints as it is, and which the report, the pictures and `diff` read. All cycles are core
cycles and means over the threads, so that within a phase

    sum of the moments' (cycles + waiting_cycles) + unaccounted = wall cycles.

Decode is counted a step (one token of each sequence), prefill a run (all prompts). The figures are
those of the turn whose duration is the median; `samples` has all turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cyclewise.bench.bench import Spread
from cyclewise.bench.host import describe_host
from cyclewise.clock.account import Ledger, keep_books
from cyclewise.clock.counter import open_counter
from cyclewise.clock.limits import Limits
from cyclewise.clock.run import STAGES, ClockedRun, Phase, Settings, Turn
from cyclewise.machine.costs import Cost, cost

if TYPE_CHECKING:
    from cyclewise.machine.profile import MachineProfile, Roofs
    from cyclewise.machine.program import Program
    from cyclewise.models import Model

SCHEMA_VERSION = 1
OUTLIER_DEVIATIONS = 5.0
"""A token is an outlier that many deviations (1.48 times the median one) above the median."""

PROVENANCE = {
    "cycles": "derived: time-stamp ticks, measured, times the core's cycles per tick, measured "
    "right before and after",
    "operations": "derived: closed forms of the program",
    "bytes": "derived: closed forms of the program",
    "limit_cycles": "modelled: closed forms divided by the measured roofs",
    "roofs": "measured on this machine",
    "growth": "measured; the laws are fitted",
    "whatif": "modelled",
}


@dataclass(frozen=True, slots=True)
class _View:
    """A phase of one turn, in cycles."""

    phase: Phase
    ledger: Ledger
    per_tick: float
    """Core cycles of a tick."""
    units: int
    """Steps of a decode, 1 for a prefill."""

    @property
    def wall(self) -> float:
        return (self.phase.window[1] - self.phase.window[0]) * self.per_tick

    def moments(self) -> tuple[list[float], list[float]]:
        """Cycles and waiting cycles of each moment, a unit, means over threads."""
        scale = self.per_tick / self.units
        work = self.ledger.work.sum(axis=0).mean(axis=0) * scale
        waiting = self.ledger.waiting.sum(axis=0).mean(axis=0) * scale
        return work.tolist(), waiting.tolist()

    def stage(self, name: str) -> tuple[float, float]:
        """Cycles of a stage on the calling thread, and of the others that wait for it."""
        ticks = sum(span.end - span.start for span in self.phase.spans if span.name == name)
        cycles = ticks * self.per_tick / self.units
        threads = len(self.ledger.accounts)
        return cycles / threads, cycles * (threads - 1) / threads


def profile_model(
    model: Model, model_name: str, settings: Settings, machine: MachineProfile,
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], list[Turn]]:  # fmt: skip
    """Runs a model under the clock; its profile, and the raw turns for a trace.

    Raises InvalidParameterError, before anything runs, for settings that the model cannot take.
    """
    from cyclewise.clock.complexity import measure_growth_quickly
    from cyclewise.clock.whatif import WhatIfs, advice, usual_questions
    from cyclewise.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(model.metadata)
    with ClockedRun(model, tokenizer, open_counter()) as run:
        turns = run.turns(settings, progress)
    profile = make_profile(model, model_name, turns, settings, machine.roofs)
    profile["growth"] = measure_growth_quickly(model, progress).as_list()
    asked = WhatIfs(model, settings, machine, progress)
    answers = [asked.ask(change) for change in usual_questions(model, settings)]
    profile["whatif"] = [answer.as_dict() for answer in answers]
    profile["advice"] = advice(answers)
    progress("")
    return profile, turns


def make_profile(
    model: Model, model_name: str, turns: Sequence[Turn], settings: Settings, roofs: Roofs
) -> dict[str, Any]:
    """The profile of a run, without what `growth`, `whatif` and `advice` add."""
    phases = {
        name: [_view(turn, getattr(turn, name)) for turn in turns] for name in ("prefill", "decode")
    }
    middle = {name: _median_turn(views) for name, views in phases.items()}
    program, threads = model.program, model.machine.num_threads
    moments: list[dict[str, Any]] = []
    totals: dict[str, dict[str, float]] = {}
    for name, views in phases.items():
        turn, view = turns[middle[name]], views[middle[name]]
        limits = Limits(roofs, program, threads, memory_bandwidth=max(turn.bandwidths))
        hertz = turn.calibration.core_hertz
        rows = _moments(program, name, views, view, limits, hertz)
        moments += rows
        limit_cycles = sum(row["limit_cycles"] or 0.0 for row in rows)
        wall = view.wall / view.units
        totals[name] = {
            "cycles": wall, "limit_cycles": limit_cycles, "limit_fraction": limit_cycles / wall,
        }  # fmt: skip
    decode = phases["decode"][middle["decode"]]
    first = Spread.of([_seconds(turn.prefill, turn) for turn in turns])
    each = Spread.of([_seconds(turn.decode, turn) / len(turn.decode.shapes) for turn in turns])
    speeds = Spread.of(
        [settings.batch * len(t.decode.shapes) / _seconds(t.decode, t) for t in turns]
    )
    totals["prefill"]["tokens_per_second"] = settings.prompt_tokens * settings.batch / first.median
    clock = _clock(turns, decode)
    return {
        "schema": "cyclewise.profile",
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": model.config.name or model_name,
            "file": model.path.name,
            "architecture": model.config.architecture,
            "layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "vocab_size": model.config.vocab_size,
            "bytes_per_token": model.bytes_per_token,
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "formats": model.format_bytes,
        },
        "settings": {**asdict(settings), "threads": threads},
        "host": describe_host(),
        **clock,
        "unaccounted_fraction": _unaccounted(
            [phases[name][middle[name]] for name in ("prefill", "decode")]
        ),
        "cycles_per_token": totals["decode"]["cycles"] / settings.batch,
        "tokens_per_second": speeds.median,
        "limit_fraction": totals["decode"]["limit_fraction"],
        "tokens_per_second_spread": asdict(speeds),
        "time_to_first_token": asdict(first),
        "time_per_token": asdict(each),
        **totals,
        "moments": moments,
        "accounts": [
            {"thread": thread, "phase": name, **_in_cycles(asdict(account), view.per_tick)}
            for name in ("prefill", "decode")
            for view in [phases[name][middle[name]]]
            for thread, account in enumerate(view.ledger.accounts)
        ],
        "tokens": _tokens(phases["decode"], program),
        "timeline": _timeline(decode),
        "roofs": _roofs(roofs, [b for turn in turns for b in turn.bandwidths], threads),
        "growth": [],
        "whatif": [],
        "advice": [],
        "provenance": PROVENANCE,
    }


def _view(turn: Turn, phase: Phase) -> _View:
    per_tick = turn.calibration.cycles_per_tick
    ledger = keep_books(phase.ticks, phase.spans, phase.window)
    units = len(phase.shapes) if phase.name == "decode" else 1
    return _View(phase, ledger, per_tick, units)


def _seconds(phase: Phase, turn: Turn) -> float:
    return (phase.window[1] - phase.window[0]) / turn.calibration.ticks_per_second


def _median_turn(views: Sequence[_View]) -> int:
    """Which turn took the median time; of an even number, the lower one."""
    durations = [view.phase.window[1] - view.phase.window[0] for view in views]
    return sorted(range(len(durations)), key=durations.__getitem__)[(len(durations) - 1) // 2]


def _moments(
    program: Program, phase: str, views: Sequence[_View], view: _View, limits: Limits, hertz: float
) -> list[dict[str, Any]]:
    rows = []
    work, waiting = view.moments()
    samples = [[sum(pair) for pair in zip(*other.moments(), strict=True)] for other in views]
    shapes, units = view.phase.shapes, view.units
    for index, moment in enumerate(program.moments):
        costs = [cost(moment.form, shape) for shape in shapes]
        total = Cost(
            moment.form.unit,
            *(
                sum(getattr(each, name) for each in costs) // units
                for name in ("operations", "weight_bytes", "activation_bytes", "kv_bytes")
            ),
        )
        parts = [limits.seconds(moment, shape) for shape in shapes]
        limit_cycles = sum(part.seconds for part in parts) * hertz / units
        spent = work[index] + waiting[index]
        rows.append(
            {
                "name": moment.name,
                "class": moment.kind,
                "phase": phase,
                "cycles": work[index],
                "waiting_cycles": waiting[index],
                "operations": total.operations,
                "bytes": total.bytes,
                "weight_bytes": total.weight_bytes,
                "kv_bytes": total.kv_bytes,
                "activation_bytes": total.activation_bytes,
                "unit": total.unit,
                "limit_cycles": limit_cycles,
                "limit_fraction": limit_cycles / spent if spent else 0.0,
                "bound": parts[-1].bound,
                "samples": [sample[index] for sample in samples],
                "provenance": "derived",
            }
        )
    for name in STAGES:
        cycles, others = view.stage(name)
        rows.append(
            {
                "name": name,
                "class": "host",
                "phase": phase,
                "cycles": cycles,
                "waiting_cycles": others,
                "operations": 0,
                "bytes": 0,
                "weight_bytes": 0,
                "kv_bytes": 0,
                "activation_bytes": 0,
                "unit": None,
                "limit_cycles": None,
                "limit_fraction": None,
                "bound": None,
                "samples": [sum(other.stage(name)) for other in views],
                "provenance": "derived",
            }
        )
    return [row for row in rows if row["cycles"] or row["class"] != "host"]


def _clock(turns: Sequence[Turn], decode: _View) -> dict[str, Any]:
    calibrations = [turn.calibration for turn in turns]
    hertz = [each.core_hertz for each in calibrations]
    last = calibrations[-1]
    steps, _, moments = decode.ledger.work.shape
    stamps = steps * (2 * moments + 1)
    ticks = decode.phase.window[1] - decode.phase.window[0]
    notes = dict.fromkeys(note for each in calibrations for note in each.notes)
    counted = [asdict(counts) for counts in turns[-1].counts]
    return {
        "clock_source": last.source,
        "clock_error_fraction": max(each.error_fraction for each in calibrations),
        "clock": {
            "ticks_per_second": last.ticks_per_second,
            "core_hertz": statistics.median(hertz),
            "core_hertz_low": min(hertz),
            "core_hertz_high": max(hertz),
            "counts_cycles": last.counts_cycles,
            "read_cost_seconds": last.read_cost_seconds,
            "counted": counted or None,
            "notes": list(notes),
        },
        "overhead_fraction": stamps * last.read_cost_seconds * last.ticks_per_second / ticks,
    }


def _unaccounted(views: Sequence[_View]) -> float:
    """The largest share of a thread's time that belongs nowhere."""
    threads = range(len(views[0].ledger.accounts))
    return max(
        sum(abs(view.ledger.accounts[thread].unaccounted) for view in views)
        / sum(view.ledger.accounts[thread].wall for view in views)
        for thread in threads
    )


def _in_cycles(account: dict[str, int], per_tick: float) -> dict[str, float]:
    return {name: ticks * per_tick for name, ticks in account.items()}


def _tokens(views: Sequence[_View], program: Program) -> list[dict[str, Any]]:
    """Decode steps of all turns, in order, with those that took much longer than the others."""
    durations, parts = [], []
    for view in views:
        entries = view.phase.ticks[:, 0, 0, 0]
        edges = np.append(entries, view.phase.window[1])
        durations.append(np.diff(edges) * view.per_tick)
        parts.append(_parts(view, np.diff(edges)))
    cycles = np.concatenate(durations)
    middle = float(np.median(cycles))
    deviation = 1.4826 * float(np.median(np.abs(cycles - middle)))
    usual = {name: np.median(np.concatenate([p[name] for p in parts])) for name in parts[0]}
    threshold = middle + OUTLIER_DEVIATIONS * max(deviation, 0.01 * middle)
    tokens: list[dict[str, Any]] = []
    for turn, view in enumerate(views):
        for step, duration in enumerate(durations[turn].tolist()):
            outlier = duration > threshold
            reason = None
            if outlier:
                excess = {n: float(p[step] - usual[n]) for n, p in parts[turn].items()}
                kind = max(excess, key=excess.__getitem__)
                reason = _reason(kind, view, step, program)
            index = len(tokens)
            tokens.append(
                {"index": index, "cycles": duration, "outlier": outlier, "reason": reason}
            )
    return tokens


def _parts(view: _View, durations: Any) -> dict[str, Any]:
    """Ticks of each step by where they went, on the thread that had most of it."""
    inside = view.phase.ticks[:, 0, -1, 1] - view.phase.ticks[:, 0, 0, 0]
    return {
        "moments": view.ledger.work.sum(axis=2).max(axis=1),
        "python": durations - inside,
    }


def _reason(kind: str, view: _View, step: int, program: Program) -> str:
    if kind == "python":
        return "between steps, in Python"
    usual = np.median(view.ledger.work, axis=0)
    excess = view.ledger.work[step] - usual
    thread, moment = np.unravel_index(int(excess.argmax()), excess.shape)
    return f"in {program.moments[int(moment)].name} on thread {int(thread)}"


def _timeline(view: _View) -> dict[str, Any]:
    """The step of median duration, moment by moment."""
    spans = view.phase.ticks[:, 0, -1, 1] - view.phase.ticks[:, 0, 0, 0]
    step = int(np.argsort(spans)[len(spans) // 2])
    start = int(view.phase.ticks[step, 0, 0, 0])
    books, scale = view.ledger, view.per_tick
    return {
        "phase": "decode",
        "ticks_to_cycles": scale,
        "threads": [
            [
                [max(0.0, (begun - start) * scale), worked * scale, waited * scale]
                for begun, worked, waited in zip(
                    books.starts[step, thread].tolist(),
                    books.work[step, thread].tolist(),
                    books.waiting[step, thread].tolist(),
                    strict=True,
                )
            ]
            for thread in range(books.work.shape[1])
        ],
    }


def _roofs(roofs: Roofs, bandwidths: Sequence[float], threads: int) -> dict[str, Any]:
    return {
        "core_hertz": roofs.core_hertz,
        "levels": [
            {
                "name": level.name,
                "num_bytes": level.num_bytes,
                "cores": level.cores,
                "bytes_per_second": [list(point) for point in level.bandwidth],
            }
            for level in roofs.levels
        ],
        "operations_per_second": {
            unit: [list(point) for point in scaling] for unit, scaling in roofs.operations.items()
        },
        "instructions": roofs.instructions,
        "handover_seconds": roofs.handover_seconds,
        "memory_bytes_per_second_within_run": statistics.median(bandwidths),
        "threads": threads,
    }
