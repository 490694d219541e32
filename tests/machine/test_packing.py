from __future__ import annotations

import gguf
import numpy as np
import pytest

from cyclewise.machine.kernels.blocks import ROWS, tile_bytes
from cyclewise.machine.kernels.pack import pack_unit
from cyclewise.weights.formats import FORMATS as FORMATS_OF_FILES
from tests import naive
from tests.machine.kernel_calls import (
    FORMATS,
    GGML_FORMATS,
    kernel,
    llama_cpp_rows,
    pack,
    packed_row,
    random_rows,
    row_bytes,
)


def dequantized(format_name, data):
    """What the gguf package makes of a file's rows, or what `weights/formats.py` says of it."""
    block = FORMATS_OF_FILES[format_name]
    if block.ggml_id is None:
        return np.array([integers(row, block) for row in data])
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format_name])


def integers(row, block):
    """A row of integers with a zero point, weight after weight."""
    values, is_signed = [], block.name.startswith("I8")
    for at in range(0, len(row), block.block_bytes):
        scale, zero_point = row[at : at + 2].view(np.float16)[0], int(row[at + 2])
        zero_point -= 256 * (is_signed and zero_point > 127)
        for column in range(block.block_size):
            if is_signed:
                code = int(row[at + 3 + column].view(np.int8))
            else:
                byte = int(row[at + 3 + column // 32 * 16 + column % 16])
                code = byte >> 4 if column % 32 >= 16 else byte & 15
            values.append(np.float32(scale) * np.float32(code - zero_point))
    return np.array(values, np.float32)


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_twin_reads_blocks_as_the_gguf_package_does(format_name):
    data = random_rows(np.random.default_rng(0), format_name, 5, 512)
    np.testing.assert_allclose(
        naive.dequantize(format_name, data), dequantized(format_name, data), rtol=3e-7
    )


@pytest.mark.parametrize("format_name", GGML_FORMATS)
def test_blocks_that_llama_cpp_quantized(format_name):
    data, want = llama_cpp_rows(format_name)
    # Q6_K: llama.cpp rounds scale * sub-scale before it multiplies by the code.
    ulp = 0 if format_name != "Q6_K" else 2
    np.testing.assert_array_max_ulp(naive.dequantize(format_name, data), want, ulp)
    packed = pack(format_name, data, want.shape[1])
    for row in range(len(data)):
        got = packed_row(format_name, packed, want.shape[1], row)
        np.testing.assert_array_max_ulp(got, want[row], ulp)


@pytest.mark.parametrize("rows", [16, 5, 37])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_packed_row_is_the_files_row(format_name, rows):
    rng = np.random.default_rng(rows)
    for columns in (256, 768):
        data = random_rows(rng, format_name, rows, columns)
        order = rng.permutation(rows).astype(np.int32)
        want, exact = dequantized(format_name, data), naive.dequantize(format_name, data)
        for row_order in (None, order):
            packed = pack(format_name, data, columns, row_order)
            for row in range(rows):
                source = row if row_order is None else order[row]
                got = packed_row(format_name, packed, columns, row)
                np.testing.assert_array_equal(got, exact[source])
                # Q6_K: the gguf package rounds scale * sub-scale before it multiplies by the code.
                np.testing.assert_array_max_ulp(
                    got, want[source], 0 if format_name != "Q6_K" else 2
                )


@pytest.mark.parametrize("format_name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [1, 3, 100])
def test_float_rows_have_any_number_of_columns(format_name, columns):
    data = random_rows(np.random.default_rng(columns), format_name, 19, columns)
    packed = pack(format_name, data, columns)
    for row in range(19):
        got = packed_row(format_name, packed, columns, row)
        np.testing.assert_array_equal(got, naive.dequantize(format_name, data)[row])


def test_every_power_of_two_that_is_a_scale():
    data = np.random.default_rng(0).integers(0, 256, (256, 17 * 8)).astype(np.uint8)
    data[:, ::17] = np.arange(256)[:, None]
    with np.errstate(over="ignore"):  # the largest weights are infinite
        packed, want = pack("MXFP4", data, 256), dequantized("MXFP4", data)
    for row in range(256):
        np.testing.assert_array_equal(packed_row("MXFP4", packed, 256, row), want[row])


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_beyond_the_last_are_zero(format_name):
    data = random_rows(np.random.default_rng(1), format_name, 3, 256)
    packed = pack(format_name, data, 256)
    for row in range(3, ROWS):
        np.testing.assert_array_equal(packed_row(format_name, packed, 256, row), np.zeros(256))


@pytest.mark.parametrize("format_name", FORMATS)
def test_packing_adds_at_most_three_percent(format_name):
    assert tile_bytes(format_name, 4096) <= 1.03 * row_bytes(format_name, 4096) * ROWS


@pytest.mark.parametrize("format_name", FORMATS)
def test_two_matrices_lie_tile_by_tile_in_turns(format_name):
    rows, columns = 48, 256
    size = tile_bytes(format_name, columns)
    data = [random_rows(np.random.default_rng(i), format_name, rows, columns) for i in (0, 1)]
    out = np.zeros(2 * 3 * size, np.uint8)
    run = kernel(pack_unit(format_name), f"pack_{format_name}", 9)
    order = np.arange(rows, dtype=np.int32)
    for i in (0, 1):
        to = out.ctypes.data + i * size
        run(data[i], data[i].shape[1], order, rows, columns, to, 2 * size, 0, 3)
    alone = [pack(format_name, rows_, columns)[: 3 * size].reshape(3, size) for rows_ in data]
    np.testing.assert_array_equal(out.reshape(3, 2, size), np.stack(alone, 1))
