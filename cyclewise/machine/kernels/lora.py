"""LoRA adapters (Hu et al., 2021): to W x comes scale * B (A x), for the tokens that have one.

`lora_a` is a moment's kernel: A x, of float32 activations, for all matrices that share an input.
Their A's lie one below the other, so that small ranks fill a tile of 16 rows together. Columns are
cut into *splits* that threads take apart, and the sums of each lie in

    low    (tiles, splits, MAX_BATCH_TOKENS, 16)   float32

`lora_b_<format>` adds B's part to the sums of one tile of a matrix, before bias and activation:
`linear.py` calls it. It adds the splits up in order, takes the scale, and multiplies eight columns
of B at a time, each eight from 0. So a token's bits depend neither on what comes with it nor on
which adapters the other tokens of the batch have.

Tokens come in *runs* (`layout.RUN`) of one adapter; those without one are in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir

from cyclewise.machine.kernels.blocks import FLOAT_FORMATS, ROWS
from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.float_matmul import FloatMatmul
from cyclewise.machine.kernels.lang import F32, Emitter, Value, Variable, vector
from cyclewise.machine.kernels.layout import (
    BATCH,
    LORA_A,
    LORA_A_MATRIX,
    LORA_B,
    LORA_B_MATRIX,
    RUN,
    THREAD,
    Record,
)
from cyclewise.machine.kernels.linear import MAX_BATCH_TOKENS

SPLIT_COLUMNS = 1024
"""Whole blocks of the matrix kernels."""
BLOCK_TOKENS = 64
"""Tokens that a tile of `lora_a` takes."""
BLOCK_COLUMNS = 8
"""Columns of B that are added up from 0; every A has so many rows, or a multiple of it."""
SPLIT_BYTES = MAX_BATCH_TOKENS * ROWS * 4
_TOKEN_TILES = (6, 4, 2, 1)


def _lora_a(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """A tile is one split of 16 rows of the A's, for a block of tokens."""
    m, t = Record(emitter, moment, LORA_A), Record(emitter, thread, THREAD)
    x = m.x + t.private * m.x_private
    per_block = m.num_slots * m.num_splits
    with emitter.range(first, last) as index:
        begin = index // per_block * BLOCK_TOKENS
        place = index % per_block
        slot, column = place // m.num_splits, place % m.num_splits * SPLIT_COLUMNS
        columns = emitter.minimum(m.columns - column, emitter.constant(SPLIT_COLUMNS))
        low = m.low + place * SPLIT_BYTES
        with _runs(emitter, batch) as (adapter, run_first, run_last):
            matrix = _of_adapter(emitter, moment, LORA_A, LORA_A_MATRIX, adapter)
            token = emitter.maximum(run_first, begin)
            count = emitter.minimum(run_last, begin + BLOCK_TOKENS) - token
            with emitter.when((count > 0) & (matrix.num_tiles > slot)):
                weights = matrix.weights + slot * matrix.tile_bytes + column * matrix.column_bytes
                at, to = x + token * m.x_stride + column * 4, low + token * (ROWS * 4)
                emitter.call_address(
                    matrix.kernel, weights, columns, at, m.x_stride, count, to, t.scratch
                )


@contextmanager
def _runs(emitter: Emitter, batch: Value) -> Iterator[tuple[Value, Value, Value]]:
    """A loop over the batch's runs: adapter, first token, and the one behind the last."""
    b = Record(emitter, batch, BATCH)
    with emitter.range(0, b.num_runs) as index:
        run = Record(emitter, b.runs + index * (8 * len(RUN)), RUN)
        yield run.adapter, run.first_token, run.first_token + run.num_tokens


def _of_adapter(
    emitter: Emitter, address: Value, head: tuple[str, ...], fields: tuple[str, ...], adapter: Value
) -> Record:
    """An adapter's record behind a head."""
    return Record(emitter, address + (8 * len(head) + adapter * (8 * len(fields))), fields)


