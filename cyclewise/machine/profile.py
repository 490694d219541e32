"""The machine profile: a file that says what this computer can do, and how to run on it best.

The clock measures it and writes it (`clock/roofs.py`); the machine and the engine read it here and
know nothing of the clock. It is keyed by the processor, so a cache that moves to another computer
is not believed there; a file that is damaged, of another version or out of range is as good as
none. Without one, defaults serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cyclewise.machine.host import available_cpus, cpu_name
from cyclewise.paths import cache_dir

VERSION = 2
_MAX_FILE_BYTES = 1 << 20
_MAX_THREADS = 1 << 12

Scaling = tuple[tuple[int, float], ...]
"""A quantity measured at several numbers of threads: (threads, all of them together)."""


def at_threads(scaling: Scaling, num_threads: int) -> float:
    """The quantity at a number of threads: between measured ones on the line that joins them."""
    points = sorted(scaling)
    below = [p for p in points if p[0] <= num_threads] or points[:1]
    above = [p for p in points if p[0] >= num_threads] or points[-1:]
    (low, first), (high, last) = below[-1], above[0]
    if low == high:
        return first
    return first + (last - first) * (num_threads - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the memory hierarchy."""

    name: str
    """`L1`, `L2`, `L3` or `memory`."""
    num_bytes: int
    """Of the data that one instance holds; 0 for memory."""
    cores: int
    """How many share an instance."""
    bandwidth: Scaling
    """Bytes read a second."""


@dataclass(frozen=True, slots=True)
class Roofs:
    """What the hardware can do, measured; never what a kernel of ours does."""

    core_hertz: float
    """Of a core under load."""
    levels: tuple[Level, ...]
    """Nearest first; the last is memory."""
    operations: dict[str, Scaling]
    """Operations a second by unit (`costs.Unit`); a multiply-add is two."""
    instructions: dict[str, str]
    """The instruction that each unit's rate was measured with."""
    handover_seconds: float
    """From one thread's store until another has seen it."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The choices that measurements make; what is left out stays at its default."""

    num_threads: int | None = None
    """Read by `machine.resolve_threads`."""
    prefill_chunk: int | None = None
    """Most tokens of a step. Read by `Machine`."""
    token_tiles: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By weight format: tokens that its matrix kernel takes at once, largest first. Read by
    `program.load_kernels`.
    """


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """One computer, as measured."""

    cpu: str
    target: str
    num_cpus: int
    roofs: Roofs
    tuning: Tuning = Tuning()
    predictor: dict[str, Any] = field(default_factory=dict)
    """What `clock/predict.py` was calibrated to; nobody else reads it."""
    date: str = ""
    version: int = VERSION


def load_profile() -> MachineProfile | None:
    """This computer's profile for the target in use; None if there is none to be believed."""
    path = _path(key := _key())
    try:
        with path.open("rb") as file:
            profile = _profile(json.loads(file.read(_MAX_FILE_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None
    return profile if (profile.cpu, profile.target, profile.num_cpus) == key else None


def load_tuning() -> Tuning:
    """The profile's choices; without a profile, none is made."""
    profile = load_profile()
    return profile.tuning if profile else Tuning()


def save_profile(profile: MachineProfile) -> None:
    """Keeps a profile for the next start; a cache that cannot be written costs only that."""
    path = _path((profile.cpu, profile.target, profile.num_cpus))
    text = json.dumps(asdict(profile), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        return


def _key() -> tuple[str, str, int]:
    from cyclewise.machine.kernels.target import host_target

    return cpu_name(), host_target().name, available_cpus()


def _path(key: tuple[str, str, int]) -> Path:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
    return cache_dir() / "machine" / f"{digest}.json"


# Reading: each function makes a value of what lay in the file, or raises ValueError.


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _fields(value: object, names: str) -> list[Any]:
    fields = _dict(value)
    _require(fields.keys() == set(names.split()))
    return [fields[name] for name in names.split()]


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _integer(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError
    return value


def _number(value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError
    return float(value)


def _scaling(value: object) -> Scaling:
    pairs = [_list(pair) for pair in _list(value)]
    _require(bool(pairs) and all(len(pair) == 2 for pair in pairs))
    return tuple((_integer(n, 1, _MAX_THREADS), _number(x, 1e3, 1e18)) for n, x in pairs)


def _level(value: object) -> Level:
    name, num_bytes, cores, bandwidth = _fields(value, "name num_bytes cores bandwidth")
    return Level(
        _text(name), _integer(num_bytes, 0, 1 << 40), _integer(cores, 1, _MAX_THREADS),
        _scaling(bandwidth),
    )  # fmt: skip


def _roofs(value: object) -> Roofs:
    hertz, levels, operations, instructions, handover = _fields(
        value, "core_hertz levels operations instructions handover_seconds"
    )
    found = tuple(_level(level) for level in _list(levels))
    _require(bool(found) and found[-1].num_bytes == 0)
    _require({"dot", "fma"} <= _dict(operations).keys())
    _require(_dict(instructions).keys() == operations.keys())
    return Roofs(
        core_hertz=_number(hertz, 1e7, 1e11),
        levels=found,
        operations={unit: _scaling(rates) for unit, rates in operations.items()},
        instructions={unit: _text(name) for unit, name in instructions.items()},
        handover_seconds=_number(handover, 0, 1),
    )


def _tiles(value: object) -> tuple[int, ...]:
    """Activations of four tokens lie side by side: a tile is a part of them, or whole fours."""
    tiles = tuple(_integer(tile, 1, 32) for tile in _list(value))
    _require(bool(tiles) and tiles[-1] == 1 and sorted(set(tiles), reverse=True) == list(tiles))
    _require(all(tile in (1, 2) or tile % 4 == 0 for tile in tiles))
    return tiles


def _tuning(value: object, num_cpus: int) -> Tuning:
    threads, chunk, tiles = _fields(value, "num_threads prefill_chunk token_tiles")
    return Tuning(
        None if threads is None else _integer(threads, 1, num_cpus),
        None if chunk is None else _integer(chunk, 1, 1 << 16),
        {name: _tiles(sizes) for name, sizes in _dict(tiles).items()},
    )


def _profile(value: object) -> MachineProfile:
    cpu, target, num_cpus, roofs, tuning, predictor, date, version = _fields(
        value, "cpu target num_cpus roofs tuning predictor date version"
    )
    _require(version == VERSION)
    num_cpus = _integer(num_cpus, 1, _MAX_THREADS)
    return MachineProfile(
        _text(cpu), _text(target), num_cpus, _roofs(roofs), _tuning(tuning, num_cpus),
        _dict(predictor), _text(date), VERSION,
    )  # fmt: skip
