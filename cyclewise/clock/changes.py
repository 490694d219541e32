"""Changes that one may ask about, and what each makes of a program's view and of the settings.

`whatif.py` predicts before and after. Nothing here touches a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from cyclewise.clock.machines import Hardware, read_hardware
from cyclewise.clock.predict import Part, View
from cyclewise.clock.run import Settings
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.costs import MatrixShape
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.blocks import ROWS, tile_bytes
from cyclewise.machine.names import CacheKind, cache_kind, layer_of

DRAFTED = 4
"""Tokens that are drafted at a time."""
ACCEPTED = (0.4, 0.6, 0.8)
"""Shares of drafted tokens that are accepted: low, assumed, high."""
_CACHES: dict[CacheKind, str] = {"f16": "float16", "int8": "8-bit integers"}
FORMS = (
    "q8_0", "q4_0", "kv=KIND", "threads=N", "batch=N", "prune-heads=X", "prune-layers=N",
    "speculate", "bandwidth=X", "machine=FILE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that a prediction depends on."""

    view: View
    settings: Settings
    threads: int
    bandwidth: float | None = None
    """Bytes a second, or, below 1,000, times what is read here; None: what is read here."""
    drafted: int = 0
    hardware: Hardware | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change."""

    text: str
    """As it was asked for."""
    meaning: str
    """A sentence: what is assumed."""
    apply: Callable[[Case], Case]
    measurable: bool = False
    """The project can make it already, so it can be measured."""
    batch: int = 1
    """Sequences that it needs room for."""


def parse_change(text: str) -> Change:
    """Reads a change. Raises InvalidParameterError that says what can be asked."""
    name, _, value = text.partition("=")
    known = {form.partition("=")[0]: "=" in form for form in FORMS}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(FORMS)}."
        raise InvalidParameterError(f"unknown change {text!r}: {hint}")
    if known[name] != bool(value):
        form = next(form for form in FORMS if form.partition("=")[0] == name)
        raise InvalidParameterError(f"the change {text!r} must be written {form}")
    match name:
        case "q8_0" | "q4_0":
            return Change(
                text, f"all matrices are stored as {name.upper()}", _requantize(name.upper())
            )
        case "kv":
            kind = cache_kind(value)
            return Change(
                text,
                f"keys and values are kept as {_CACHES[kind]}; arithmetic costs what it does",
                lambda case: replace(case, view=replace(case.view, kv=kind)), measurable=True,
            )  # fmt: skip
        case "threads":
            count = _integer(text, value, 1, available_cpus())
            return Change(
                text, f"{count} of this computer's CPUs work",
                lambda case: replace(case, threads=count), measurable=True,
            )  # fmt: skip
        case "batch":
            count = _integer(text, value, 1, 512)
            return Change(
                text, f"{count} sequences are decoded together",
                lambda case: replace(case, settings=replace(case.settings, batch=count)),
                measurable=True, batch=count,
            )  # fmt: skip
        case "prune-heads":
            return _prune_heads(text, _number(text, value, 0.0, 1.0))
        case "prune-layers":
            count = _integer(text, value, 1, 10_000)
            return Change(
                text, f"the last {count} layers are left out; what the text loses is not said",
                lambda case: _prune_layers(case, count), measurable=True,
            )  # fmt: skip
        case "speculate":
            return Change(
                text,
                f"{DRAFTED} tokens are drafted for nothing, and each is accepted with a chance of "
                f"{ACCEPTED[1]:.0%} (band: {ACCEPTED[0]:.0%} to {ACCEPTED[2]:.0%})",
                lambda case: replace(case, drafted=DRAFTED), measurable=True,
            )  # fmt: skip
        case "bandwidth":
            return _bandwidth(text, value)
    hardware = read_hardware(value)
    return Change(
        text,
        f"{hardware.name}: each moment reaches the same share of its limit there as here",
        lambda case: replace(case, hardware=hardware),
    )


def _integer(text: str, value: str, low: int, high: int) -> int:
    if not value.isdecimal() or not low <= int(value) <= high:
        raise InvalidParameterError(
            f"in {text!r} the number must be a whole one from {low} to {high}"
        )
    return int(value)


def _number(text: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low < number < high:
        raise InvalidParameterError(f"in {text!r} the number must lie between {low:g} and {high:g}")
    return number


def _bandwidth(text: str, value: str) -> Change:
    if value.endswith("x"):
        factor = _number(text, value[:-1], 0.0, 1000.0)
        return Change(
            text, f"memory is read {factor:g} times as fast",
            lambda case: replace(case, bandwidth=factor),
        )  # fmt: skip
    gigabytes = _number(text, value.removesuffix("GB/s"), 0.0, 1e6)
    return Change(
        text, f"memory is read at {gigabytes:g} GB/s",
        lambda case: replace(case, bandwidth=gigabytes * 1e9),
    )  # fmt: skip


def _with_matrices(part: Part, change: Callable[[MatrixShape], MatrixShape]) -> Part:
    """The part with other matrices, and the bytes that they have."""
    if not part.form.matrices:
        return part
    before = sum(matrix.num_bytes for matrix in part.form.matrices)
    matrices = tuple(change(matrix) for matrix in part.form.matrices)
    form = part.form
    streamed = max(1, form.num_chosen)
    work = sum(m.rows * m.columns for m in form.matrices)
    left = sum(m.rows * m.columns for m in matrices)
    return replace(
        part,
        form=replace(
            form,
            matrices=matrices,
            weight_bytes=form.weight_bytes
            + streamed * (sum(m.num_bytes for m in matrices) - before),
            operations_per_row=form.operations_per_row * left // work,
        ),
    )


def _cut(matrix: MatrixShape, rows: int, columns: int) -> MatrixShape:
    num_bytes = matrix.num_bytes * rows * columns // (matrix.rows * matrix.columns)
    return MatrixShape(matrix.format, rows, columns, num_bytes)


def _requantize(format_name: str) -> Callable[[Case], Case]:
    def stored(matrix: MatrixShape) -> MatrixShape:
        num_bytes = tile_bytes(format_name, matrix.columns) * -(-matrix.rows // ROWS)
        return MatrixShape(format_name, matrix.rows, matrix.columns, num_bytes)

    def apply(case: Case) -> Case:
        parts = tuple(_with_matrices(part, stored) for part in case.view.parts)
        return replace(case, view=replace(case.view, parts=parts))

    return apply


def _prune_heads(text: str, share: float) -> Change:
    """Query heads of each group go, so that keys and values stay; where every head has its own,
    both go.
    """

    def apply(case: Case) -> Case:
        view = case.view
        group = view.num_heads // view.num_kv_heads
        if group > 1:
            heads = view.num_kv_heads * max(1, round(group * (1 - share)))
            kv_heads = view.num_kv_heads
        else:
            heads = kv_heads = max(1, round(view.num_heads * (1 - share)))
        queries = {view.num_heads * view.head_dim: heads * view.head_dim}
        keys = {view.num_kv_heads * view.head_dim: kv_heads * view.head_dim}

        def pruned(part: Part) -> Part:
            if part.name.endswith("attention.qkv"):
                first, *others = part.form.matrices
                sizes = iter([queries[first.rows], *(keys[m.rows] for m in others)])
                return _with_matrices(part, lambda m: _cut(m, next(sizes), m.columns))
            if part.name.endswith("attention.output"):
                return _with_matrices(part, lambda m: _cut(m, m.rows, heads * view.head_dim))
            return part

        parts = tuple(pruned(part) for part in view.parts)
        return replace(
            case, view=replace(view, parts=parts, num_heads=heads, num_kv_heads=kv_heads)
        )

    return Change(
        text, f"about {share:.0%} of the attention heads go; what the text loses is not said", apply
    )


def _prune_layers(case: Case, count: int) -> Case:
    layers = {layer_of(part.name) for part in case.view.parts} - {None}
    if count >= len(layers):
        raise InvalidParameterError(
            f"the model has {len(layers)} layers: prune-layers can be at most {len(layers) - 1}"
        )
    kept = len(layers) - count
    parts = tuple(
        part for part in case.view.parts if (layer := layer_of(part.name)) is None or layer < kept
    )
    return replace(case, view=replace(case.view, parts=parts))
