"""The builder of programs with mixtures of experts.

What it has besides a `Builder`'s, one row a token unless said otherwise:

    routed   (tokens, experts)      float32: the router's logits
    slots    (1 + 3 experts)        int64: the chosen experts and their rows (`SLOT`)
    places   (tokens, chosen, 3)    int32: where a token lies with each of its experts (`PLACE`)
    rows     (rows, ...)            what experts read: a row for each token and expert that it chose
    gated    (rows, feed-forward)   float32

All but `routed` and `gated` are a thread's own in a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cyclewise.errors import UnsupportedModelError
from cyclewise.machine import costs
from cyclewise.machine.builder import Builder, _Buffer, _shape
from cyclewise.machine.kernels.blocks import FLOAT_FORMATS, GROUP, ROWS
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP, QUAD
from cyclewise.machine.kernels.experts import (
    MAX_EXPERTS,
    PLACE_BYTES,
    ROUTE_SCRATCH_BYTES,
    SLOT_BYTES,
    experts_unit,
)
from cyclewise.machine.kernels.layout import DISPATCH, EXPERTS_DOWN, EXPERTS_GATED, LINE, ROUTE
from cyclewise.machine.kernels.linear import MAX_BATCH_TOKENS
from cyclewise.machine.packing import Matrix


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A mixture of experts, the same in every layer that has one."""

    num_experts: int
    num_chosen: int
    feed_forward: int
    """Of one expert."""

    @property
    def max_rows(self) -> int:
        """Rows of a batch: from four on, an expert's fill whole quads."""
        choices = MAX_BATCH_TOKENS * self.num_chosen
        return choices + (QUAD - 1) * min(self.num_experts, choices)


