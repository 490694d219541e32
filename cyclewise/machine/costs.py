"""What a moment costs in closed form: operations and bytes of a batch.

`program.py` writes a `Form` beside each moment, in numbers that a batch's shape multiplies; the
clock divides what comes out by the machine's roofs. The bytes are those that must move: weights
once a step, activations in and out once, the keys and values that are read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    @property
    def num_pairs(self) -> int:
        """Pairs of a query token and a key that it sees."""
        return sum(count * first + count * (count + 1) // 2 for count, first in self.chunks)

    @property
    def num_keys(self) -> int:
        """Tokens whose keys and values are read, each once a chunk."""
        return sum(first + count for count, first in self.chunks)


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """A weight matrix as its moment streams it."""

    format: str
    rows: int
    columns: int
    num_bytes: int
    """Packed."""


@dataclass(frozen=True, slots=True)
class Form:
    """The closed form of a moment. A *row* is a token, or a row of logits where `of_logits`."""

    unit: Unit = "fma"
    operations_per_row: int = 0
    """A multiply-add is two operations."""
    operations_per_pair: int = 0
    matrices: tuple[MatrixShape, ...] = ()
    weight_bytes: int = 0
    """Of weights, read once a step."""
    bytes_per_row: int = 0
    """Of activations, read or written; of an embedding table's row too."""
    kv_bytes_per_row: int = 0
    """Of keys and values, written."""
    kv_bytes_per_key: int = 0
    """Of keys and values, read."""
    of_logits: bool = False


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


def cost(form: Form, batch: BatchShape) -> Cost:
    """Evaluates a closed form for a batch; a moment left out of it costs nothing."""
    rows = batch.num_logits if form.of_logits else batch.num_tokens
    if not rows:
        return Cost(form.unit, 0, 0, 0, 0)
    return Cost(
        unit=form.unit,
        operations=form.operations_per_row * rows + form.operations_per_pair * batch.num_pairs,
        weight_bytes=form.weight_bytes,
        activation_bytes=form.bytes_per_row * rows,
        kv_bytes=form.kv_bytes_per_row * rows + form.kv_bytes_per_key * batch.num_keys,
    )
