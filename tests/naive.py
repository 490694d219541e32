"""The slow, obvious twins of the kernels, in numpy: what every kernel must compute.

Integer sums and whatever a kernel promises to the bit are repeated here in the same order; the
rest is float64. The last part is a whole model (`Transformer`), written from the papers and from
what GGUF files mean, without a look at the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]

GROUP = 32
"""Columns that share an activation's scale."""
HALF_LIMIT = np.float32(65504.0)


# Block formats: from ggml-common.h


@dataclass(frozen=True, slots=True)
class Blocks:
    """Decoded weights: `scale * sub_scale * code + minimum * sub_minimum`, the zero point taken off
    the codes.
    """

    codes: Integers  # (rows, groups, 32)
    scale: Floats  # (rows, groups)
    minimum: Floats | None = None  # (rows, groups)
    sub_scales: Integers | None = None  # (rows, groups, 2): one for each half of a group
    sub_minima: Integers | None = None  # (rows, groups, 2)
    centre: int = 0
    """What products take off the codes; the minimum makes up for it."""

    def values(self) -> Floats:
        """float32 (rows, columns)."""
        codes = self.codes
        if self.sub_scales is not None:
            codes = codes * np.repeat(self.sub_scales, 16, axis=2)
        values = codes.astype(np.float32) * self.scale[:, :, None]
        if self.minimum is not None:
            minimum = self.minimum[:, :, None]
            if self.sub_minima is not None:
                minimum = minimum * np.repeat(self.sub_minima, 16, axis=2).astype(np.float32)
            values = values + minimum
        return values.reshape(len(values), -1)


def _half(data: Bytes) -> Floats:
    """float16 in the last two bytes' axis."""
    return np.ascontiguousarray(data).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(data: Bytes) -> Integers:
    """16 bytes as 32 codes: the low halves are the first 16."""
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.int64)


def _q4_0(block: Bytes) -> Blocks:
    return Blocks(_nibbles(block[..., 2:]) - 8, _half(block[..., :2]))


def _q4_1(block: Bytes) -> Blocks:
    return Blocks(_nibbles(block[..., 4:]), _half(block[..., :2]), _half(block[..., 2:4]))


def _q5_0(block: Bytes) -> Blocks:
    return Blocks(_five_bits(block[..., 2:]) - 16, _half(block[..., :2]))


def _q5_1(block: Bytes) -> Blocks:
    scale, minimum = _half(block[..., :2]), _half(block[..., 2:4])
    return Blocks(_five_bits(block[..., 4:]), scale, minimum, centre=16)


def _five_bits(data: Bytes) -> Integers:
    """4 bytes of fifth bits and 16 of nibbles."""
    fifth = np.unpackbits(data[..., :4], axis=-1, bitorder="little").astype(np.int64)
    return _nibbles(data[..., 4:]) | fifth << 4


def _q8_0(block: Bytes) -> Blocks:
    codes = block[..., 2:].astype(np.int8).astype(np.int64)
    return Blocks(codes, _half(block[..., :2]))


def _two_bits(data: Bytes) -> Integers:
    """64 bytes as 8 groups of 32 codes."""
    pieces = data.reshape(*data.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2)[:, None] & 3
    return pieces.reshape(*data.shape[:-1], 8, 32).astype(np.int64)


def _of_super_blocks(codes: Integers, d: Floats, **rest: Any) -> Blocks:
    """Blocks of (rows, blocks, 8, ...), their groups in one axis; `d` is one a block."""
    rows = len(codes)
    whole = {name: values.reshape(rows, -1, *values.shape[3:]) for name, values in rest.items()}
    return Blocks(codes.reshape(rows, -1, 32), np.repeat(d, 8, axis=1), **whole)


def _q2_k(block: Bytes) -> Blocks:
    small = block[..., :16].reshape(*block.shape[:2], 8, 2).astype(np.int64)
    d_min = np.repeat(_half(block[..., 82:84])[..., None], 8, axis=2)
    return _of_super_blocks(
        _two_bits(block[..., 16:80]), _half(block[..., 80:82]),
        minimum=-d_min, sub_scales=small & 15, sub_minima=small >> 4,
    )  # fmt: skip


