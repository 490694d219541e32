"""Repacking: from a file's blocks to tiles of 16 rows, bit for bit.

`pack_<format>(source, row_bytes, rows, num_rows, columns, out, stride, first, last)` writes the
tiles `first..last` of a matrix whose file rows lie at `source`, one every `stride` bytes; row i of
the packed matrix is row `rows[i]` (int32) of the file. Rows beyond `num_rows` are zero. The
layouts are those of `blocks.py`; the source's are ggml's, or what `weights/formats.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cyclewise.machine.kernels.blocks import (
    BLOCK_FORMATS,
    FLOAT_FORMATS,
    ROWS,
    BlockFormat,
    block_shape,
)
from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import I8, I16, I32, Emitter, Value, vector
from cyclewise.machine.kernels.layout import load_int32

SOURCE_BLOCK = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (2, 4),
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q2_K": (256, 84), "Q3_K": (256, 110),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
    "I4_32": (32, 19), "I4_64": (64, 35), "I4_128": (128, 67),
    "I8_32": (32, 35), "I8_64": (64, 67), "I8_128": (128, 131),
}  # fmt: skip
"""Columns and bytes of a file's block."""


def _copy(emitter: Emitter, source: Value, to: Value, type_: object) -> None:
    emitter.store(to, emitter.load(source, type_, align=1))  # type: ignore[arg-type]


def _copy_words(emitter: Emitter, source: Value, to: Value, count: int) -> None:
    """`count` words of a row, each to its own step of the tile."""
    for word in range(count):
        _copy(emitter, source + 4 * word, to + 64 * word, I32)


def _q4_0(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + 256 + lane * 2, I16)
    _copy_words(emitter, source + 2, to + lane * 4, 4)


def _q4_1(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + 256 + lane * 2, I16)
    _copy(emitter, source + 2, to + 288 + lane * 2, I16)
    _copy_words(emitter, source + 4, to + lane * 4, 4)


def _q5_0(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + 320 + lane * 2, I16)
    _five_bits_of_32(emitter, source + 2, to + lane * 4)


def _q5_1(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + 320 + lane * 2, I16)
    _copy(emitter, source + 2, to + 352 + lane * 2, I16)
    _five_bits_of_32(emitter, source + 4, to + lane * 4)


def _five_bits_of_32(emitter: Emitter, source: Value, to: Value) -> None:
    """A file's 4 bytes of fifth bits and 16 of nibbles."""
    high = emitter.load(source, I32, align=1)
    codes = []
    for step in range(8):
        word = emitter.load(source + 4 + 4 * (step % 4), I32, align=1)
        word = (word if step < 4 else word >> 4) & 0x0F0F0F0F
        fifth = (high >> (4 * step)) & 0xF
        for byte in range(4):
            word = word | (((fifth >> byte) & 1) << (8 * byte + 4))
        codes.append(word)
    _store_five_bits(emitter, codes, to)


def _store_five_bits(emitter: Emitter, codes: Sequence[Value], to: Value) -> None:
    """A word of codes a step as the five words that `five_bits` reads."""

    def three(code: Value) -> Value:
        return (code & 0x07070707) << 5

    def two(code: Value) -> Value:
        return (code & 0x18181818) << 3

    words = (
        codes[0] | three(codes[2]),
        codes[1] | two(codes[2]) | ((codes[7] & 0x08080808) << 2),
        codes[3] | three(codes[5]),
        codes[4] | two(codes[5]) | ((codes[7] & 0x10101010) << 1),
        codes[6] | three(codes[7]),
    )
    for index, word in enumerate(words):
        emitter.store(to + 64 * index, word)


def _q8_0(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + 512 + lane * 2, I16)
    _copy_words(emitter, source + 2, to + lane * 4, 8)


def _store_steps(emitter: Emitter, codes: Value, to: Value) -> None:
    """16 bytes of a row: a word to each of four steps."""
    words = emitter.bitcast(codes, vector(I32, 4))
    for step in range(4):
        emitter.store(to + 64 * step, emitter.extract(words, step))