class ExpertBuilder(Builder):
    """A `Builder` whose feed-forward parts may be mixtures of experts."""

    def __init__(self, shape: ExpertShape, *, hidden_size: int, **sizes: Any) -> None:
        """Sizes as a `Builder`'s."""
        if not 0 < shape.num_chosen <= shape.num_experts <= MAX_EXPERTS:
            raise UnsupportedModelError(
                f"{shape.num_chosen} of {shape.num_experts} experts: Cyclewise runs at most "
                f"{MAX_EXPERTS} experts, of which a token chooses at least one."
            )
        rows, choices = shape.max_rows, MAX_BATCH_TOKENS * shape.num_chosen
        self._row_bytes = max(
            -(-hidden_size // ROWS) * ROWS * 4,
            -(-shape.feed_forward // GROUP) * ACTIVATION_GROUP,
        )
        parts = {
            "slots": 8 + shape.num_experts * SLOT_BYTES, "places": choices * PLACE_BYTES,
            "row_tokens": 4 * rows, "row_weights": 4 * rows, "rows": rows * self._row_bytes,
        }  # fmt: skip
        sizes_in_lines = {name: -(-size // LINE) * LINE for name, size in parts.items()}
        super().__init__(
            hidden_size=hidden_size, private_bytes=sum(sizes_in_lines.values()), **sizes
        )
        self._shape = shape
        self._scratch_bytes = ROUTE_SCRATCH_BYTES
        host_compiler().load([experts_unit()])
        at = self._own_private
        self._addresses: dict[str, int] = {}
        for name, size in sizes_in_lines.items():
            self._addresses[name] = at
            at += size
        self._routed = self._buffer(shape.num_experts)
        self._gated_rows = self._buffer(shape.feed_forward, rows)

    def router(self, name: str, matrix: Matrix) -> None:
        """routed = matrix . normed"""
        self._linear(name, [matrix], [None], self._normed, self._routed)

    def route(self, name: str, *, normalize: bool) -> None:
        """Chooses each token's experts and sorts the tokens by expert; weights are the softmax of
        the chosen experts' logits, or without `normalize` of all.
        """
        shape = self._shape
        values = {
            "logits": self._routed.address, "logits_stride": self._routed.stride,
            "num_experts": shape.num_experts, "num_chosen": shape.num_chosen,
            "normalize": int(normalize),
            **self._given("slots", "places", "row_tokens", "row_weights"),
        }  # fmt: skip
        form = costs.route_form(shape.num_experts, shape.num_chosen, normalize=normalize)
        self._add(name, "activation", "route", ROUTE, values, 1, form, replicable=True)

    def experts_gated(self, name: str, gates: Sequence[Matrix], ups: Sequence[Matrix]) -> None:
        """gated = silu(gate . normed) * (up . normed), of each token with each of its experts"""
        gate, up, shape = self._alike(name, gates), self._alike(name, ups), self._shape
        assert gate.num_rows == up.num_rows == shape.feed_forward
        quantized = self._quantizes(name, [gate, up])
        assert gate.num_columns == up.num_columns == self._normed.width
        row_bytes = self._dispatch(name, self._normed, quantized=quantized, by_row=False)
        values = {
            **self._given("slots"), "x": self._addresses["rows"], "row_bytes": row_bytes,
            "columns": gate.num_columns, "out": self._gated_rows.address,
            "out_stride": self._gated_rows.stride, "num_tiles": gate.num_tiles,
            "gate_kernel": self._kernel(gate, "tile"), "gates": self._table(gates),
            "gate_tile_bytes": gate.stride,
            "up_kernel": self._kernel(up, "tile"), "ups": self._table(ups),
            "up_tile_bytes": up.stride,
        }  # fmt: skip
        form = costs.experts_gated_form(
            _shape(gate), _shape(up), shape.num_experts, shape.num_chosen, quantized=quantized
        )
        self._add(
            name, "matmul", "experts_gated", EXPERTS_GATED, values, "experts", form,
            tiles_per_block=gate.num_tiles,
        )  # fmt: skip

    def experts_down(self, name: str, matrices: Sequence[Matrix]) -> None:
        """hidden += the sum over a token's experts of weight * (matrix . gated)"""
        matrix, shape = self._alike(name, matrices), self._shape
        assert matrix.num_columns == shape.feed_forward
        assert matrix.num_rows == self._hidden.width
        quantized = self._quantizes(name, [matrix])
        source = self._gated_rows
        x, row_bytes = source.address, source.stride
        if quantized:
            row_bytes = self._dispatch(name, source, quantized=True, by_row=True)
            x = self._addresses["rows"]
        values = {
            **self._given("slots", "row_tokens", "row_weights"), "x": x,
            "x_private": int(quantized), "row_bytes": row_bytes, "columns": matrix.num_columns,
            "out": self._hidden.address, "out_stride": self._hidden.stride,
            "kernel": self._kernel(matrix, "tile"), "matrices": self._table(matrices),
            "tile_bytes": matrix.stride,
        }  # fmt: skip
        form = costs.experts_down_form(
            _shape(matrix), shape.num_experts, shape.num_chosen, quantized=quantized
        )
        self._add(
            name, "matmul", "experts_down", EXPERTS_DOWN, values, matrix.num_tiles, form
        )  # fmt: skip

    def _dispatch(self, name: str, source: _Buffer, *, quantized: bool, by_row: bool) -> int:
        """Writes what the experts read; returns a row's bytes."""
        row_bytes = source.width // GROUP * ACTIVATION_GROUP if quantized else source.stride
        assert row_bytes <= self._row_bytes
        values = {
            "x": source.address, "x_stride": source.stride, "x_private": int(source.private),
            "columns": source.width, "out": self._addresses["rows"], "row_bytes": row_bytes,
            "num_chosen": self._shape.num_chosen, **self._given("places"),
            "quantize": int(quantized), "by_row": int(by_row),
        }  # fmt: skip
        form = costs.dispatch_form(
            source.width, self._shape.num_chosen, quantized=quantized, by_row=by_row
        )
        self._add(
            f"{name}.{'quantize' if quantized else 'gather'}", "activation", "dispatch",
            DISPATCH, values, "tokens", form, replicable=True,
        )  # fmt: skip
        return row_bytes

    def _given(self, *names: str) -> dict[str, int]:
        return {name: self._addresses[name] for name in names}

    def _table(self, matrices: Sequence[Matrix]) -> int:
        return self._pointer(np.array([matrix.address for matrix in matrices], np.int64))

    def _alike(self, name: str, matrices: Sequence[Matrix]) -> Matrix:
        """One of the experts' matrices, which must all have its format and its stride."""
        first = matrices[0]
        assert len(matrices) == self._shape.num_experts
        assert all(m.num_rows == first.num_rows for m in matrices)
        if any((m.format, m.stride) != (first.format, first.stride) for m in matrices):
            raise UnsupportedModelError(
                f"{name}: its experts are stored in different formats; Cyclewise needs them alike."
            )
        return first

    @staticmethod
    def _quantizes(name: str, matrices: Sequence[Matrix]) -> bool:
        """Whether the matrices read int8 activations."""
        floats = {matrix.format in FLOAT_FORMATS for matrix in matrices}
        if len(floats) > 1:
            raise UnsupportedModelError(
                f"{name}: its matrices are partly float and partly quantized; "
                "Cyclewise needs them alike."
            )
        return floats == {False}
