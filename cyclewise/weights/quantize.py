"""Float matrices to blocks of 8 or 4 bits, while a directory is loaded; no data but the weights.

In: rows of float32. Out: rows in ggml's blocks. `directory.py` asks `choose_format` what becomes of
a matrix and `quantize_rows` for its bytes.

Q8_0 and Q4_0 are rounded as ggml does it. Q4_K, and Q4_1 where a row is no whole number of its
super-blocks, search for the scale and minimum of each 32 weights: 21 grids between the smallest and
the largest weight, each followed by the least squares fit of scale and minimum to its codes, as
ggml's make_qkx2_quants does. Large weights count more, w = rms + |x|.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cyclewise.errors import InvalidParameterError
from cyclewise.weights.formats import FORMATS, Format

CHOICES = ("q8_0", "q4_0", "q4_k")

QUANTIZED = "cyclewise.quantized"
"""Metadata: what the weights were quantized to, in words."""

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]
_GROUP = 32
_STEPS = 21
_FALLBACKS = {"q8_0": ("Q8_0",), "q4_0": ("Q4_0",), "q4_k": ("Q4_K", "Q4_1")}
_AT_BOTH_ENDS = ("token_embd.weight", "output.weight")


def check_choice(choice: str | None) -> None:
    """Raises InvalidParameterError for what is not one of CHOICES, or None."""
    if choice is not None and choice not in CHOICES:
        raise InvalidParameterError(
            f"quantize is {choice!r}; weights are quantized to {', '.join(CHOICES[:-1])} or "
            f"{CHOICES[-1]}"
        )


def choose_format(name: str, shape: tuple[int, ...], choice: str) -> Format | None:
    """The format that a tensor is quantized to; None: it stays as it is.

    Vectors stay, and what decides more than it weighs: the router of experts and GPT-2's table of
    positions. The embedding table and the output layer become Q8_0 with every choice. A row that is
    no whole number of blocks takes the next format whose blocks fit.
    """
    if len(shape) != 2 or name.endswith("ffn_gate_inp.weight") or name == "position_embd.weight":
        return None
    names = ("Q8_0",) if name in _AT_BOTH_ENDS else _FALLBACKS[choice]
    return next((FORMATS[each] for each in names if shape[1] % FORMATS[each].block_size == 0), None)


def described(choice: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What becomes of a model's matrices: which are not what the choice says, and why."""
    wanted, others = _FALLBACKS[choice][0], Counter[str]()
    for name, shape in shapes.items():
        made = choose_format(name, shape, choice)
        if len(shape) == 2 and (made is None or made.name != wanted):
            if name in _AT_BOTH_ENDS and made is not None:
                continue
            reason = f"of rows of {shape[1]}" if shape[1] % FORMATS[wanted].block_size else "kept"
            others[f"{reason} {'float' if made is None else f'as {made.name}'}"] += 1
    ends = "" if wanted == "Q8_0" else ", embedding and output Q8_0"
    rest = "".join(f", {count} {reason}" for reason, count in others.items())
    return f"{wanted}{ends}{rest}"