def _q3_k(block: Bytes) -> Blocks:
    third = block[..., None, :32] >> np.arange(8)[:, None] & 1
    codes = (_two_bits(block[..., 32:96]) | third.astype(np.int64) << 2) - 4
    packed = block[..., 96:108].astype(np.int64)
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = np.concatenate([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    scales = (low | high << 4) - 32
    return _of_super_blocks(
        codes, _half(block[..., 108:110]), sub_scales=scales.reshape(*scales.shape[:2], 8, 2)
    )


def _q4_k(block: Bytes) -> Blocks:
    codes = np.zeros((*block.shape[:2], 8, 32), np.int64)
    for group in range(8):
        both = block[..., 16 + group // 2 * 32 : 48 + group // 2 * 32]
        codes[..., group, :] = both >> 4 if group % 2 else both & 15
    return _with_small_scales(codes, block)


def _q5_k(block: Bytes) -> Blocks:
    fifth = block[..., None, 16:48] >> np.arange(8)[:, None] & 1
    blocks = _q4_k(np.delete(block, slice(16, 48), axis=2))
    codes = blocks.codes | fifth.reshape(blocks.codes.shape).astype(np.int64) << 4
    return replace(blocks, codes=codes, centre=16)


def _with_small_scales(codes: Integers, block: Bytes) -> Blocks:
    rows, num_blocks, _ = block.shape
    d, d_min, packed = _half(block[..., :2]), _half(block[..., 2:4]), block[..., 4:16].astype(int)
    scale = np.zeros((rows, num_blocks, 8), np.float32)
    minimum = np.zeros((rows, num_blocks, 8), np.float32)
    for group in range(8):
        if group < 4:
            s, m = packed[..., group] & 63, packed[..., group + 4] & 63
        else:
            s = (packed[..., group + 4] & 15) | (packed[..., group - 4] >> 6) << 4
            m = packed[..., group + 4] >> 4 | (packed[..., group] >> 6) << 4
        scale[..., group] = d * s.astype(np.float32)
        minimum[..., group] = -(d_min * m.astype(np.float32))
    return Blocks(codes.reshape(rows, -1, 32), scale.reshape(rows, -1), minimum.reshape(rows, -1))


def _q6_k(block: Bytes) -> Blocks:
    rows, num_blocks, _ = block.shape
    low, high = block[..., :128].astype(int), block[..., 128:192].astype(int)
    codes = np.zeros((rows, num_blocks, 256), np.int64)
    for column in range(256):
        side, within = divmod(column, 128)
        quarter, place = divmod(within, 32)
        nibble = low[..., side * 64 + quarter % 2 * 32 + place] >> (quarter // 2 * 4) & 15
        codes[..., column] = (nibble | (high[..., side * 32 + place] >> 2 * quarter & 3) << 4) - 32
    sub_scales = block[..., 192:208].astype(np.int8).astype(np.int64)
    return _of_super_blocks(
        codes.reshape(rows, num_blocks, 8, 32), _half(block[..., 208:210]),
        sub_scales=sub_scales.reshape(rows, num_blocks, 8, 2),
    )  # fmt: skip


IQ4_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int64
)
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int64)


def _iq4_nl(block: Bytes) -> Blocks:
    return Blocks(IQ4_TABLE[_nibbles(block[..., 2:])], _half(block[..., :2]))


def _iq4_xs(block: Bytes) -> Blocks:
    rows, num_blocks, _ = block.shape
    codes = IQ4_TABLE[_nibbles(block[..., 8:].reshape(rows, num_blocks, 8, 16))]
    high = block[..., 2].astype(np.int64) | block[..., 3].astype(np.int64) << 8
    low = np.stack([block[..., 4:8] & 15, block[..., 4:8] >> 4], axis=-1)
    scales = low.reshape(rows, num_blocks, 8) | (high[..., None] >> np.arange(0, 16, 2) & 3) << 4
    scale = _half(block[..., :2])[..., None] * (scales - 32).astype(np.float32)
    return Blocks(codes.reshape(rows, -1, 32), scale.reshape(rows, -1))


def _mxfp4(block: Bytes) -> Blocks:
    nibbles = _nibbles(block[..., 1:])
    codes = E2M1_DOUBLED[nibbles & 7] * np.where(nibbles & 8, -1, 1)
    return Blocks(codes, np.ldexp(np.float32(1), block[..., 0].astype(int) - 128))


def _i4(block: Bytes) -> Blocks:
    rows, num_blocks, _ = block.shape
    codes = _nibbles(block[..., 3:].reshape(rows, -1, 16))
    scale, zero_point = _half(block[..., :2]), block[..., 2].astype(np.float32)
    groups = codes.shape[1] // num_blocks
    return Blocks(
        codes, np.repeat(scale, groups, axis=1), np.repeat(-(scale * zero_point), groups, axis=1)
    )


def _i8(block: Bytes) -> Blocks:
    rows, num_blocks, _ = block.shape
    codes = block[..., 3:].view(np.int8).astype(np.int64).reshape(rows, -1, 32)
    scale, zero_point = _half(block[..., :2]), block[..., 2].view(np.int8).astype(np.float32)
    groups = codes.shape[1] // num_blocks
    return Blocks(
        codes, np.repeat(scale, groups, axis=1), np.repeat(-(scale * zero_point), groups, axis=1)
    )


_DECODERS: dict[str, tuple[int, Callable[[Bytes], Blocks]]] = {
    "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q5_0": (22, _q5_0), "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0), "Q2_K": (84, _q2_k), "Q3_K": (110, _q3_k), "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k), "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs), "MXFP4": (17, _mxfp4), "I4_32": (19, _i4), "I4_64": (35, _i4),
    "I4_128": (67, _i4), "I8_32": (35, _i8), "I8_64": (67, _i8), "I8_128": (131, _i8),
}  # fmt: skip


def is_quantized(format_name: str) -> bool:
    return format_name in _DECODERS


def decode(format_name: str, data: Bytes) -> Blocks:
    """The blocks of a file's rows, uint8 (rows, row bytes)."""
    block_bytes, decoder = _DECODERS[format_name]
    return decoder(data.reshape(len(data), -1, block_bytes))


def dequantize(format_name: str, data: Bytes) -> Floats:
    """float32 (rows, columns) of a file's rows, uint8 (rows, row bytes), in any format."""
    match format_name:
        case "F32":
            return data.view(np.float32)
        case "F16":
            return data.view(np.float16).astype(np.float32)
        case "BF16":
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return decode(format_name, data).values()


# Arithmetic


def fma(left: Floats, right: Floats, addend: Floats, *, fused: bool = True) -> Floats:
    """left * right + addend, rounded once if `fused`.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again to
    float32 is right (Boldo and Melquiond, 2008).
    """
    if not fused:
        return left * right + addend
    product, addend64 = left.astype(np.float64) * right, np.asarray(addend, np.float64)
    total = product + addend64
    virtual = total - product
    error = (product - (total - virtual)) + (addend64 - virtual)
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    away = (error > 0) == (total > 0)
    odd = np.where((error != 0) & even, np.where(away, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


def silu(x: NDArray[Any]) -> Doubles:
    x = np.asanyarray(x, np.float64)
    with np.errstate(over="ignore"):  # the quotient is 0 then
        return np.asanyarray(x / (1 + np.exp(-x)), np.float64)


def gelu(x: NDArray[Any]) -> Doubles:
    """GELU by way of tanh, which is 2 * sigmoid(2y) - 1."""
    x = np.asanyarray(x, np.float64)
    slope = -2 * np.sqrt(2 / np.pi)
    with np.errstate(over="ignore"):
        return np.asanyarray(x / (1 + np.exp(x * (x * x * (slope * 0.044715) + slope))), np.float64)


ACTIVATIONS = {"silu": silu, "gelu": gelu}


def softcap(x: NDArray[Any], cap: float) -> Doubles:
    return np.asanyarray(np.tanh(np.asanyarray(x, np.float64) / cap) * cap, np.float64)


def to_half(x: Floats) -> NDArray[np.float16]:
    """float16, ties to even; what it cannot hold becomes its largest value."""
    return np.clip(x, -HALF_LIMIT, HALF_LIMIT).astype(np.float16)


# Pages of int8


def mixed(x: Floats) -> Floats:
    """(..., head_dim) times a Hadamard matrix in blocks of the largest power of two that divides
    head_dim, if that is 16 or more.
    """
    block = x.shape[-1] & -x.shape[-1]
    if block < 16:
        return x
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.reshape(*x.shape[:-1], -1, block).astype(np.float64)
    return np.asarray((blocks @ matrix / np.sqrt(block)).reshape(x.shape), np.float32)


def page_codes(x: Floats) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """int8 codes of (..., head_dim) float32 and their scales (...), the upper half of a float32,
    rounded up.
    """
    x = np.clip(x, -HALF_LIMIT, HALF_LIMIT)
    largest = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float32)
    stored = ((largest.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    scales = page_scales(stored)
    inverse = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=inverse, where=scales > 1e-30)
    return np.rint(x * inverse[..., None]).astype(np.int8), stored


def page_scales(stored: NDArray[np.uint16]) -> Floats:
    """The scales as float32."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


# Activations in int8, and matrix products


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations of int8 codes in groups of 32 columns."""

    codes: Integers  # (tokens, groups, 32), -127..127
    scale: Floats  # (tokens, groups)

    @property
    def scaled_sum(self) -> Floats:
        sums: Floats = self.codes.sum(axis=2).astype(np.float32)
        return self.scale * sums

    def pack(self) -> Bytes:
        """The 60 bytes of each group as kernels read them, in one dimension.

        From four tokens on, a group of four tokens lies side by side; tokens that lack are zero.
        """
        sums = self.codes.sum(axis=2)
        halves = self.codes.reshape(*sums.shape, 2, 16).sum(axis=3)
        lanes = self.codes.reshape(*sums.shape, 2, 4, 2, 2).sum(axis=(3, 5))  # (.., half, lane)
        parts = [
            self.codes.astype(np.int8).view(np.uint8),
            self.scale[..., None].view(np.uint8),
            self.scaled_sum[..., None].view(np.uint8),
            (sums[..., None] * -8).astype(np.int32).view(np.uint8),
            (halves * -8).astype(np.int16).view(np.uint8),
            (lanes.sum(axis=2) * -16).astype(np.int16).view(np.uint8),
            (lanes.reshape(*sums.shape, 4) * -32).astype(np.int16).view(np.uint8),
        ]
        groups = np.concatenate(parts, axis=2)  # (tokens, groups, 60)
        if len(groups) < 4:
            return groups.reshape(-1)
        whole = np.concatenate([groups, np.zeros_like(groups[: -len(groups) % 4])])
        return whole.reshape(-1, 4, *groups.shape[1:]).swapaxes(1, 2).reshape(-1)

    def values(self) -> Floats:
        values = self.codes.astype(np.float32) * self.scale[:, :, None]
        return values.reshape(len(values), -1)


def quantize(x: Floats) -> Activations:
    """(tokens, columns): each group's largest magnitude becomes 127."""
    groups = x.reshape(len(x), -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
    codes = np.rint(groups * np.where(largest > 0, inverse, np.float32(0))[:, :, None])
    return Activations(codes.astype(np.int64), largest / np.float32(127))


def matmul_blocks(weights: Blocks, x: Activations, *, fused: bool = True) -> Floats:
    """(tokens, rows): exact integer dots, then floats, group after group."""
    codes = weights.codes - weights.centre
    products = codes[None] * x.codes[:, None]  # (tokens, rows, groups, 32)
    if weights.sub_scales is None:
        dots = products.sum(axis=3)
    else:
        halves = products.reshape(*products.shape[:3], 2, 16).sum(axis=4)
        dots = (halves * weights.sub_scales).sum(axis=3)
    total = np.zeros(dots.shape[:2], np.float32)
    for group in range(dots.shape[2]):
        scale = weights.scale[None, :, group] * x.scale[:, None, group]
        total = fma(scale, dots[:, :, group].astype(np.float32), total, fused=fused)
        if weights.minimum is not None and weights.sub_minima is not None:
            sums = x.codes[:, None, group].reshape(len(total), 1, 2, 16).sum(axis=3)
            minima = (sums * weights.sub_minima[None, :, group]).sum(axis=2) * -8
            scale = weights.minimum[None, :, group] / np.float32(-8) * x.scale[:, None, group]
            total = fma(scale, minima.astype(np.float32), total, fused=fused)
        elif weights.minimum is not None:
            scaled_sum = np.broadcast_to(x.scaled_sum[:, None, group], total.shape)
            centred = weights.minimum + weights.scale * np.float32(weights.centre)
            minimum = np.broadcast_to(centred[None, :, group], total.shape)
            total = fma(minimum, scaled_sum, total, fused=fused)
    return total


def matmul_floats(weights: Floats, x: Floats, *, fused: bool = True) -> Floats:
    """(tokens, rows): column after column in blocks of 256, and block after block."""
    total = np.zeros((len(x), len(weights)), np.float32)
    for first in range(0, weights.shape[1], 256):
        block = np.zeros_like(total)
        for column in range(first, min(first + 256, weights.shape[1])):
            left = np.broadcast_to(weights[None, :, column], total.shape)
            right = np.broadcast_to(x[:, None, column], total.shape)
            block = fma(left, right, block, fused=fused)
        total = total + block
    return total


def to_bfloat(x: Floats) -> Floats:
    """float32 rounded to bfloat16, ties to even; subnormals become 0. No infinities or NaNs."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return (
        np.where(bits & 0x7F800000, rounded, bits & 0x80000000).astype(np.uint32).view(np.float32)
    )


def matmul_bfloats(weights: Floats, x: Floats) -> Floats:
    """(tokens, rows) as VDPBF16PS does: bfloat16 in pairs of columns, the second of a pair first.

    In blocks of 256 columns, in each of which the pairs go to two sums by turns.
    """
    weights, x = to_bfloat(weights), to_bfloat(x)
    total = np.zeros((len(x), len(weights)), np.float32)
    for first in range(0, weights.shape[1], 256):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        last = min(first + 256, weights.shape[1])
        for pair in range(first, last, 2):
            which = pair // 2 % 2
            for column in range(min(pair + 1, last - 1), pair - 1, -1):
                left = np.broadcast_to(weights[None, :, column], total.shape)
                right = np.broadcast_to(x[:, None, column], total.shape)
                sums[which] = fma(left, right, sums[which])
        total = total + (sums[0] + sums[1])
    return total


def matmul(
    format_name: str, data: Bytes, x: Floats, *, fused: bool = True, bfloat: bool = False
) -> Floats:
    """(tokens, rows) of a file's rows and float32 activations, as a kernel of that format does.

    `bfloat`: as a processor that multiplies bfloat16 does.
    """
    if format_name == "BF16" and bfloat:
        return matmul_bfloats(dequantize(format_name, data), x)
    if is_quantized(format_name):
        return matmul_blocks(decode(format_name, data), quantize(x), fused=fused)
    return matmul_floats(dequantize(format_name, data), x, fused=fused)


# Kernels of tokens


def rms_norm(x: NDArray[Any], weight: NDArray[Any], epsilon: float) -> Doubles:
    x = np.asanyarray(x, np.float64)
    mean = (x * x).mean(axis=-1, keepdims=True)
    return np.asanyarray(x / np.sqrt(mean + epsilon) * weight, np.float64)


def layer_norm(
    x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], epsilon: float
) -> Doubles:
    x = np.asanyarray(x, np.float64)
    difference = x - x.mean(axis=-1, keepdims=True)
    variance = (difference * difference).mean(axis=-1, keepdims=True)
    return np.asanyarray(difference / np.sqrt(variance + epsilon) * weight + bias, np.float64)


def rotate(x: Floats, cosines: Floats, sines: Floats, *, neighbours: bool = False) -> Floats:
    """RoPE of (..., head_dim) by (..., rope_dim / 2) angles: halves of a head, or `neighbours`."""
    rope_dim = 2 * cosines.shape[-1]
    out = x.copy()
    if neighbours:
        first, second = slice(0, rope_dim, 2), slice(1, rope_dim, 2)
    else:
        first, second = slice(0, rope_dim // 2), slice(rope_dim // 2, rope_dim)
    low, high = x[..., first], x[..., second]
    out[..., first] = low * cosines - high * sines
    out[..., second] = high * cosines + low * sines
    return out


def attend(
    queries: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], *,
    window: int | None = None, softcap: float | None = None,
) -> Doubles:  # fmt: skip
    """One token: scaled queries (heads, dim) over keys and values (positions, kv_heads, dim), of
    which it sees the last `window`. With `softcap` c a score s becomes c tanh(s / c).
    """
    queries, keys, values = (np.asanyarray(a, np.float64) for a in (queries, keys, values))
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    group = len(queries) // keys.shape[1]
    out = np.zeros((len(queries), values.shape[2]))
    for head in range(len(queries)):
        scores = keys[:, head // group] @ queries[head]
        if softcap is not None:
            scores = np.tanh(scores / softcap) * softcap
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out


# A whole model


@dataclass(slots=True)
class Transformer:
    """A decoder-only transformer of the Llama family in float32, from the tensors of its file.

    Keys and values are kept in float16, as the package keeps them. With `int8` the activations
    that meet quantized weights are rounded to int8 first, those that meet `bfloats` to bfloat16.
    """

    tensors: dict[str, Floats]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    rope_dim: int
    rope_base: float
    rope_scaling: float = 1.0
    neighbours: bool = True
    """RoPE pairs dimensions 2i and 2i+1 (llama), not i and i + half (qwen2)."""
    quantized: frozenset[str] = field(default_factory=frozenset)
    """Names of the tensors whose format is quantized."""
    bfloats: frozenset[str] = field(default_factory=frozenset)
    """Names of the tensors that are multiplied as bfloat16."""
    int8: bool = False
    kv_int8: bool = False
    """Keys, mixed, and values are int8 codes, not float16."""
    num_chosen: int = 0
    """Experts that a token goes to, where layers have some."""
    normalized: bool = True
    """Their weights have the sum 1."""

    def logits(self, token_ids: list[int]) -> Floats:
        """float32 (tokens, vocabulary)."""
        cosines, sines = self.angles(np.arange(len(token_ids)))
        x = self.tensors["token_embd.weight"][token_ids]
        for layer in range(self.num_layers):
            name = f"blk.{layer}."
            x = x + self._attention(name, self._norm(name + "attn_norm", x), cosines, sines)
            x = x + self._feed_forward(name, self._norm(name + "ffn_norm", x))
        x = self._norm("output_norm", x)
        tied = "output.weight" not in self.tensors
        return self._linear("token_embd" if tied else "output", x)

    def angles(self, positions: Integers) -> tuple[Floats, Floats]:
        """RoPE's cosines and sines, (positions, 1, rope_dim / 2)."""
        frequencies = self.rope_base ** (-np.arange(0, self.rope_dim, 2) / self.rope_dim)
        frequencies = frequencies / self.rope_scaling
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        angles = positions[:, None, None] * frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _norm(self, name: str, x: Floats) -> Floats:
        return rms_norm(x, self.tensors[name + ".weight"], self.epsilon).astype(np.float32)

    def _linear(self, name: str, x: Floats) -> Floats:
        if self.int8 and name + ".weight" in self.quantized:
            x = quantize(x).values()
        if name + ".weight" in self.bfloats:
            x = to_bfloat(x)
        out = x @ self.tensors[name + ".weight"].T
        return np.asarray(out + self.tensors.get(name + ".bias", np.float32(0)), np.float32)

    def _heads(self, name: str, x: Floats) -> Floats:
        return self._linear(name, x).reshape(len(x), -1, self.head_dim)

    def _attention(self, name: str, x: Floats, cosines: Floats, sines: Floats) -> Floats:
        queries = rotate(
            self._heads(name + "attn_q", x), cosines, sines, neighbours=self.neighbours
        )
        keys = rotate(self._heads(name + "attn_k", x), cosines, sines, neighbours=self.neighbours)
        values = self._heads(name + "attn_v", x)
        queries = queries / np.float32(np.sqrt(self.head_dim))
        kept: NDArray[Any]
        if self.kv_int8:
            queries, kept, values = mixed(queries), _through(mixed(keys)), _through(values)
        else:
            kept, values = to_half(keys), to_half(values).astype(np.float32)
        attended = [
            attend(queries[i], kept[: i + 1], values[: i + 1]).reshape(-1) for i in range(len(x))
        ]
        return self._linear(name + "attn_output", np.array(attended, np.float32))

    def _feed_forward(self, name: str, x: Floats) -> Floats:
        if name + "ffn_gate_inp.weight" in self.tensors:
            return self._experts(name, x)
        return self._gated(name, "", x)

    def _gated(self, name: str, expert: str, x: Floats) -> Floats:
        gate, up, down = (f"{name}ffn_{kind}{expert}" for kind in ("gate", "up", "down"))
        opened = silu(self._linear(gate, x)).astype(np.float32)
        return self._linear(down, opened * self._linear(up, x))

    def _experts(self, name: str, x: Floats) -> Floats:
        """Token by token: the softmax over the experts' logits, of which the largest count."""
        out = np.zeros_like(x)
        for token, logits in enumerate(self._linear(name + "ffn_gate_inp", x)):
            shares = np.exp(logits.astype(np.float64) - logits.max())
            chosen = np.argsort(-logits, kind="stable")[: self.num_chosen]
            shares /= shares[chosen].sum() if self.normalized else shares.sum()
            for expert in chosen.tolist():
                part = self._gated(name, f".{expert}", x[token : token + 1])[0]
                out[token] += np.float32(shares[expert]) * part
        return out


def _through(x: Floats) -> Floats:
    """What int8 pages keep."""
    codes, stored = page_codes(x)
    return codes * page_scales(stored)[..., None]


def kl_divergence(logits: Floats, reference: Floats) -> float:
    """Mean over tokens of KL(softmax(reference) || softmax(logits)), in nats."""

    def log_softmax(x: Floats) -> Doubles:
        wide = np.asarray(x, np.float64)
        wide = wide - wide.max(axis=1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)), np.float64)

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
