"""What a moment costs in closed form: operations and bytes of a batch.

`builder.py` writes a `Form` beside each moment, in numbers that a batch's shape multiplies; the
clock divides what comes out by the machine's roofs.

*Operations* are those of the model's arithmetic over its true rows and columns, not over the
padding of a kernel: a multiply-add is two; an addition, multiplication, division, maximum, square
root, rounding, magnitude, negation, exponential or hyperbolic tangent is one; a sum of n terms is
n. Reading a format (unpacking codes, scaling groups, widening float16) is no operation but a
kernel's way to the weight; converting, clamping and guarding against zero are none either, nor is a
pair that the causal mask or a window hides.

*Bytes* are those that must move: weights once a step, packed as they are streamed, with biases and
the weights of norms; activations in and out once; keys and values that are written, and those
that each chunk reads once. What a kernel reads again, from whatever cache, is not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cyclewise.machine.kernels.blocks import GROUP
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP
from cyclewise.machine.kernels.pages import SCALE_BYTES
from cyclewise.machine.names import CacheKind

Unit = Literal["dot", "fma"]
"""Whose rate bounds a moment's arithmetic: the target's dot product of 8-bit integers, or the
float32 multiply-add.
"""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What of a batch its cost depends on."""

    chunks: tuple[tuple[int, int], ...]
    """(tokens, position of the first) of each chunk."""
    num_logits: int

    @property
    def num_tokens(self) -> int:
        return sum(count for count, _ in self.chunks)

    def num_pairs(self, window: int | None = None) -> int:
        """Pairs of a query token and a key that it sees: itself and all before it, at most
        `window`.
        """
        return sum(_pairs(count, first, window) for count, first in self.chunks)

    def num_earlier_keys(self, window: int | None = None) -> int:
        """Those of the keys that are read which earlier steps wrote."""
        return sum(first if window is None else min(first, window - 1) for _, first in self.chunks)

    def num_keys(self, window: int | None = None) -> int:
        """Tokens whose keys and values are read, each once a chunk."""
        return self.num_earlier_keys(window) + self.num_tokens


def _pairs(count: int, first: int, window: int | None) -> int:
    """Of `count` tokens, the first at position `first`."""
    if window is None:
        return count * first + count * (count + 1) // 2
    growing = min(count, max(0, window - first))
    return _pairs(growing, first, None) + (count - growing) * window


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """A weight matrix as its moment streams it."""

    format: str
    rows: int
    columns: int
    num_bytes: int
    """Packed, in whole tiles of 16 rows."""


@dataclass(frozen=True, slots=True)
class Form:
    """The closed form of a moment. A *row* is a token, or a row of logits where `of_logits`."""

    unit: Unit = "fma"
    operations_per_row: int = 0
    operations_per_pair: int = 0
    """Of a query token and a key that it sees."""
    matrices: tuple[MatrixShape, ...] = ()
    """It multiplies by them."""
    weight_bytes: int = 0
    """Of matrices, biases and the weights of norms, read once a step; of experts, those of the ones
    that one token chooses.
    """
    bytes_per_row: int = 0
    """Of activations, read and written; and what of a table a token takes: its row of the
    embedding, its angles.
    """
    kv_bytes_per_row: int = 0
    """Of keys and values, written."""
    kv_bytes_per_key: int = 0
    """Of keys and values, read."""
    window: int | None = None
    """Keys that a token sees at most, its own among them."""
    of_logits: bool = False
    num_experts: int = 0
    """Its matrices are one expert's, and there are so many experts; 0: it has none."""
    num_chosen: int = 0
    """Experts that a row goes through."""

    @property
    def reads_keys(self) -> bool:
        """Whether its cost depends on how much went before the batch's tokens."""
        return bool(self.operations_per_pair or self.kv_bytes_per_key)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's matrices."""
        return sum(matrix.num_bytes for matrix in self.matrices) if self.num_experts else 0

    def experts_read(self, rows: int) -> float:
        """Experts that at least one of the rows chooses, on average, if each row chooses evenly and
        on its own: E (1 - (1 - k / E)^n). A single row reads exactly those that it chooses.
        """
        missed: float = (1 - self.num_chosen / max(1, self.num_experts)) ** rows
        return self.num_experts * (1 - missed)

    def weight_bytes_of(self, rows: int, experts_read: float | None = None) -> int:
        """Of a batch of so many rows: those of every expert that one of them chooses, of so many
        as `experts_read` says if that is known.
        """
        read = self.experts_read(rows) if experts_read is None else experts_read
        return self.weight_bytes + round(self.expert_bytes * (read - self.num_chosen))


@dataclass(frozen=True, slots=True)
class Cost:
    """A moment's operations and bytes for one batch."""

    unit: Unit
    operations: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.kv_bytes


# The closed forms, one a kernel

_FLOAT, _HALF = 4, 2
ACTIVATION_OPERATIONS = {"silu": 4, "gelu": 7}
"""silu is a negation, an exponential, an addition and a division; gelu has three products and a
difference in the negation's place.
"""


