from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cyclewise.machine.kernels.blocks import tile_bytes
from cyclewise.machine.kernels.layout import BATCH, GATED, LINEAR, LINEAR_PART
from cyclewise.machine.kernels.linear import SUMS_BYTES, linear_unit
from cyclewise.machine.kernels.matmul import SCRATCH_BYTES, matmul_unit
from tests import naive
from tests.machine.kernel_calls import (
    EXACTLY,
    GUARD,
    Thread,
    activations,
    address,
    check_guard,
    guarded,
    kernel,
    pack,
    random_rows,
    record,
)

SCRATCH = 2 * SUMS_BYTES + SCRATCH_BYTES
COLUMNS = 256


def tile_kernel(format_name):
    return address(matmul_unit(format_name), f"tile_{format_name}")


class Weights:
    """One random matrix, packed, and with it what a moment's record says of it."""

    def __init__(self, rng, format_name, rows, *, bias=False):
        self.format_name, self.rows = format_name, rows
        self.data = random_rows(rng, format_name, rows, COLUMNS, 0.02)
        self.packed = pack(format_name, self.data, COLUMNS)
        self.num_tiles = -(-rows // 16)
        self.bias = None
        if bias:
            self.bias = np.zeros(16 * self.num_tiles, np.float32)
            self.bias[:rows] = rng.standard_normal(rows)

    def part(self, out_offset):
        return record(
            LINEAR_PART, tile_kernel=tile_kernel(self.format_name), weights=self.packed,
            tile_bytes=tile_bytes(self.format_name, COLUMNS), num_tiles=self.num_tiles,
            out_offset=out_offset * 4, bias=0 if self.bias is None else self.bias,
        )  # fmt: skip

    def sums(self, x):
        """The twin's (tokens, rows), biases added."""
        sums = naive.matmul(self.format_name, self.data, x, **EXACTLY)
        return sums if self.bias is None else sums + self.bias[: self.rows]


def inputs(rng, format_name, tokens):
    """Activations, their bytes as a kernel reads them, and the stride of floats."""
    x = rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
    return x, *activations(format_name, x)


def run_in_pieces(name, moment, batch, thread, tiles):
    """Any order of any pieces, as threads claim them."""
    run, cuts = kernel(linear_unit(), name), [0, 1, tiles // 2, tiles]
    for first, last in reversed(list(pairwise(cuts))):
        if first < last:
            run(moment, batch, thread.record, first, last)
    thread.check()


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(
    "formats", [("Q4_1", "Q4_0", "Q6_K"), ("Q4_K", "Q8_0", "Q5_0"), ("F16", "F32", "BF16")]
)
def test_matrices_of_several_formats_share_an_input(formats, tokens):
    """Query, key and value with biases: a part's rows lie behind those of the part before."""
    rng = np.random.default_rng(tokens)
    parts = [
        Weights(rng, name, rows, bias=bias)
        for name, rows, bias in zip(formats, (64, 32, 16), (True, False, True), strict=True)
    ]
    x, packed_x, stride = inputs(rng, formats[0], tokens)
    out = guarded(tokens * 112 * 4)
    moment = record(
        LINEAR, x=packed_x, x_stride=stride, columns=COLUMNS, out=out,
        out_stride=112 * 4, num_parts=3,
    )  # fmt: skip
    offsets = (0, 64, 96)
    whole = np.concatenate([moment, *(p.part(o) for p, o in zip(parts, offsets, strict=True))])
    batch = record(BATCH, num_tokens=tokens)
    run_in_pieces("linear", whole, batch, Thread(SCRATCH), 7)
    check_guard(out)
    want = np.concatenate([part.sums(x) for part in parts], axis=1)
    np.testing.assert_array_equal(out[:-GUARD].view(np.float32).reshape(tokens, -1), want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format_name", ["Q4_1", "F32"])
def test_the_residual_is_added_to(format_name, bias):
    rng = np.random.default_rng(1)
    weights = Weights(rng, format_name, 44, bias=bias)
    x, packed_x, stride = inputs(rng, format_name, 5)
    hidden = np.zeros((5, 48), np.float32)
    hidden[:, :44] = rng.standard_normal((5, 44))
    before = hidden.copy()
    moment = record(
        LINEAR, x=packed_x, x_stride=stride, columns=COLUMNS, out=hidden,
        out_stride=48 * 4, add_to_out=1, num_parts=1,
    )  # fmt: skip
    whole = np.concatenate([moment, weights.part(0)])
    run_in_pieces("linear", whole, record(BATCH, num_tokens=5), Thread(SCRATCH), 3)
    np.testing.assert_array_equal(hidden[:, :44], before[:, :44] + weights.sums(x))
    np.testing.assert_array_equal(hidden[:, 44:], 0)


def test_only_the_rows_that_need_logits_from_a_private_buffer():
    rng = np.random.default_rng(2)
    weights = Weights(rng, "Q8_0", 37)
    x, packed_x, stride = inputs(rng, "Q8_0", 2)
    private = len(packed_x)
    buffers = np.concatenate([np.zeros_like(packed_x), packed_x])
    out = guarded(6 * 48 * 4)
    moment = record(
        LINEAR, x=buffers, x_stride=stride, x_private=1, columns=COLUMNS, out=out,
        out_stride=48 * 4, of_logits=1, num_parts=1,
    )  # fmt: skip
    whole = np.concatenate([moment, weights.part(0)])
    batch = record(BATCH, num_tokens=6, num_logits=2)
    run_in_pieces("linear", whole, batch, Thread(SCRATCH, private), 3)
    logits = out[:-GUARD].view(np.float32).reshape(6, 48)
    np.testing.assert_array_equal(logits[:2, :37], weights.sums(x))
    assert (out[2 * 48 * 4 :] == 0xA5).all()


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("format_name", ["Q4_1", "F32"])
def test_through_gelu(format_name, tokens):
    rng = np.random.default_rng(tokens)
    weights = Weights(rng, format_name, 40, bias=True)
    x, packed_x, stride = inputs(rng, format_name, tokens)
    out = guarded(tokens * 48 * 4)
    moment = record(
        LINEAR, x=packed_x, x_stride=stride, columns=COLUMNS, out=out, out_stride=48 * 4,
        num_parts=1,
    )  # fmt: skip
    whole = np.concatenate([moment, weights.part(0)])
    run_in_pieces("linear_gelu", whole, record(BATCH, num_tokens=tokens), Thread(SCRATCH), 3)
    check_guard(out)
    got = out[:-GUARD].view(np.float32).reshape(tokens, 48)
    np.testing.assert_allclose(got[:, :40], naive.gelu(weights.sums(x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[:, 40:], 0)


@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("formats", [("Q4_0", "Q4_0"), ("Q6_K", "Q4_K"), ("F32", "F16")])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated(formats, tokens, activation):
    rng = np.random.default_rng(tokens)
    gate, up = (Weights(rng, name, 40) for name in formats)
    x, packed_x, stride = inputs(rng, formats[0], tokens)
    private = packed_x.nbytes
    buffers = np.concatenate([np.zeros_like(packed_x), packed_x])
    out = guarded(tokens * 48 * 4)
    moment = record(
        GATED, x=buffers, x_stride=stride, x_private=1, columns=COLUMNS,
        out=out, out_stride=48 * 4,
        gate_kernel=tile_kernel(formats[0]), gate=gate.packed,
        gate_tile_bytes=tile_bytes(formats[0], COLUMNS),
        up_kernel=tile_kernel(formats[1]), up=up.packed,
        up_tile_bytes=tile_bytes(formats[1], COLUMNS),
    )  # fmt: skip
    batch = record(BATCH, num_tokens=tokens)
    run_in_pieces(f"gated_{activation}", moment, batch, Thread(SCRATCH, private), 3)
    check_guard(out)
    got = out[:-GUARD].view(np.float32).reshape(tokens, 48)
    want = naive.ACTIVATIONS[activation](gate.sums(x)) * up.sums(x)
    np.testing.assert_allclose(got[:, :40], want, rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(got[:, 40:], 0)
