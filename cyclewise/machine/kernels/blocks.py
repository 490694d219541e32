"""How packed weights lie in memory, and how a kernel reads them: one class a format.

Weights are packed into tiles of 16 rows. A tile is a run of *groups* of 32 columns; in a group,
*step* s (0..7) holds columns 4s..4s+3 of every row, four bytes a row, so that a register of step
bytes has one row in each 32-bit lane. Codes of fewer bits share bytes; a *word* is 64 bytes of a
group, four for each row. Formats of several groups a block keep them together, scales before them.

A reader gives, for a group and a part of the tile's rows (`lanes` of them): the step's codes as
bytes, the scale and, where the format has one, the minimum as float32. What a weight is worth:
`scale * (code - zero_point) + minimum`. Formats with scales of 16 columns (`sub_scales`) multiply
by those as well, and `scale` is the super-block's.

The formats are ggml's; the block layouts are those of ggml-common.h, reordered without loss. Those
of integers with a zero point (`I4_128` and its like) are ours: `weights/formats.py` says what lies
in a row of theirs.
"""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import (
    GROUP,
    ROWS,
    STEPS,
    BlockFormat,
    Group,
    five_bits,
    load_bytes,
    load_halves,
    load_words,
    nibbles,
)
from cyclewise.machine.kernels.lang import Emitter, Value
from cyclewise.machine.kernels.lookup_blocks import IQ4_NL, IQ4_XS, MXFP4
from cyclewise.machine.kernels.super_blocks import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

__all__ = [
    "BLOCK_FORMATS",
    "FLOAT_FORMATS",
    "GROUP",
    "ROWS",
    "STEPS",
    "BlockFormat",
    "block_shape",
    "tile_bytes",
]


class Q4_0(BlockFormat):
    """256 bytes of nibbles, 16 float16 scales."""

    name, bits, zero_point, block_bytes = "Q4_0", 4, 8, 288

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return nibbles(emitter, block, step, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 256, part)


class Q4_1(Q4_0):
    """256 bytes of nibbles, 16 float16 scales, 16 float16 minima."""

    name, zero_point, has_minimum, block_bytes = "Q4_1", 0, True, 320

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 288, part)


class Q5_0(BlockFormat):
    """5 words of codes a row, 16 float16 scales."""

    name, bits, zero_point, block_bytes = "Q5_0", 5, 16, 352

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return five_bits(emitter, block, step, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 320, part)


class Q5_1(Q5_0):
    """5 words of codes a row, 16 float16 scales, 16 float16 minima."""

    name, has_own_zero_point, has_minimum, block_bytes = "Q5_1", False, True, 384

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 352, part)


class I4_32(BlockFormat):
    """16 float16 scales, 16 bytes of zero points, 4 words of nibbles a row."""

    name, bits, has_minimum, block_bytes = "I4_32", 4, True, 304

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        codes_at = self.block_bytes - 256 * self.groups_per_block
        return nibbles(emitter, block + codes_at + group * 256, step, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block, part)

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        zero_points = emitter.to_float(load_bytes(emitter, block + 32, part))
        value = self.scale(emitter, block, group, part) * zero_points
        return emitter.constant(-0.0, value.type) - value


class I4_64(I4_32):
    """16 float16 scales, 16 bytes of zero points and of nothing, 2 groups of 4 words of nibbles."""

    name, groups_per_block, block_bytes = "I4_64", 2, 576


class I4_128(I4_64):
    """The same with 4 groups."""

    name, groups_per_block, block_bytes = "I4_128", 4, 1088


class I8_32(BlockFormat):
    """16 float16 scales, 16 bytes of signed zero points, 512 bytes of signed codes."""

    name, bits, has_minimum, block_bytes = "I8_32", 8, True, 560
    codes_are_bytes, prefetch_bytes = True, 1024

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return load_words(emitter, block + 48 + group * 512 + step * 64, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block, part)

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        zero_points = emitter.to_float(load_bytes(emitter, block + 32, part, "sext"))
        value = self.scale(emitter, block, group, part) * zero_points
        return emitter.constant(-0.0, value.type) - value


class I8_64(I8_32):
    """The same with 2 groups of codes."""

    name, groups_per_block, block_bytes = "I8_64", 2, 1072


class I8_128(I8_32):
    """The same with 4."""

    name, groups_per_block, block_bytes = "I8_128", 4, 2096


class Q8_0(BlockFormat):
    """512 bytes of signed codes, 16 float16 scales. The codes are read signed (zero point 0)."""

    name, bits, block_bytes = "Q8_0", 8, 544
    codes_are_bytes, prefetch_bytes = True, 1024

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return load_words(emitter, block + step * 64, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 512, part)


BLOCK_FORMATS: dict[str, BlockFormat] = {
    kind.name: kind() for kind in (
        Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4,
        I4_32, I4_64, I4_128, I8_32, I8_64, I8_128,
    )
}  # fmt: skip

FLOAT_FORMATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Formats whose weights meet float32 activations, with the bytes of a weight. A tile's column k is
16 weights; of BF16 a pair of columns is 16 pairs of weights.
"""


def block_shape(name: str) -> tuple[int, int]:
    """Columns and bytes of a packed block of a tile of 16 rows."""
    if name in FLOAT_FORMATS:
        columns = 2 if name == "BF16" else 1
        return columns, columns * FLOAT_FORMATS[name] * ROWS
    kind = BLOCK_FORMATS[name]
    return GROUP * kind.groups_per_block, kind.block_bytes


def tile_bytes(name: str, columns: int) -> int:
    """Bytes of one packed tile of 16 rows."""
    block_columns, block_bytes = block_shape(name)
    return -(-columns // block_columns) * block_bytes