def embed_form(width: int, row_bytes: int, *, scaled: bool = False) -> Form:
    """A packed row of `row_bytes` becomes `width` float32."""
    return Form(operations_per_row=scaled * width, bytes_per_row=row_bytes + _FLOAT * width)


def norm_form(width: int, *, of_logits: bool = False, add: bool = False) -> Form:
    """Squares and their sum, mean, epsilon, root; a division and a multiplication a column; with
    `add` onto what was there.
    """
    return Form(
        operations_per_row=(4 + add) * width + 3,
        weight_bytes=_FLOAT * width,
        bytes_per_row=(2 + add) * _FLOAT * width,
        of_logits=of_logits,
    )


def layer_norm_form(width: int, *, of_logits: bool = False) -> Form:
    """Mean, differences, their squares' mean, epsilon and root; a division, a multiplication and an
    addition a column.
    """
    return Form(
        operations_per_row=7 * width + 4,
        weight_bytes=2 * _FLOAT * width,
        bytes_per_row=2 * _FLOAT * width,
        of_logits=of_logits,
    )


def positions_form(width: int, row_bytes: int) -> Form:
    """A packed row of `row_bytes` is added to what was there."""
    return Form(operations_per_row=width, bytes_per_row=row_bytes + 2 * _FLOAT * width)


def softcap_form(width: int) -> Form:
    """A division, a hyperbolic tangent and a multiplication a column."""
    return Form(operations_per_row=3 * width, bytes_per_row=2 * _FLOAT * width, of_logits=True)


def quantize_form(width: int, *, of_logits: bool = False) -> Form:
    """Magnitude, largest, product, rounding and sum a column; scale, its inverse and the scaled
    sum a group.
    """
    groups = width // GROUP
    return Form(
        operations_per_row=5 * width + 3 * groups,
        bytes_per_row=_FLOAT * width + ACTIVATION_GROUP * groups,
        of_logits=of_logits,
    )


def linear_form(
    matrices: tuple[MatrixShape, ...], biased_rows: int = 0, *, quantized: bool, add: bool = False,
    activation: str | None = None, of_logits: bool = False,
) -> Form:  # fmt: skip
    """Products with one input; a bias for `biased_rows` of them; with `add` onto what was there;
    with an activation each through it.
    """
    activated = ACTIVATION_OPERATIONS[activation] if activation else 0
    columns, rows = matrices[0].columns, sum(matrix.rows for matrix in matrices)
    return Form(
        unit="dot" if quantized else "fma",
        operations_per_row=(2 * columns + add + activated) * rows + biased_rows,
        matrices=matrices,
        weight_bytes=sum(matrix.num_bytes for matrix in matrices) + _FLOAT * biased_rows,
        bytes_per_row=_input_bytes(columns, quantized) + _FLOAT * rows * (1 + add),
        of_logits=of_logits,
    )


def gated_form(
    gate: MatrixShape, up: MatrixShape, activation: str = "silu", *, quantized: bool
) -> Form:
    """Two products, the gate's activation, and its product with the other one more."""
    per_row = ACTIVATION_OPERATIONS[activation] + 1
    return Form(
        unit="dot" if quantized else "fma",
        operations_per_row=2 * (gate.rows + up.rows) * gate.columns + per_row * gate.rows,
        matrices=(gate, up),
        weight_bytes=gate.num_bytes + up.num_bytes,
        bytes_per_row=_input_bytes(gate.columns, quantized) + _FLOAT * gate.rows,
    )


def lora_a_form(a: MatrixShape) -> Form:
    """Of an adapter: products with the A's of all matrices that share an input. `a.rows` is the sum
    of their ranks.
    """
    return replace(linear_form((a,), quantized=False), matrices=())


def with_lora_b(form: Form, ranks_and_matrices: Sequence[tuple[int, MatrixShape]]) -> Form:
    """A form of matrices to which an adapter's B's are added: A x takes its scale, meets B, and
    is added to the sums. `matrices` stay those of the base model.
    """
    operations = weight_bytes = row_bytes = 0
    for rank, b in ranks_and_matrices:
        operations += rank + (2 * rank + 1) * b.rows
        weight_bytes += b.num_bytes
        row_bytes += _FLOAT * rank
    return replace(
        form,
        operations_per_row=form.operations_per_row + operations,
        weight_bytes=form.weight_bytes + weight_bytes,
        bytes_per_row=form.bytes_per_row + row_bytes,
    )


def route_form(num_experts: int, num_chosen: int, *, normalize: bool) -> Form:
    """Each choice is the largest of all; then softmax, over the chosen or over all: a difference,
    an exponential and a part of the sum each, and a division for each chosen. An expert's number
    and weight are written.
    """
    summed = num_chosen if normalize else num_experts
    return Form(
        operations_per_row=num_chosen * num_experts + 3 * summed + num_chosen,
        bytes_per_row=_FLOAT * num_experts + 2 * _FLOAT * num_chosen,
    )