def as_floats(rows: _Bytes, format_name: str) -> _Floats:
    """Rows of F32, F16 or BF16, (rows, bytes), as float32."""
    match format_name:
        case "F32":
            return rows.view(np.float32)
        case "F16":
            return rows.view(np.float16).astype(np.float32)
        case _:
            return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class QuantizingBar:
    """A bar on standard error, if that is a terminal, from the first weights that are quantized on;
    a context manager.
    """

    def __init__(self, choice: str, total: int) -> None:
        self._choice, self._total = choice, total
        self._progress: Any = None

    def advance(self, weights: int) -> None:
        """So many weights more are done; from any thread."""
        if self._progress is not None:
            self._progress.advance(self._task, weights)

    def show(self) -> None:
        """Something is going to be quantized."""
        if self._progress is not None or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._progress.start()
        self._task = self._progress.add_task(f"quantizing to {self._choice}", total=self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def quantize_rows(rows: _Floats, format_name: str) -> _Bytes:
    """Rows (rows, columns) of finite weights as blocks, (rows, row bytes)."""
    made = _QUANTIZERS[format_name](rows)
    return made.reshape(len(rows), -1)


def _q8_0(rows: _Floats) -> _Bytes:
    groups = rows.reshape(-1, _GROUP)
    scale = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    codes = groups * _inverse(scale)
    # Halves are rounded away from zero.
    codes = np.trunc(codes + np.copysign(np.float32(0.5), codes))
    return np.concatenate([_halves(scale), codes.astype(np.int8).view(np.uint8)], axis=1)


def _q4_0(rows: _Floats) -> _Bytes:
    groups = rows.reshape(-1, _GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scale = largest / np.float32(-8)
    codes = groups.astype(np.float64) * _inverse(scale).astype(np.float64) + 8.5
    codes = np.clip(np.trunc(codes.astype(np.float32)), 0, 15)
    return np.concatenate([_halves(scale), _nibbles(codes.astype(np.uint8))], axis=1)


def _q4_1(rows: _Floats) -> _Bytes:
    groups = rows.reshape(-1, _GROUP)
    scale, minimum = (value.astype(np.float16) for value in _search(groups))
    codes = _codes(groups, scale.astype(np.float32), minimum.astype(np.float32))
    return np.concatenate([_halves(scale), _halves(minimum), _nibbles(codes)], axis=1)


def _q4_k(rows: _Floats) -> _Bytes:
    groups = rows.reshape(-1, _GROUP)
    scale, minimum = (value.reshape(-1, 8) for value in _search(groups))
    large, small = (
        (value.max(1, keepdims=True) / np.float32(63)).astype(np.float16)
        for value in (scale, -minimum)
    )
    whole = [
        np.clip(np.rint(value * _inverse(unit.astype(np.float32))), 0, 63)
        for value, unit in ((scale, large), (-minimum, small))
    ]
    scale, minimum = (
        (unit.astype(np.float32) * value).reshape(-1, 1)
        for value, unit in zip(whole, (large, small), strict=True)
    )
    codes = _codes(groups, scale, -minimum).reshape(-1, 4, 2, _GROUP)
    scales, minima = (value.astype(np.uint8) for value in whole)
    return np.concatenate(
        [
            _halves(large),
            _halves(small),
            scales[:, :4] | (scales[:, 4:] >> 4) << 6,
            minima[:, :4] | (minima[:, 4:] >> 4) << 6,
            (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4,
            (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(len(large), -1),
        ],
        axis=1,
    )


_QUANTIZERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _search(groups: _Floats) -> tuple[_Floats, _Floats]:
    """Scale and minimum of each group of 32, (groups, 1): the minimum is at most 0."""
    importance = np.abs(groups)
    importance += np.sqrt(np.mean(groups * groups, axis=1, keepdims=True))
    weighed = importance * groups
    total, sum_x, sum_xx = (
        values.astype(np.float64)
        for values in (importance.sum(1), weighed.sum(1), _dots(weighed, groups))
    )
    minimum = np.minimum(groups.min(1, keepdims=True), 0)
    span = groups.max(1, keepdims=True) - minimum
    best_scale, best_minimum = span[:, 0] / np.float64(15), minimum[:, 0].astype(np.float64)
    best_error = np.full(len(groups), np.inf)
    codes, products = np.empty_like(groups), np.empty_like(groups)
    for step in range(-1, _STEPS):
        # The first are the codes of the plain grid, from the smallest to the largest weight.
        steps = np.float32(15 if step < 0 else 14 + 0.1 * step)
        np.subtract(groups, best_minimum.astype(np.float32)[:, None], out=codes)
        codes *= steps * _inverse(span)
        np.clip(np.rint(codes, out=codes), 0, 15, out=codes)
        np.multiply(importance, codes, out=products)
        sum_l, sum_ll, sum_xl = (
            values.astype(np.float64)
            for values in (products.sum(1), _dots(products, codes), _dots(weighed, codes))
        )
        determinant = total * sum_ll - sum_l * sum_l
        solvable = determinant > 0
        divisor = np.where(solvable, determinant, 1)
        scale = (total * sum_xl - sum_x * sum_l) / divisor
        low = (sum_ll * sum_x - sum_l * sum_xl) / divisor
        above = low > 0
        scale = np.where(above, sum_xl / np.where(sum_ll > 0, sum_ll, 1), scale)
        low = np.where(above, 0, low)
        error = sum_xx + scale * (scale * sum_ll - 2 * sum_xl)
        error += low * (low * total + 2 * (scale * sum_l - sum_x))
        better = solvable & (error < best_error)
        best_error[better], best_scale[better] = error[better], scale[better]
        best_minimum[better] = low[better]
    return best_scale.astype(np.float32)[:, None], best_minimum.astype(np.float32)[:, None]


def _codes(groups: _Floats, scale: _Floats, minimum: _Floats) -> _Bytes:
    codes = np.rint((groups - minimum) * _inverse(scale))
    return np.asarray(np.clip(codes, 0, 15), np.uint8)


def _dots(left: _Floats, right: _Floats) -> _Floats:
    found: _Floats = np.einsum("ij,ij->i", left, right)
    return found


def _inverse(scale: _Floats) -> _Floats:
    """1 / scale; 0 where that is no number."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _halves(values: npt.NDArray[Any]) -> _Bytes:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)


def _nibbles(codes: _Bytes) -> _Bytes:
    """Column j of 32 low and column j + 16 high in byte j."""
    return np.asarray(codes[:, :16] | codes[:, 16:] << 4, np.uint8)
