"""Descriptions of other machines, for `whatif --change machine=FILE`.

A description is a JSON file of data-sheet figures, each with its public source. Some come with the
package, in the folder `hardware`, and are known by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclewise.errors import InvalidParameterError
from cyclewise.machine.profile import Level, Roofs

_FOLDER = Path(__file__).parent / "hardware"


@dataclass(frozen=True, slots=True)
class Hardware:
    """Another machine, as its makers describe it."""

    name: str
    cores: int
    memory_bandwidth: float
    """Bytes a second."""
    operations: dict[str, float]
    """Operations a second by unit (`costs.Unit`)."""
    watts: float | None

    @property
    def roofs(self) -> Roofs:
        """Memory and arithmetic alone: what caches would save is not known."""
        return Roofs(
            core_hertz=1.0,
            levels=(Level("memory", 0, self.cores, ((self.cores, self.memory_bandwidth),)),),
            operations={unit: ((self.cores, rate),) for unit, rate in self.operations.items()},
            instructions={},
            handover_seconds=0.0,
        )


def names() -> list[str]:
    """Descriptions that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def read_hardware(name: str) -> Hardware:
    """A description by name or path.

    Raises InvalidParameterError if there is none, or it lacks something.
    """
    path = _FOLDER / f"{name}.json" if name in names() else Path(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InvalidParameterError(
            f"there is no machine description {name!r}: give a JSON file, or one of "
            f"{', '.join(names())}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidParameterError(f"{path} does not describe a machine")
    rates = values.get("operations_per_second")
    if not isinstance(rates, dict):
        raise InvalidParameterError(f"{path} lacks operations_per_second: {{dot, fma}}")
    watts = values.get("watts")
    return Hardware(
        name=str(values.get("name", path.stem)),
        cores=math.ceil(_positive(values, "cores", path)),
        memory_bandwidth=_positive(values, "memory_bandwidth_bytes_per_second", path),
        operations={unit: _positive(rates, unit, path) for unit in ("dot", "fma")},
        watts=None if watts is None else _positive(values, "watts", path),
    )


def _positive(values: dict[str, Any], key: str, path: Path) -> float:
    value = values.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise InvalidParameterError(f"{path}: {key} must be a number above 0, not {value!r}")
