"""BF16 matrices where the processor multiplies them: VDPBF16PS, two columns a lane.

Activations are rounded to bfloat16 (ties to even, subnormals to 0), a block of 256 columns at a
time. In a block every second pair of columns has a sum of its own, since an instruction waits for
the one before it; their total is added to the token's, block after block. So a token's bits do not
depend on how many come with it, but they are those of this target alone: elsewhere BF16 weights
meet float32 activations (`float_matmul.py`).
"""

from __future__ import annotations

from cyclewise.machine.kernels.blocks import ROWS
from cyclewise.machine.kernels.float_matmul import BLOCK_COLUMNS, FloatMatmul
from cyclewise.machine.kernels.lang import BF16, F32, I16, I32, Emitter, Value, vector

CHAINS = 2
"""Sums of a token in a block."""
PAIR_BYTES = 4 * ROWS


class BfloatMatmul(FloatMatmul):
    """Writes the unit of BF16."""

    def write(self, emitter: Emitter) -> None:
        self.emitter = emitter
        tiles = emitter.target.token_tiles
        functions = {
            tile: emitter.function(
                f"pairs_{tile}", 6, lambda *a, tile=tile: self._pairs(tile, *a), exported=False
            )
            for tile in tiles
        }

        def tile(
            weights: Value, columns: Value, x: Value, stride: Value, tokens: Value, sums: Value,
            scratch: Value,
        ) -> None:  # fmt: skip
            with emitter.range(0, tokens) as token:
                emitter.store(sums + token * 64, emitter.constant(0.0, vector(F32, ROWS)))
            with emitter.range(0, columns, BLOCK_COLUMNS) as first_column:
                rest = columns - first_column
                count = (rest < BLOCK_COLUMNS).select(rest, emitter.constant(BLOCK_COLUMNS))
                block = weights + first_column * self.column_bytes

                def call(size: int, first: Value) -> None:
                    at, to = x + first * stride + first_column * 4, sums + first * 64
                    emitter.call(functions[size], block, count, at, stride, to, scratch)

                emitter.in_tiles(tokens, tiles, call)

        emitter.function(f"tile_{self.name}", 7, tile)
        emitter.function(f"row_{self.name}", 5, self._row)

    def _pairs(
        self, tokens: int, weights: Value, columns: Value, x: Value, stride: Value, out: Value,
        scratch: Value,
    ) -> None:  # fmt: skip
        """A block times some tokens, added to `out`."""
        emitter, floats = self.emitter, vector(F32, ROWS)
        token_bytes = BLOCK_COLUMNS * 2
        for i in range(tokens):
            self._round(x + stride * i, columns, scratch + i * token_bytes)
        zero = emitter.constant(0.0, floats)
        sums = [[emitter.variable(zero) for _ in range(tokens)] for _ in range(CHAINS)]

        def add(chain: int, pair: Value) -> None:
            at = weights + pair * PAIR_BYTES
            emitter.prefetch(at + BLOCK_COLUMNS * self.column_bytes)
            words = emitter.load(at, vector(I32, ROWS))
            for i, total in enumerate(sums[chain]):
                x_pair = emitter.broadcast(scratch + i * token_bytes + pair * 4, I32, ROWS)
                total.set(self._vdpbf16ps(total.get(), words, x_pair))

        pairs = (columns + 1) >> 1
        with emitter.range(0, pairs & -CHAINS, CHAINS) as pair:
            for chain in range(CHAINS):
                add(chain, pair + chain)
        with emitter.when((pairs & 1).differs(0)):
            add(0, pairs - 1)
        for i, (first, second) in enumerate(zip(*sums, strict=True)):
            to = out + i * 64
            emitter.store(to, emitter.load(to, floats) + (first.get() + second.get()))

    def _round(self, x: Value, columns: Value, to: Value) -> None:
        """float32 to bfloat16, and zeros behind the last up to a multiple of 16."""
        emitter, floats = self.emitter, vector(F32, 16)

        def store(value: Value, at: Value) -> None:
            name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
            rounded = emitter.intrinsic(name, vector(BF16, 16), value)
            emitter.store(to + at * 2, emitter.bitcast(rounded, vector(I16, 16)))

        whole = columns & -16
        with emitter.range(0, whole, 16) as at:
            store(emitter.load(x + at * 4, floats), at)
        with emitter.when(whole < columns):
            last = emitter.stack(64)
            emitter.store(last, emitter.constant(0.0, floats))
            with emitter.range(whole, columns) as at:
                emitter.store(last + (at - whole) * 4, emitter.load(x + at * 4, F32))
            store(emitter.load(last, floats), whole)

    def _vdpbf16ps(self, total: Value, weights: Value, x: Value) -> Value:
        emitter, halves = self.emitter, vector(BF16, 2 * ROWS)
        pairs = [emitter.bitcast(value, halves) for value in (weights, x)]
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return emitter.intrinsic(name, total.type, total, *pairs)
