"""What a quantized format tells the matrix kernels, and how its readers load what they need.

`blocks.py` lists the formats and describes how packed weights lie; `matmul.py` and `dot.py` read
them through this interface.
"""

from __future__ import annotations

from collections.abc import Sequence

from cyclewise.machine.kernels.lang import I8, I16, I32, Emitter, Value, vector

ROWS = 16
"""Rows of a tile."""
GROUP = 32
"""Columns of a group."""
STEPS = 8
"""Steps of a group."""

Group = Value | int
"""A group's number in its block."""


class BlockFormat:
    """A quantized format: its constants, and readers of one group."""

    name: str
    bits: int
    """Of a code as `codes` gives it; codes of 8 bits are signed."""
    zero_point: int = 0
    has_own_zero_point = True
    """Otherwise it is the dot products' alone, whose sums fit for it; `minimum` is that of codes
    without one, and `centred_minimum` makes up for the difference.
    """
    has_minimum = False
    has_sub_scales = False
    has_sub_minima = False
    codes_are_bytes = False
    """Whether codes lie in the stream as `codes` gives them."""
    parts_in_turn = False
    """Whether one token meets part after part of a group, not step after step of all parts: for
    formats whose codes come from many words, which would not fit into registers.
    """
    groups_per_block: int = 1
    prefetch_bytes: int = 2048
    """How far ahead the stream of weights is asked for: the best of those measured."""
    block_bytes: int
    """Bytes of a block (`groups_per_block` groups) of a tile of 16 rows."""

    @property
    def max_code(self) -> int:
        """The largest of unsigned codes."""
        return (1 << self.bits) - 1

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        """A step's codes, four bytes a lane."""
        raise NotImplementedError

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        """float32 lanes."""
        raise NotImplementedError

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        """float32 lanes: what is added to a weight; with sub-minima, -1/8 of what they are
        multiplied by.
        """
        raise NotImplementedError

    def centred_minimum(self, emitter: Emitter, scale: Value, minimum: Value) -> Value:
        """The minimum that belongs to codes less the zero point; rounded once, since the product is
        exact.
        """
        if self.has_own_zero_point:
            return minimum
        return emitter.fma(scale, emitter.constant(float(self.zero_point), scale.type), minimum)

    def sub_scales(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        """A lane holds two int16, the scales of columns 0..15 (low) and 16..31 of a group."""
        raise NotImplementedError

    def sub_minima(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        """The minima of the same columns likewise."""
        raise NotImplementedError


def load_words(emitter: Emitter, address: Value, part: int) -> Value:
    lanes = emitter.target.lanes
    return emitter.load(address + part * lanes * 4, vector(I32, lanes))


def load_halves(emitter: Emitter, address: Value, part: int) -> Value:
    """float16 as float32."""
    lanes = emitter.target.lanes
    loaded = emitter.load_constant(address + part * lanes * 2, vector(I16, lanes))
    return emitter.half_to_float(loaded)


def load_bytes(emitter: Emitter, address: Value, part: int, how: str = "zext") -> Value:
    """Bytes as int32."""
    lanes = emitter.target.lanes
    data = emitter.load(address + part * lanes, vector(I8, lanes))
    return emitter.cast(data, vector(I32, lanes), how)


def load_pairs(emitter: Emitter, address: Value, part: int, how: str = "zext") -> Value:
    """Two bytes a row as int16."""
    lanes = 2 * emitter.target.lanes
    data = emitter.load(address + part * lanes, vector(I8, lanes))
    return emitter.cast(data, vector(I16, lanes), how)


def as_lanes(emitter: Emitter, pairs: Value) -> Value:
    """Pairs of int16 as int32 lanes."""
    return emitter.bitcast(pairs, vector(I32, emitter.target.lanes))


def bits(emitter: Emitter, words: Value, word: int, shift: int, mask: int, part: int) -> Value:
    """`mask` of every byte of a word of a group, shifted right, or left where `shift` < 0."""
    value = load_words(emitter, words + word * 64, part)
    moved = value >> shift if shift > 0 else value << -shift if shift < 0 else value
    return moved & (mask * 0x01010101)


def nibbles(emitter: Emitter, words: Value, step: int, part: int) -> Value:
    """Codes of 4 bits in 4 words a row: a byte holds one of step s and above it one of s + 4."""
    return bits(emitter, words, step % 4, 4 * (step // 4), 0x0F, part)


def five_bits(emitter: Emitter, words: Value, step: int, part: int) -> Value:
    """Codes of 5 bits in 5 words a row.

    Each byte holds a whole code (of steps 0, 1, 3, 4 and 6) and three bits above it: those of words
    0 and 1 make step 2, of 2 and 3 step 5, and what they leave with word 4 step 7.
    """
    match step:
        case 2 | 5:
            first = 2 * (step // 3)
            low = bits(emitter, words, first, 5, 0x07, part)
            return low | bits(emitter, words, first + 1, 3, 0x18, part)
        case 7:
            low = bits(emitter, words, 4, 5, 0x07, part) | bits(emitter, words, 1, 2, 0x08, part)
            return low | bits(emitter, words, 3, 1, 0x10, part)
        case _:
            return bits(emitter, words, {0: 0, 1: 1, 3: 2, 4: 3, 6: 4}[step], 0, 0x1F, part)


def looked_up(emitter: Emitter, table: Sequence[int], codes: Value) -> Value:
    """Each byte of the words (0..15) becomes the table's."""
    as_bytes = vector(I8, 4 * emitter.target.lanes)
    found = emitter.lookup(table, emitter.bitcast(codes, as_bytes))
    return emitter.bitcast(found, vector(I32, emitter.target.lanes))
