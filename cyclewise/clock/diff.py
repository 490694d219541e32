"""What became faster and what slower between two profiles.

Moments are compared by name, the layers together. Each turn of a profile is one sample; the test is
Fisher's permutation test on the difference of the means (The Design of Experiments, 1935), exact
for up to eleven turns on either side. It knows of the spread within a run and of nothing else: a
machine that was slower throughout one of them makes everything slower, so what is known of the
machine itself is compared first.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cyclewise.clock.profile import SCHEMA_VERSION
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.names import collapsed

SIGNIFICANCE = 0.01
_MOST_PERMUTATIONS = 1_000_000


@dataclass(frozen=True, slots=True)
class Change:
    """A moment, in all layers together, in two profiles."""

    name: str
    phase: str
    before: float
    """Cycles with waiting, mean of the turns; 0: it is not there."""
    after: float
    probability: float | None
    """That two runs of the same thing differ so much; None: too few turns to tell."""

    @property
    def significant(self) -> bool:
        return self.probability is not None and self.probability <= SIGNIFICANCE

    @property
    def ratio(self) -> float | None:
        """After over before; None of a moment that is new."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True, slots=True)
class Difference:
    """Two profiles compared."""

    changes: tuple[Change, ...]
    """The largest first, totals before moments."""
    notes: tuple[str, ...]
    """In what the runs differ beyond the code."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        changes = [
            {**asdict(change), "ratio": change.ratio, "significant": change.significant}
            for change in self.changes
        ]
        return {"schema": "cyclewise.diff", "schema_version": 1, "notes": self.notes,
                "significance": SIGNIFICANCE, "changes": changes}  # fmt: skip


def read_profile(path: Path) -> dict[str, Any]:
    """A profile that `cyclewise profile --json` wrote.

    Raises InvalidParameterError if it is none, or of a later version.
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        version = profile["schema_version"]
        known = profile["schema"] == "cyclewise.profile" and isinstance(version, int)
        for row in profile["moments"]:
            known = known and all(isinstance(row[key], str) for key in ("name", "phase"))
            known = known and bool(np.isfinite(np.array(row["samples"], np.float64)).all())
    except OSError as error:
        raise InvalidParameterError(f"cannot read the profile {str(path)!r}: {error}") from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise InvalidParameterError(
            f"{path} is no profile: make one with `cyclewise profile MODEL --json > {path.name}`"
        )
    if version > SCHEMA_VERSION:
        raise InvalidParameterError(
            f"{path} is of version {version}, and this cyclewise reads up to {SCHEMA_VERSION}"
        )
    return dict(profile)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Difference:
    """Compares two profiles; the order is the order of time."""
    old, new = _samples(before), _samples(after)
    changes = []
    for phase, name in dict.fromkeys([*old, *new]):
        a, b = old.get((phase, name)), new.get((phase, name))
        nothing = np.zeros(1)
        changes.append(
            Change(
                name,
                phase,
                float((nothing if a is None else a).mean()),
                float((nothing if b is None else b).mean()),
                None if a is None or b is None else permutation_test(a, b),
            )
        )
    changes.sort(key=lambda c: (c.name != "total", -abs(c.after - c.before)))
    return Difference(tuple(changes), tuple(_notes(before, after)))


def _samples(profile: dict[str, Any]) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Cycles of each turn, by phase and collapsed name; `total` is the sum of a phase."""
    sums: dict[tuple[str, str], NDArray[np.float64]] = {}
    for row in profile["moments"]:
        cycles = np.array(row["samples"], np.float64)
        for name in ("total", collapsed(row["name"])):
            key = (str(row["phase"]), name)
            sums[key] = sums[key] + cycles if key in sums else cycles
    return sums


def permutation_test(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Two-sided probability that relabelling the samples sets the means as far apart.

    None where even complete separation would not be significant.
    """
    together = np.concatenate([a, b])
    count = math.comb(len(together), len(a))
    if 2 / count > SIGNIFICANCE:
        return None
    seen = abs(a.mean() - b.mean()) * (1 - 1e-12)
    total = together.sum()
    if count <= _MOST_PERMUTATIONS:
        indices = np.array(list(combinations(range(len(together)), len(a))))
        sums = together[indices].sum(axis=1)
    else:
        rng = np.random.default_rng(0)
        sums = np.array([rng.permutation(together)[: len(a)].sum() for _ in range(20_000)])
    apart = np.abs(sums / len(a) - (total - sums) / len(b))
    return float((apart >= seen).mean())


def _notes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    notes = []
    for what, path in (
        ("model", ("model", "file")),
        ("processor", ("host", "cpu")),
        ("number of threads", ("settings", "threads")),
        ("prompt's tokens", ("settings", "prompt_tokens")),
        ("answer's tokens", ("settings", "generate_tokens")),
        ("batch", ("settings", "batch")),
    ):
        old, new = _at(before, path), _at(after, path)
        if old != new:
            notes.append(f"not the same {what}: {old}, then {new}")
    for what, path in (
        ("memory's read bandwidth", ("roofs", "memory_bytes_per_second_within_run")),
        ("core's frequency", ("clock", "core_hertz")),
    ):
        old, new = _at(before, path), _at(after, path)
        if old and new and abs(new / old - 1) > 0.03:
            notes.append(f"the {what} was {new / old - 1:+.0%}: the machine itself changed")
    return notes


def _at(profile: dict[str, Any], path: tuple[str, str]) -> Any:
    return profile.get(path[0], {}).get(path[1])
