"""How packed weights lie in memory, and how a kernel reads them: one class a format.

Weights are packed into tiles of 16 rows. A tile is a run of *groups* of 32 columns; in a group,
*step* s (0..7) holds columns 4s..4s+3 of every row, four bytes a row, so that a register of step
bytes has one row in each 32-bit lane. Formats with super-blocks of 256 columns keep their eight
groups together, scales behind them.

A reader gives, for a group and a part of the tile's rows (`lanes` of them): the step's codes as
bytes, the scale and, where the format has one, the minimum as float32. What a weight is worth:
`scale * (code - zero_point) + minimum`. Q6_K has groups of 16 columns: its 8-bit scales come
apart (`sub_scales`), and `scale` is the super-block's.

The formats are ggml's; the block layouts are those of ggml-common.h, reordered without loss.
"""

from __future__ import annotations

from cyclewise.machine.kernels.lang import F32, I8, I16, I32, Emitter, Value, vector

ROWS = 16
"""Rows of a tile."""
GROUP = 32
"""Columns of a group."""
STEPS = 8
"""Steps of a group."""


class BlockFormat:
    """A quantized format: its constants, and readers of one group."""

    name: str
    bits: int
    zero_point: int = 0
    has_minimum = False
    has_sub_scales = False
    groups_per_block: int = 1
    prefetch_bytes: int = 2048
    """How far ahead the stream of weights is asked for: the best of those measured."""
    block_bytes: int
    """Bytes of a block (`groups_per_block` groups) of a tile of 16 rows."""

    def codes(
        self, emitter: Emitter, block: Value, group: Value | int, step: int, part: int
    ) -> Value:
        raise NotImplementedError

    def scale(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        raise NotImplementedError

    def minimum(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        raise NotImplementedError

    def sub_scale(
        self, emitter: Emitter, block: Value, group: Value | int, half: int, part: int
    ) -> Value:
        """The scale of columns 16*half.. of a group, as int8 lanes."""
        raise NotImplementedError


def _load_words(emitter: Emitter, address: Value, part: int) -> Value:
    lanes = emitter.target.lanes
    return emitter.load(address + part * lanes * 4, vector(I32, lanes))


def _load_halves(emitter: Emitter, address: Value, part: int) -> Value:
    lanes = emitter.target.lanes
    return emitter.half_to_float(emitter.load(address + part * lanes * 2, vector(I16, lanes)))


def _load_bytes(emitter: Emitter, address: Value, part: int) -> Value:
    lanes = emitter.target.lanes
    data = emitter.load(address + part * lanes, vector(I8, lanes))
    return emitter.cast(data, vector(I32, lanes), "zext")


def _nibbles(emitter: Emitter, address: Value, step: int, part: int) -> Value:
    word = _load_words(emitter, address + (step % 4) * 64, part)
    return (word if step < 4 else word >> 4) & 0x0F0F0F0F


class Q4_0(BlockFormat):
    """256 bytes of nibbles, 16 float16 scales."""

    name, bits, zero_point, block_bytes = "Q4_0", 4, 8, 288

    def codes(
        self, emitter: Emitter, block: Value, group: Value | int, step: int, part: int
    ) -> Value:
        return _nibbles(emitter, block, step, part)

    def scale(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        return _load_halves(emitter, block + 256, part)


class Q4_1(Q4_0):
    """256 bytes of nibbles, 16 float16 scales, 16 float16 minima."""

    name, zero_point, has_minimum, block_bytes = "Q4_1", 0, True, 320

    def minimum(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        return _load_halves(emitter, block + 288, part)


class Q5_0(BlockFormat):
    """5 words of codes a row, 16 float16 scales.

    Each byte of the words holds a whole code (of steps 0, 1, 3, 4 and 6) and three bits above it:
    those of words 0 and 1 make step 2, of 2 and 3 step 5, and what they leave with word 4 step 7.
    """

    name, bits, zero_point, block_bytes = "Q5_0", 5, 16, 352

    def codes(
        self, emitter: Emitter, block: Value, group: Value | int, step: int, part: int
    ) -> Value:
        def bits(word: int, shift: int, mask: int) -> Value:
            value = _load_words(emitter, block + word * 64, part)
            return (value >> shift if shift else value) & (mask * 0x01010101)

        match step:
            case 2 | 5:
                first = 2 * (step // 3)
                return bits(first, 5, 0x07) | bits(first + 1, 3, 0x18)
            case 7:
                return bits(4, 5, 0x07) | bits(1, 2, 0x08) | bits(3, 1, 0x10)
            case _:
                return bits({0: 0, 1: 1, 3: 2, 4: 3, 6: 4}[step], 0, 0x1F)

    def scale(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        return _load_halves(emitter, block + 320, part)


class Q8_0(BlockFormat):
    """512 bytes of signed codes, 16 float16 scales. The codes are read signed (zero point 0)."""

    name, bits, block_bytes = "Q8_0", 8, 544
    prefetch_bytes = 1024

    def codes(
        self, emitter: Emitter, block: Value, group: Value | int, step: int, part: int
    ) -> Value:
        return _load_words(emitter, block + step * 64, part)

    def scale(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        return _load_halves(emitter, block + 512, part)


class Q4_K(BlockFormat):
    """16 float16 d, 16 float16 dmin, 8 x 16 byte scales, 8 x 16 byte minima, 8 groups of 256 bytes
    of nibbles.
    """

    name, bits, has_minimum, groups_per_block, block_bytes = "Q4_K", 4, True, 8, 2368

    def codes(
        self, emitter: Emitter, block: Value, group: Value | int, step: int, part: int
    ) -> Value:
        return _nibbles(emitter, block + 320 + group * 256, step, part)

    def _scaled(
        self,
        emitter: Emitter,
        block: Value,
        group: Value | int,
        part: int,
        bytes_at: int,
        half_at: int,
    ) -> Value:
        small = _load_bytes(emitter, block + bytes_at + group * 16, part)
        return _load_halves(emitter, block + half_at, part) * emitter.to_float(small)

    def scale(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        return self._scaled(emitter, block, group, part, 64, 0)

    def minimum(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        value = self._scaled(emitter, block, group, part, 192, 32)
        return emitter.constant(-0.0, value.type) - value


class Q6_K(BlockFormat):
    """16 float16 d, 16 x 16 byte scales, 8 groups of 6 words of codes a row.

    Each byte of words 0, 1, 2 holds a code of that step, and above it two bits of step 3; words 3,
    4 and 5 likewise hold steps 4 to 7.
    """

    name, bits, zero_point, has_sub_scales, groups_per_block = "Q6_K", 6, 32, True, 8
    block_bytes = 3360

    def codes(
        self, emitter: Emitter, block: Value, group: Value | int, step: int, part: int
    ) -> Value:
        at = block + 288 + group * 384 + (step // 4) * 192

        def bits(word: int, shift: int, mask: int) -> Value:
            value = _load_words(emitter, at + word * 64, part)
            return (value >> shift if shift else value) & (mask * 0x01010101)

        if step % 4 < 3:
            return bits(step % 4, 0, 0x3F)
        return bits(0, 6, 0x03) | bits(1, 4, 0x0C) | bits(2, 2, 0x30)

    def scale(self, emitter: Emitter, block: Value, group: Value | int, part: int) -> Value:
        return _load_halves(emitter, block, part)

    def sub_scale(
        self, emitter: Emitter, block: Value, group: Value | int, half: int, part: int
    ) -> Value:
        lanes = emitter.target.lanes
        at = block + 32 + group * 32 + half * 16 + part * lanes
        return emitter.load(at, vector(I8, lanes))


BLOCK_FORMATS: dict[str, BlockFormat] = {
    kind.name: kind() for kind in (Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K)
}

FLOAT_FORMATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Formats whose weights meet float32 activations, with the bytes of a weight. A tile's column k
is 16 weights.
"""


def load_floats(emitter: Emitter, name: str, address: Value, lanes: int) -> Value:
    """`lanes` weights of a float format as float32."""
    if name == "F32":
        return emitter.load(address, vector(F32, lanes))
    halves = emitter.load(address, vector(I16, lanes))
    if name == "F16":
        return emitter.half_to_float(halves)
    words = emitter.cast(halves, vector(I32, lanes), "zext") << 16
    return emitter.bitcast(words, vector(F32, lanes))


def block_shape(name: str) -> tuple[int, int]:
    """Columns and bytes of a packed block of a tile of 16 rows."""
    if name in FLOAT_FORMATS:
        return 1, FLOAT_FORMATS[name] * ROWS
    kind = BLOCK_FORMATS[name]
    return GROUP * kind.groups_per_block, kind.block_bytes


def tile_bytes(name: str, columns: int) -> int:
    """Bytes of one packed tile of 16 rows."""
    block_columns, block_bytes = block_shape(name)
    return columns // block_columns * block_bytes
