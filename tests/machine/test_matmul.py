from __future__ import annotations

import numpy as np
import pytest

from cyclewise.machine.kernels.blocks import ROWS, block_shape
from cyclewise.machine.kernels.compiler import Compiler, callable_at
from cyclewise.machine.kernels.matmul import SCRATCH_BYTES, UNPACK_FROM, matmul_unit
from cyclewise.weights.formats import FORMATS as FILE_FORMATS
from tests import naive
from tests.machine.kernel_calls import (
    BLOCK_FORMATS,
    EXACTLY,
    FLOAT_FORMATS,
    FORMATS,
    GGML_FORMATS,
    GUARD,
    HALVES,
    activations,
    check_guard,
    guarded,
    llama_cpp_rows,
    pack,
    random_rows,
    tile_sums,
)

# Around every tile width (1, 2, 3, 4, 8, 12), their sums, and where unpacking many groups begins.
TOKENS = sorted({1, 2, 3, 4, 5, 7, 8, UNPACK_FROM - 1, UNPACK_FROM, 11, 12, 13, 16, 23, 25, 31})


def check(format_name, data, x, token_counts):
    """The kernel gives the twin's bits, for every number of tokens."""
    tile = pack(format_name, data, x.shape[1])
    want = naive.matmul(format_name, data, x, **EXACTLY)
    for count in token_counts:
        got = tile_sums(format_name, tile, x[:count])
        np.testing.assert_array_equal(got[:, : len(data)], want[:count])
        np.testing.assert_array_equal(got[:, len(data) :], 0)
    return want


def float_inputs(rng, tokens, columns):
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    return x * np.exp(rng.standard_normal((tokens, 1))).astype(np.float32)


@pytest.mark.parametrize("columns", [256, 2048, 2304, 4352])
@pytest.mark.parametrize("format_name", BLOCK_FORMATS)
def test_blocks_times_every_number_of_tokens(format_name, columns):
    """Columns of one panel, a whole one, one and a bit, and two and a bit."""
    rng = np.random.default_rng(columns)
    data = random_rows(rng, format_name, 16, columns, 0.01)
    token_counts = TOKENS if columns == 2304 else (1, 3, 8, 25, 34)
    check(format_name, data, float_inputs(rng, max(token_counts), columns), token_counts)


@pytest.mark.parametrize("tiles", [(2, 1), (12, 1)])
@pytest.mark.parametrize("format_name", ["Q8_0", "Q6_K", "Q2_K"])
def test_tiles_change_no_bit(format_name, tiles):
    rng = np.random.default_rng(1)
    columns = 2304
    tile = pack(format_name, random_rows(rng, format_name, 16, columns, 0.01), columns)
    x = float_inputs(rng, max(TOKENS), columns)
    compiler = Compiler()
    compiler.load([matmul_unit(format_name, tiles)])
    other = callable_at(compiler.address(f"tile_{format_name}"), 7)
    for count in TOKENS:
        rows, stride = activations(format_name, x[:count])
        sums, scratch = guarded(count * ROWS * 4), guarded(SCRATCH_BYTES)
        addresses = [array.ctypes.data for array in (tile, rows, sums, scratch)]
        other(addresses[0], columns, addresses[1], stride, count, *addresses[2:])
        check_guard(sums)
        got = sums[:-GUARD].view(np.float32).reshape(count, ROWS)
        np.testing.assert_array_equal(got, tile_sums(format_name, tile, x[:count]))


@pytest.mark.parametrize("columns", [32, 96, 1056])
@pytest.mark.parametrize("format_name", [n for n in BLOCK_FORMATS if block_shape(n)[0] == 32])
def test_blocks_of_a_few_groups(format_name, columns):
    rng = np.random.default_rng(columns)
    data = random_rows(rng, format_name, 11, columns, 0.01)
    check(format_name, data, float_inputs(rng, 13, columns), (1, 2, 4, 13))


@pytest.mark.parametrize("columns", [1, 7, 64, 129])
@pytest.mark.parametrize("format_name", FLOAT_FORMATS)
def test_floats_times_every_number_of_tokens(format_name, columns):
    rng = np.random.default_rng(columns)
    data = random_rows(rng, format_name, 16, columns, 0.1)
    token_counts = TOKENS if columns == 64 else (1, 3, 9)
    check(format_name, data, float_inputs(rng, max(token_counts), columns), token_counts)


