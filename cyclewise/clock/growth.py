"""Laws of growth, as they are handed on and as a person sees them.

`complexity.py` makes a `Growth`; the profile's JSON and the command `complexity` print it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cyclewise.bench.report import NOISY
from cyclewise.clock.fit import Law

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Variable = Literal["prompt_tokens", "context", "batch", "threads", "layers"]
Phase = Literal["prefill", "decode"]

TOTAL = "total"
WIDTH = 80
SHOWN = 0.005
"""Moments with less of the total, at the largest value measured, are left to `--json`."""


@dataclass(frozen=True, slots=True)
class Point:
    """Core cycles at one value of the variable, working and waiting, mean over threads."""

    x: int
    cycles: float
    held_out: bool
    """The law was fitted without it."""


@dataclass(frozen=True, slots=True)
class MomentLaw:
    """How one moment, its layers together, grows with one variable in one phase."""

    name: str
    """`layers.*.ffn.down`, or `total`."""
    kind: str
    """The moment's class, or `total`."""
    phase: Phase
    variable: Variable
    law: Law
    """Cycles of a whole prompt's prefill, or of one step of decode."""
    points: tuple[Point, ...]
    median_error: float | None
    """Over the held-out points, relative; None if there are none."""

    def as_dict(self) -> dict[str, Any]:
        """As the profile's JSON has it."""
        fitted = self.law.at([point.x for point in self.points]).tolist()
        pairs = zip(self.law.terms, self.law.coefficients, strict=True)
        return {
            "name": self.name,
            "class": self.kind,
            "phase": self.phase,
            "variable": self.variable,
            "law": self.law.text,
            "terms": [{"form": t.form(self.law.symbol), "coefficient": c} for t, c in pairs],
            "points": [
                {"x": p.x, "cycles": p.cycles, "fitted": f, "held_out": p.held_out}
                for p, f in zip(self.points, fitted, strict=True)
            ],
            "median_error": self.median_error,
            "provenance": "measured",
        }


@dataclass(frozen=True, slots=True)
class Growth:
    """Laws of all moments in all variables that were asked for."""

    laws: tuple[MomentLaw, ...]
    """By variable and phase, the moments in program order, then the total."""
    core_hertz: float
    counts_cycles: bool
    """False: the source counts time only, and cycles are ticks."""
    left_out: tuple[str, ...] = ()
    """Sentences: which variables cannot grow here."""
    others_cpu_share: float | None = None
    """Of the whole machine, used by other processes meanwhile; None where that is not known."""

    def total(self, variable: Variable, phase: Phase) -> MomentLaw | None:
        """The law of all moments together."""
        for law in self.laws:
            if (law.name, law.variable, law.phase) == (TOTAL, variable, phase):
                return law
        return None

    def as_list(self) -> list[dict[str, Any]]:
        """The `growth` of the profile's JSON."""
        return [law.as_dict() for law in self.laws]


def growth_table(laws: Sequence[MomentLaw]) -> RenderableType:
    """The laws of one variable in one phase, the largest moment first, the total last."""
    from rich.table import Table

    first = laws[0]
    total = next(law for law in laws if law.name == TOTAL)
    moments = [law for law in laws if law is not total]
    moments.sort(key=lambda law: law.points[-1].cycles, reverse=True)
    shown = [law for law in moments if law.points[-1].cycles >= SHOWN * total.points[-1].cycles]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=WIDTH)
    table.add_column(f"{first.phase}, {first.variable.replace('_', ' ')}", no_wrap=True)
    table.add_column("cycles a prompt" if first.phase == "prefill" else "cycles a step", ratio=1)
    table.add_column("error", justify="right", no_wrap=True)
    for law in [*shown, total]:
        error = "" if law.median_error is None else f"{law.median_error:.1%}"
        table.add_row(law.name, law.law.text, error, style="bold" if law is total else "")
    return table


def print_complexity(growth: Growth, console: Console | None = None) -> None:
    """Prints all laws, each with its median error on held-out points, and what they come to."""
    from rich.console import Console

    console = console or Console(width=WIDTH, highlight=False)
    sections: dict[tuple[Variable, Phase], list[MomentLaw]] = {}
    for law in growth.laws:
        sections.setdefault((law.variable, law.phase), []).append(law)
    for laws in sections.values():
        console.print(growth_table(laws))
        console.print()
    for sentence in growth.left_out:
        console.print(sentence)
    if growth.others_cpu_share is not None and growth.others_cpu_share > NOISY:
        console.print(
            f"Other processes used {growth.others_cpu_share:.0%} of this machine meanwhile: "
            "measure again when it is quiet."
        )
    hertz = f"{growth.core_hertz / 1e9:.2f} GHz"
    cycles = "cycles" if growth.counts_cycles else "ticks"
    headlines: tuple[tuple[Variable, Phase], ...] = (
        ("prompt_tokens", "prefill"),
        ("context", "decode"),
    )
    for variable, phase in headlines:
        total = growth.total(variable, phase)
        if total is not None:
            console.print(f"{phase:7} = {total.law.text} {cycles}", style="bold")
            seconds = total.law.scaled(1 / growth.core_hertz)
            console.print(f"        = {seconds.text} seconds at {hertz}")