def _q2_k(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source + 80, to + lane * 2, I16)
    _copy(emitter, source + 82, to + 32 + lane * 2, I16)
    for group in range(8):
        _copy(emitter, source + 2 * group, to + 64 + group * 32 + lane * 2, I16)
        for half in (0, 1):
            codes = _two_bits(emitter, source + 16, group, half)
            words = emitter.bitcast(codes, vector(I32, 4))
            word = emitter.extract(words, 0)
            for step in (1, 2, 3):
                word = word | (emitter.extract(words, step) << (2 * step))
            emitter.store(to + 320 + group * 128 + half * 64 + lane * 4, word)


def _two_bits(emitter: Emitter, source: Value, group: int, half: int) -> Value:
    """Half a group of the two-bit codes that 128 columns share 32 bytes for."""
    at = source + (group // 4) * 32 + half * 16
    return (emitter.load(at, vector(I8, 16)) >> (2 * (group % 4))) & 3


def _q3_k(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source + 108, to + lane * 2, I16)
    packed = [emitter.load(source + 96 + i, I8) for i in range(12)]

    def scale(index: int) -> Value:
        low = packed[index % 8]
        low = low & 15 if index < 8 else low >> 4
        return low | (((packed[8 + index % 4] >> (2 * (index // 4))) & 3) << 4)

    for group in range(8):
        first, second = scale(2 * group), scale(2 * group + 1)
        emitter.store(to + 32 + group * 16 + lane, first | (second << 6))
        # Rows r and r + 8 share a byte, and row r comes first.
        shared = to + 160 + group * 8 + (lane & 7)
        nibble = second >> 2
        both = (emitter.load(shared, I8) & 15) | (nibble << 4)
        emitter.store(shared, (lane < 8).select(nibble, both))
        codes = []
        for half in (0, 1):
            high = (emitter.load(source + 16 * half, vector(I8, 16)) >> group) & 1
            words = emitter.bitcast(
                _two_bits(emitter, source + 32, group, half) | (high << 2), vector(I32, 4)
            )
            codes += [emitter.extract(words, step) for step in range(4)]
        twos, fives = ([(codes[i] & 0x03030303) << 6, codes[i] & 0x04040404] for i in (2, 5))
        stored = (
            codes[0] | (codes[1] << 3) | twos[0],
            codes[3] | (codes[4] << 3) | fives[0],
            codes[6] | (codes[7] << 3) | (twos[1] << 4) | (fives[1] << 5),
        )
        for index, word in enumerate(stored):
            emitter.store(to + 224 + group * 192 + index * 64 + lane * 4, word)


def _small_scales(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    """d, dmin and the eight scales and minima of 6 bits that begin a block of Q4_K and Q5_K."""
    _copy(emitter, source, to + lane * 2, I16)
    _copy(emitter, source + 2, to + 32 + lane * 2, I16)
    packed = [emitter.load(source + 4 + i, I8) for i in range(12)]
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4)
            minimum = (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4)
        emitter.store(to + 64 + group * 16 + lane, scale)
        emitter.store(to + 192 + group * 16 + lane, minimum)


def _q4_k(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    half = vector(I8, 16)
    _small_scales(emitter, source, to, lane)
    for pair in range(4):
        low, high = (emitter.load(source + 16 + pair * 32 + 16 * i, half) for i in (0, 1))
        for odd in (0, 1):
            first, second = (low >> 4, high >> 4) if odd else (low & 15, high & 15)
            codes = (first & 15) | (second << 4)
            _store_steps(emitter, codes, to + 320 + (2 * pair + odd) * 256 + lane * 4)


def _q5_k(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    half = vector(I8, 16)
    _small_scales(emitter, source, to, lane)
    for group in range(8):
        codes = []
        for i in (0, 1):
            nibbles = emitter.load(source + 48 + (group // 2) * 32 + 16 * i, half)
            fifth = (emitter.load(source + 16 + 16 * i, half) >> group) & 1
            low = (nibbles >> 4 if group % 2 else nibbles) & 15
            words = emitter.bitcast(low | (fifth << 4), vector(I32, 4))
            codes += [emitter.extract(words, step) for step in range(4)]
        _store_five_bits(emitter, codes, to + 320 + group * 320 + lane * 4)


def _q6_k(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    half = vector(I8, 16)
    _copy(emitter, source + 208, to + lane * 2, I16)
    for group in range(8):
        _copy(emitter, source + 192 + 2 * group, to + 32 + group * 32 + lane * 2, I16)
    for group in range(8):
        side, quarter = divmod(group, 4)
        low_at = source + side * 64 + (quarter % 2) * 32
        high_at = source + 128 + side * 32
        for i in (0, 1):
            nibbles = emitter.load(low_at + 16 * i, half)
            low = (nibbles >> 4 if quarter >= 2 else nibbles) & 15
            high = (emitter.load(high_at + 16 * i, half) >> (2 * quarter)) & 3
            words = emitter.bitcast(low | (high << 4), vector(I32, 4))
            codes = [emitter.extract(words, step) for step in range(4)]
            for step in range(3):
                two = ((codes[3] >> (2 * step)) & 0x03030303) << 6
                at = to + 288 + group * 384 + i * 192 + step * 64 + lane * 4
                emitter.store(at, codes[step] | two)


def _iq4_xs(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + lane * 2, I16)
    high = emitter.load(source + 2, I16, align=1)
    for group in range(8):
        both = emitter.load(source + 4 + group // 2, I8)
        low = both >> 4 if group % 2 else both & 15
        upper = emitter.cast((high >> (2 * group)) & 3, I8, "trunc") << 4
        emitter.store(to + 32 + group * 16 + lane, (low | upper) - 32)
        words = to + 160 + group * 256 + lane * 4
        _copy_words(emitter, source + 8 + 16 * group, words, 4)


def _mxfp4(emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + 256 + lane, I8)
    _copy_words(emitter, source + 1, to + lane * 4, 4)


def _i4(kind: BlockFormat, emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + lane * 2, I16)
    _copy(emitter, source + 2, to + 32 + lane, I8)
    codes_at = kind.block_bytes - 256 * kind.groups_per_block
    for group in range(kind.groups_per_block):
        words = to + codes_at + group * 256 + lane * 4
        _copy_words(emitter, source + 3 + 16 * group, words, 4)


def _i8(kind: BlockFormat, emitter: Emitter, source: Value, to: Value, lane: Value) -> None:
    _copy(emitter, source, to + lane * 2, I16)
    _copy(emitter, source + 2, to + 32 + lane, I8)
    for group in range(kind.groups_per_block):
        _copy_words(emitter, source + 3 + 32 * group, to + 48 + group * 512 + lane * 4, 8)


_BLOCKS: dict[str, Callable[[Emitter, Value, Value, Value], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _q4_0, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
    **{name: partial(_i4, BLOCK_FORMATS[name]) for name in ("I4_32", "I4_64", "I4_128")},
    **{name: partial(_i8, BLOCK_FORMATS[name]) for name in ("I8_32", "I8_64", "I8_128")},
}  # fmt: skip


def pack_unit(name: str) -> Unit:
    columns_of_block, bytes_of_block = SOURCE_BLOCK[name]

    def write(emitter: Emitter) -> None:
        def pack(
            source: Value, row_bytes: Value, rows: Value, num_rows: Value, columns: Value,
            out: Value, stride: Value, first: Value, last: Value,
        ) -> None:  # fmt: skip
            blocks = columns // columns_of_block
            block_bytes = block_shape(name)[1]
            with emitter.range(first, last) as tile, emitter.range(0, ROWS) as lane:
                row = tile * ROWS + lane
                with emitter.when(row < num_rows):
                    at = source + load_int32(emitter, rows, row) * row_bytes
                    with emitter.range(0, blocks) as block:
                        to = out + tile * stride + block * block_bytes
                        from_ = at + block * bytes_of_block
                        if name in FLOAT_FORMATS:
                            element = I16 if name == "F16" else I32
                            _copy(emitter, from_, to + lane * bytes_of_block, element)
                        else:
                            _BLOCKS[name](emitter, from_, to, lane)
                    if name == "BF16":
                        with emitter.when((columns & 1).differs(0)):
                            to = out + tile * stride + blocks * block_bytes + lane * 4
                            _copy(emitter, at + blocks * bytes_of_block, to, I16)

        emitter.function(f"pack_{name}", 9, pack)

    return Unit(f"pack_{name}", write, (f"pack_{name}",))
