"""Matrix kernels of F32, F16 and BF16: weights as float32 times float32 activations.

The products of 256 columns are added up from 0, one fused multiply-add a column, in order; these
sums are added to a token's in order. So a token's bits do not depend on how many come with it, and
one alone can have four blocks of columns under way at once: a chain of multiply-adds waits for
itself longer than memory takes, and four streams are fetched faster than one.
"""

from __future__ import annotations

from collections.abc import Callable

from cyclewise.machine.kernels.blocks import FLOAT_FORMATS, ROWS
from cyclewise.machine.kernels.lang import F32, I16, I32, Emitter, Value, Variable, vector

BLOCK_COLUMNS = 256
UNROLL = 4
"""Columns of a turn of the loop."""


class FloatMatmul:
    """Writes the unit of a float format."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.column_bytes = ROWS * FLOAT_FORMATS[name]

    def write(self, emitter: Emitter) -> None:
        self.emitter, self.lanes = emitter, emitter.target.lanes
        self.floats, self.parts = vector(F32, self.lanes), ROWS // self.lanes
        tiles = tuple(tile for tile in emitter.target.token_tiles if tile <= 8)
        functions = {
            tile: emitter.function(
                f"float_{tile}", 5, lambda *a, tile=tile: self._tile(tile, *a), exported=False
            )
            for tile in tiles
        }

        def tile(
            weights: Value, columns: Value, x: Value, stride: Value, tokens: Value, sums: Value,
            _: Value,
        ) -> None:  # fmt: skip
            def call(count: int, first: Value) -> None:
                at, to = x + first * stride, sums + first * 64
                emitter.call(functions[count], weights, columns, at, stride, to)

            emitter.in_tiles(tokens, tiles, call)

        emitter.function(f"tile_{self.name}", 7, tile)
        emitter.function(f"row_{self.name}", 5, self._row)

    def _row(self, weights: Value, columns: Value, lane: Value, out: Value, _: Value) -> None:
        """One row as float32: an embedding."""
        emitter, size = self.emitter, FLOAT_FORMATS[self.name]
        with emitter.range(0, columns) as column:
            at = weights + (column * ROWS + lane) * size
            if self.name == "F32":
                value = emitter.load(at, F32)
            elif self.name == "F16":
                value = emitter.half_to_float(emitter.load(at, vector(I16, 1)))
            else:
                at = weights + ((column >> 1) * ROWS + lane) * 4 + (column & 1) * 2
                value = emitter.bitcast(emitter.cast(emitter.load(at, I16), I32, "zext") << 16, F32)
            emitter.store(out + column * 4, value)

    def _load(self, column: Value, part: int, odd: bool) -> Value:
        """A part of the rows of one column, as float32.

        BF16 has the weights of an even column and the next in turns, row by row.
        """
        emitter, at = self.emitter, column + part * self.lanes * FLOAT_FORMATS[self.name]
        if self.name == "F32":
            return emitter.load(at, self.floats)
        if self.name == "F16":
            return emitter.half_to_float(emitter.load(at, vector(I16, self.lanes)))
        pair = column - odd * self.column_bytes + part * self.lanes * 4
        words = emitter.load(pair, vector(I32, self.lanes))
        return emitter.bitcast(words & -0x10000 if odd else words << 16, self.floats)

    def _zeros(self, tokens: int) -> list[list[Variable]]:
        """Sums, (part, token)."""
        zero = self.emitter.constant(0.0, self.floats)
        return [[self.emitter.variable(zero) for _ in range(tokens)] for _ in range(self.parts)]

    def _multiply(
        self, sums: list[list[Variable]], weights: Value, x: Value, stride: Value, columns: int
    ) -> None:
        """Adds the products of some columns, from an even one on, to the sums."""
        emitter = self.emitter
        for offset in range(0, columns * self.column_bytes, 64):
            emitter.prefetch(weights + (BLOCK_COLUMNS * self.column_bytes + offset))
        for column in range(columns):
            at = weights + column * self.column_bytes
            found = [self._load(at, part, column % 2 == 1) for part in range(self.parts)]
            for i in range(len(sums[0])):
                value = emitter.broadcast(x + stride * i + column * 4, F32, self.lanes)
                for total, weight in zip(sums, found, strict=True):
                    total[i].set(emitter.fma(weight, value, total[i].get()))

    def _over_columns(self, columns: Value, write: Callable[[Value, int], None]) -> None:
        """`write(column, count)` for all columns of less than a block."""
        emitter = self.emitter
        with emitter.range(0, columns & -2, 2) as column:
            write(column, 2)
        with emitter.when((columns & 1).differs(0)):
            write(columns - 1, 1)

    def _tile(
        self, tokens: int, weights: Value, columns: Value, x: Value, stride: Value, out: Value
    ) -> None:
        emitter, totals = self.emitter, self._zeros(tokens)

        def multiply(sums: list[list[Variable]], column: Value, width: int) -> None:
            at = weights + column * self.column_bytes
            self._multiply(sums, at, x + column * 4, stride, width)

        def add(sums: list[list[Variable]]) -> None:
            for of_part, added in zip(totals, sums, strict=True):
                for total, value in zip(of_part, added, strict=True):
                    total.add(value.get())

        def blocks(first: Value, count: int) -> None:
            sums = [self._zeros(tokens) for _ in range(count)]
            with emitter.range(first, first + BLOCK_COLUMNS, UNROLL) as column:
                for number, found in enumerate(sums):
                    multiply(found, column + number * BLOCK_COLUMNS, UNROLL)
            for found in sums:
                add(found)

        done = emitter.variable(emitter.constant(0))
        for count in [size for size in (4, 2, 1) if size * tokens <= 4 or size == 1]:
            with emitter.loop() as leave_if:
                leave_if(done.get() + count * BLOCK_COLUMNS > columns)
                blocks(done.get(), count)
                done.add(count * BLOCK_COLUMNS)
        rest = done.get()
        with emitter.when(rest < columns):
            sums = self._zeros(tokens)
            self._over_columns(
                columns - rest, lambda column, width: multiply(sums, rest + column, width)
            )
            add(sums)
        for part in range(self.parts):
            for i in range(tokens):
                emitter.store(out + i * 64 + part * self.lanes * 4, totals[part][i].get())