class _Adding(FloatMatmul):
    """Writes `lora_b_<format>(table, batch, tile, sums)`."""

    def write(self, emitter: Emitter) -> None:
        self.emitter, self.lanes = emitter, emitter.target.lanes
        self.floats, self.parts = vector(F32, self.lanes), ROWS // self.lanes
        one = emitter.function(f"add_{self.name}_1", 5, self._one, exported=False)
        functions: dict[int, ir.Function] = {
            tokens: emitter.function(
                f"add_{self.name}_{tokens}", 5, lambda *a, tokens=tokens: self._several(tokens, *a),
                exported=False,
            )
            for tokens in _TOKEN_TILES[:-1]
        } | {1: one}  # fmt: skip

        def add(table: Value, batch: Value, tile: Value, sums: Value) -> None:
            with _runs(emitter, batch) as (adapter, first, last):
                record = table + (8 * len(LORA_B) + adapter * (8 * len(LORA_B_MATRIX)))
                matrix = Record(emitter, record, LORA_B_MATRIX)
                weights = matrix.weights + tile * matrix.tile_bytes

                def call(tokens: int, at: Value) -> None:
                    to = sums + (first + at) * (ROWS * 4)
                    emitter.call(functions[tokens], table, record, weights, first + at, to)

                with emitter.when(matrix.num_blocks > 0):
                    emitter.in_tiles(last - first, _TOKEN_TILES, call)

        emitter.function(f"lora_b_{self.name}", 4, add)

    def _one(self, table: Value, record: Value, weights: Value, first: Value, sums: Value) -> None:
        """Onto one token's sums. Nothing goes by way of memory, and the next tile's weights, which
        are few, are asked for: a token that decodes would wait for either.
        """
        emitter = self.emitter
        next_tile = weights + Record(emitter, record, LORA_B_MATRIX).tile_bytes
        places = [sums + part * self.lanes * 4 for part in range(self.parts)]
        totals = [emitter.variable(emitter.load(to, self.floats)) for to in places]
        with self._blocks(1, table, record, first) as (offset, x):
            for ahead in range(0, BLOCK_COLUMNS * self.column_bytes, 64):
                emitter.prefetch(next_tile + offset + ahead)

            def value(_: int, column: int) -> Value:
                return emitter.shuffle(x[0], x[0], [column] * self.lanes)

            products = self._products(1, weights + offset, value)
            for total, (product,) in zip(totals, products, strict=True):
                total.add(product.get())
        for total, to in zip(totals, places, strict=True):
            emitter.store(to, total.get())

    def _several(
        self, tokens: int, table: Value, record: Value, weights: Value, first: Value, sums: Value
    ) -> None:
        """Onto the sums of some tokens, in memory: registers hold those of a block."""
        emitter, x_bytes = self.emitter, BLOCK_COLUMNS * 4
        stored = emitter.stack(-(-tokens * x_bytes // 64) * 64)
        with self._blocks(tokens, table, record, first) as (offset, x):
            for i, of_token in enumerate(x):
                emitter.store(stored + i * x_bytes, of_token)

            def value(token: int, column: int) -> Value:
                at = stored + (token * BLOCK_COLUMNS + column) * 4
                return emitter.broadcast(at, F32, self.lanes)

            products = self._products(tokens, weights + offset, value)
            for part, of_part in enumerate(products):
                for i, product in enumerate(of_part):
                    to = sums + i * (ROWS * 4) + part * self.lanes * 4
                    emitter.store(to, emitter.load(to, self.floats) + product.get())

    @contextmanager
    def _blocks(
        self, tokens: int, table: Value, record: Value, first: Value
    ) -> Iterator[tuple[Value, list[Value]]]:
        """A loop over blocks of columns: where in a tile they lie, and what they meet of each
        token's A x, scaled.
        """
        emitter = self.emitter
        head, matrix = Record(emitter, table, LORA_B), Record(emitter, record, LORA_B_MATRIX)
        num_splits, first_row = head.num_splits, matrix.first_row
        lows = head.low + first * (ROWS * 4)
        scale = emitter.splat(matrix.float("scale"), BLOCK_COLUMNS)
        with emitter.range(0, matrix.num_blocks) as block:
            row = first_row + block * BLOCK_COLUMNS
            low = lows + (row >> 4) * num_splits * SPLIT_BYTES + (row & 15) * 4
            totals = [self._total(low + i * (ROWS * 4), num_splits) for i in range(tokens)]
            offset = block * (BLOCK_COLUMNS * self.column_bytes)
            yield offset, [total * scale for total in totals]

    def _products(
        self, tokens: int, weights: Value, value: Callable[[int, int], Value]
    ) -> list[list[Variable]]:
        """A block of columns times `value(token, column)`: (part, token)."""
        found = self._zeros(tokens)
        for column in range(BLOCK_COLUMNS):
            at = weights + column * self.column_bytes
            values = [self._load(at, part, column % 2 == 1) for part in range(self.parts)]
            for i in range(tokens):
                factor = value(i, column)
                for of_part, weight in zip(found, values, strict=True):
                    of_part[i].set(self.emitter.fma(weight, factor, of_part[i].get()))
        return found

    def _total(self, low: Value, num_splits: Value) -> Value:
        """Of all splits, eight columns of a token's A x."""
        emitter, floats = self.emitter, vector(F32, BLOCK_COLUMNS)
        total = emitter.variable(emitter.load(low, floats))
        with emitter.range(1, num_splits) as split:
            total.add(emitter.load(low + split * SPLIT_BYTES, floats))
        return total.get()


def lora_unit() -> Unit:
    def write(emitter: Emitter) -> None:
        emitter.function("lora_a", 5, lambda *a: _lora_a(emitter, *a))
        for name in FLOAT_FORMATS:
            _Adding(name).write(emitter)

    return Unit("lora", write, ("lora_a", *(f"lora_b_{name}" for name in FLOAT_FORMATS)))
