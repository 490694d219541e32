"""Formats of super-blocks of 256 columns: eight groups together, their small scales before them.

Q4_K and Q5_K have a scale and a minimum of 6 bits a group, kept as bytes; the others scales of 16
columns, which come as pairs of int16 (`sub_scales`): Q2_K of 4 bits beside minima of 4 bits, Q3_K
of 6 bits and Q6_K of 8.
"""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import (
    BlockFormat,
    Group,
    as_lanes,
    bits,
    five_bits,
    load_bytes,
    load_halves,
    load_pairs,
    nibbles,
)
from cyclewise.machine.kernels.lang import I8, I16, I32, Emitter, Value, vector


class Q2_K(BlockFormat):
    """16 float16 d, 16 float16 dmin, 8 groups of 32 bytes of scales, 8 groups of 2 words of codes
    a row.

    A row's two bytes of a group are those of its halves: the scale below, the minimum above. A byte
    of codes holds those of four steps, the first lowest.
    """

    name, bits, groups_per_block, block_bytes = "Q2_K", 2, 8, 1344
    has_sub_scales = has_minimum = has_sub_minima = parts_in_turn = True

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        word, place = divmod(step, 4)
        return bits(emitter, block + 320 + group * 128, word, 2 * place, 0x03, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block, part)

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 32, part) * 0.125

    def sub_scales(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return as_lanes(emitter, load_pairs(emitter, block + 64 + group * 32, part) & 0x0F)

    def sub_minima(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return as_lanes(emitter, load_pairs(emitter, block + 64 + group * 32, part) >> 4)


class Q3_K(BlockFormat):
    """16 float16 d, 8 x 16 bytes and 8 x 8 bytes of scales, 8 groups of 3 words of codes a row.

    A row's byte of scales holds that of columns 0..15 and two low bits of the other; its four high
    bits are a nibble of the byte that rows r (low) and r + 8 share. Scales are stored + 32.

    A byte of codes holds those of two steps (0 and 1, 3 and 4, 6 and 7) and two bits above: the low
    bits of steps 2 and 5 in words 0 and 1, in word 2 their high bits.
    """

    name, bits, zero_point, has_sub_scales, groups_per_block = "Q3_K", 3, 4, True, 8
    block_bytes, parts_in_turn = 1760, True

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        at = block + 224 + group * 192
        word, place = divmod(step, 3)
        if place < 2:
            return bits(emitter, at, word, 3 * place, 0x07, part)
        low = bits(emitter, at, word, 6, 0x03, part)
        return low | bits(emitter, at, 2, 4 + word, 0x04, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block, part)

    def sub_scales(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        lanes = emitter.target.lanes
        words = vector(I32, lanes)
        low = load_bytes(emitter, block + 32 + group * 16, part)
        first_row, sharing = part * lanes, min(lanes, 8)
        at = block + 160 + group * 8 + first_row % 8
        shared = emitter.cast(emitter.load(at, vector(I8, sharing)), vector(I32, sharing), "zext")
        shifts = [18 if (first_row + lane) < 8 else 14 for lane in range(lanes)]
        if lanes > sharing:
            shared = emitter.shuffle(shared, shared, [lane % sharing for lane in range(lanes)])
        high = (shared << emitter.vector_constant(shifts, I32)) & 0x003C0000
        scales = ((low | (low << 10)) & 0x0003003F) | high
        pairs = emitter.bitcast(scales, vector(I16, 2 * lanes)) - 32
        return emitter.bitcast(pairs, words)


class Q4_K(BlockFormat):
    """16 float16 d, 16 float16 dmin, 8 x 16 byte scales, 8 x 16 byte minima, 8 groups of 4 words of
    codes a row.
    """

    name, bits, has_minimum, groups_per_block, block_bytes = "Q4_K", 4, True, 8, 2368

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return nibbles(emitter, block + 320 + group * 256, step, part)

    def _scaled(
        self, emitter: Emitter, block: Value, group: Group, part: int, bytes_at: int, half_at: int
    ) -> Value:
        small = load_bytes(emitter, block + bytes_at + group * 16, part)
        return load_halves(emitter, block + half_at, part) * emitter.to_float(small)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return self._scaled(emitter, block, group, part, 64, 0)

    def minimum(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        value = self._scaled(emitter, block, group, part, 192, 32)
        return emitter.constant(-0.0, value.type) - value


class Q5_K(Q4_K):
    """Q4_K with 8 groups of 5 words of codes a row."""

    name, bits, block_bytes = "Q5_K", 5, 2880
    zero_point, has_own_zero_point = 16, False

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return five_bits(emitter, block + 320 + group * 320, step, part)


class Q6_K(BlockFormat):
    """16 float16 d, 8 groups of 32 byte scales, two a row, 8 groups of 6 words of codes a row.

    Each byte of words 0, 1, 2 holds a code of that step, and above it two bits of step 3; words 3,
    4 and 5 likewise hold steps 4 to 7.
    """

    name, bits, zero_point, has_sub_scales, groups_per_block = "Q6_K", 6, 32, True, 8
    block_bytes = 3360

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        at = block + 288 + group * 384 + (step // 4) * 192
        if step % 4 < 3:
            return bits(emitter, at, step % 4, 0, 0x3F, part)
        low = bits(emitter, at, 0, 6, 0x03, part) | bits(emitter, at, 1, 4, 0x0C, part)
        return low | bits(emitter, at, 2, 2, 0x30, part)

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block, part)

    def sub_scales(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return as_lanes(emitter, load_pairs(emitter, block + 32 + group * 32, part, "sext"))