@pytest.mark.parametrize("format_name", FORMATS)
def test_any_finite_scales(format_name):
    rng = np.random.default_rng(3)
    data = random_rows(rng, format_name, 16, 512)
    check(format_name, data, float_inputs(rng, 12, 512), (1, 4, 12))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_product_is_near_what_float64_gives(format_name):
    rng = np.random.default_rng(4)
    data = random_rows(rng, format_name, 16, 1024, 0.01)
    x = float_inputs(rng, 6, 1024)
    want = check(format_name, data, x, (6,))
    weights = naive.dequantize(format_name, data).astype(np.float64)
    seen = naive.quantize(x).values() if naive.is_quantized(format_name) else x
    if format_name == "BF16" and EXACTLY["bfloat"]:
        seen = naive.to_bfloat(x)
    exact = seen.astype(np.float64) @ weights.T
    size = np.abs(seen) @ np.abs(weights).T
    assert (np.abs(want - exact) <= 1e-5 * size).all()


@pytest.mark.parametrize("format_name", GGML_FORMATS)
def test_blocks_that_llama_cpp_quantized(format_name):
    """Products are as far from those of llama.cpp's own float32 weights as int8 activations are."""
    data, values = llama_cpp_rows(format_name)
    x = float_inputs(np.random.default_rng(8), 10, values.shape[1])
    got = check(format_name, data, x, (1, 4, 10))
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    assert np.linalg.norm(got - exact) <= 0.01 * np.linalg.norm(exact)


def extreme_blocks(format_name, columns):
    """16 rows of codes and small scales at their least and largest, alone or by turns; d is 1."""
    rows = random_rows(np.random.default_rng(0), format_name, 16, columns, 0.01)
    blocks = rows.reshape(16, -1, FILE_FORMATS[format_name].block_bytes)
    fills = (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, 0x81, 0x55)
    for row in range(16):
        fill = np.full(blocks.shape[1:], fills[row % 8], np.uint8)
        if row >= 8:
            fill[:, ::2] = fills[(row + 3) % 8]
        blocks[row] = fill
    scales = {
        "Q6_K": (slice(192, 208), (0x80, 0x7F, 0x81, 0x00)),
        "Q3_K": (slice(96, 108), (0x00, 0xFF, 0xF0, 0x0F)),
        "Q2_K": (slice(0, 16), (0xF0, 0xFF, 0x0F, 0x00)),
    }
    if format_name in scales:  # every pair of extremes of codes and scales
        at, values = scales[format_name]
        for row in range(16):
            blocks[row] = (0x00, 0xFF, 0x80, 0x7F)[row % 4]
            blocks[row, :, at] = values[row // 4]
    if format_name == "MXFP4":
        blocks[..., 0] = 128
    for at in HALVES.get(format_name, (0,)):
        blocks[..., at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
    return blocks.reshape(16, -1)


@pytest.mark.parametrize("format_name", BLOCK_FORMATS)
def test_nothing_saturates(format_name):
    """Extreme codes meet activations of +127 and -127: all, by turns, by halves of a group."""
    columns = 512
    signs = np.ones((12, columns), np.float32)
    signs[1] = -1
    signs[2, ::2] = -1
    signs[3, 1::2] = -1
    signs[4].reshape(-1, 16)[::2] = -1
    signs[5].reshape(-1, 16)[1::2] = -1
    signs[6].reshape(-1, 4)[::2] = -1
    signs[7].reshape(-1, 2)[::2] = -1
    signs[8:] = np.sign(np.random.default_rng(5).standard_normal((4, columns)))
    x = signs * np.float32(127)
    assert (np.abs(naive.quantize(x).codes) == 127).all()
    check(format_name, extreme_blocks(format_name, columns), x, (1, 2, 4, 12))


@pytest.mark.parametrize("format_name", BLOCK_FORMATS)
def test_activations_of_nothing(format_name):
    rng = np.random.default_rng(6)
    data = random_rows(rng, format_name, 16, 256, 0.01)
    x = np.zeros((9, 256), np.float32)
    x[3, 40] = 1.0
    x[4] = 1e-30
    check(format_name, data, x, (1, 9))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_token_gets_the_same_bits_beside_any_others(format_name):
    rng = np.random.default_rng(7)
    columns = 2304
    data = random_rows(rng, format_name, 16, columns, 0.01)
    tile = pack(format_name, data, columns)
    x = float_inputs(rng, 40, columns)
    alone = [tile_sums(format_name, tile, x[i : i + 1])[0] for i in range(40)]
    for first, count in [(0, 40), (1, 3), (5, 7), (2, 8), (9, 9), (3, 12), (4, 13), (11, 29)]:
        got = tile_sums(format_name, tile, x[first : first + count])
        np.testing.assert_array_equal(got, np.array(alone[first : first + count]))