def dispatch_form(width: int, num_chosen: int, *, quantized: bool, by_row: bool) -> Form:
    """A token's activations are written once for each chosen expert, quantized or as they are;
    with `by_row` there are as many to begin with.
    """
    sources = num_chosen if by_row else 1
    once = quantize_form(width) if quantized else Form()
    return Form(
        operations_per_row=once.operations_per_row * sources,
        bytes_per_row=_FLOAT * width * sources + _input_bytes(width, quantized) * num_chosen,
    )


def experts_gated_form(
    gate: MatrixShape, up: MatrixShape, num_experts: int, num_chosen: int, *, quantized: bool
) -> Form:
    """`gated_form` of each chosen expert."""
    return _of_experts(gated_form(gate, up, quantized=quantized), num_experts, num_chosen)


def experts_down_form(
    matrix: MatrixShape, num_experts: int, num_chosen: int, *, quantized: bool
) -> Form:
    """A product for each chosen expert, and its weighed part in the sum, which is read and written
    once.
    """
    form = _of_experts(linear_form((matrix,), quantized=quantized), num_experts, num_chosen)
    rows = matrix.rows
    read = _input_bytes(matrix.columns, quantized) * num_chosen
    return replace(
        form,
        operations_per_row=form.operations_per_row + 2 * rows * num_chosen,
        bytes_per_row=read + 2 * _FLOAT * rows,
    )


def _of_experts(form: Form, num_experts: int, num_chosen: int) -> Form:
    return replace(
        form,
        operations_per_row=form.operations_per_row * num_chosen,
        weight_bytes=form.weight_bytes * num_chosen,
        bytes_per_row=form.bytes_per_row * num_chosen,
        num_experts=num_experts,
        num_chosen=num_chosen,
    )


def kv_bytes(num_kv_heads: int, head_dim: int, kv: CacheKind = "f16") -> int:
    """Of a token's keys and values in one layer: of int8 each head's codes and a scale."""
    head = head_dim * _HALF if kv == "f16" else head_dim + SCALE_BYTES
    return 2 * num_kv_heads * head


def rope_form(
    num_heads: int, num_kv_heads: int, head_dim: int, rope_dim: int, *,
    query_norm: bool = False, key_norm: bool = False, kv: CacheKind = "f16",
) -> Form:  # fmt: skip
    """A norm's operations for each head that has one; three for each rotated number of queries and
    keys, and the queries' scale; keys and values go to the cache.
    """
    normed = num_heads * query_norm + num_kv_heads * key_norm
    rotated = (num_heads + num_kv_heads) * rope_dim
    heads_read, heads_written = num_heads + 2 * num_kv_heads, num_heads
    return Form(
        operations_per_row=normed * (4 * head_dim + 3) + 3 * rotated + num_heads * head_dim,
        weight_bytes=_FLOAT * head_dim * (query_norm + key_norm),
        bytes_per_row=_FLOAT * ((heads_read + heads_written) * head_dim + rope_dim),
        kv_bytes_per_row=kv_bytes(num_kv_heads, head_dim, kv),
    )


def attention_form(
    num_heads: int, num_kv_heads: int, head_dim: int, *, window: int | None = None,
    softcap: bool = False, kv: CacheKind = "f16",
) -> Form:  # fmt: skip
    """A pair of a query and a key: a score, and a division, a tangent and a product where it is
    capped; its part in the maximum, the difference, the exponential and the sum; the value's
    weighing. In the end a division.
    """
    return Form(
        operations_per_row=num_heads * head_dim,
        operations_per_pair=num_heads * (4 * head_dim + 4 + 3 * softcap),
        bytes_per_row=2 * _FLOAT * num_heads * head_dim,
        kv_bytes_per_key=kv_bytes(num_kv_heads, head_dim, kv),
        window=window,
    )


def _input_bytes(columns: int, quantized: bool) -> int:
    if quantized:
        return columns // GROUP * ACTIVATION_GROUP
    return columns * _FLOAT


def cost(form: Form, batch: BatchShape, experts_read: int | None = None) -> Cost:
    """Evaluates a closed form for a batch; a moment left out of it costs nothing.

    `experts_read`: experts that the batch's tokens chose, where that is known; None: as many as
    `Form.experts_read` expects.
    """
    rows = batch.num_logits if form.of_logits else batch.num_tokens
    if not rows:
        return Cost(form.unit, 0, 0, 0, 0)
    return Cost(
        unit=form.unit,
        operations=form.operations_per_row * rows
        + form.operations_per_pair * batch.num_pairs(form.window),
        weight_bytes=form.weight_bytes_of(rows, experts_read),
        activation_bytes=form.bytes_per_row * rows,
        kv_bytes=form.kv_bytes_per_row * rows + form.kv_bytes_per_key * batch.num_keys(form.window),
    )
