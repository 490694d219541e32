from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cyclewise.machine.kernels.blocks import FLOAT_FORMATS as BYTES
from cyclewise.machine.kernels.blocks import tile_bytes
from cyclewise.machine.kernels.layout import (
    BATCH,
    GATED,
    LINEAR,
    LINEAR_PART,
    LORA_A,
    LORA_A_MATRIX,
    LORA_B,
    LORA_B_MATRIX,
    RUN,
)
from cyclewise.machine.kernels.linear import MAX_BATCH_TOKENS, linear_unit
from cyclewise.machine.kernels.lora import BLOCK_TOKENS, lora_unit
from cyclewise.machine.kernels.matmul import matmul_unit
from tests import naive, naive_lora
from tests.machine.kernel_calls import (
    EXACTLY,
    FUSED,
    GUARD,
    Thread,
    address,
    check_guard,
    guarded,
    kernel,
    pack,
    random_rows,
    record,
)
from tests.machine.test_linear import SCRATCH, Weights, inputs

RUNS = {
    "one_token": (1, [(0, 1, 0)]),
    "all_of_one": (7, [(0, 7, 1)]),
    "mixed": (150, [(0, 1, 1), (2, 3, 0), (5, 1, 1), (6, 2, 2), (9, 120, 0), (140, 7, 1)]),
    "many": (MAX_BATCH_TOKENS, [(0, MAX_BATCH_TOKENS, 0)]),
    "none": (3, []),
}
"""Tokens of a batch, and (first, number, adapter) of the runs that have one."""


def batch_of(name):
    tokens, runs = RUNS[name]
    table = np.array(runs, np.int64).reshape(-1, len(RUN))
    return table, record(BATCH, num_tokens=tokens, num_runs=len(runs), runs=table)


@pytest.mark.parametrize("columns", [40, 1024, 2304])
@pytest.mark.parametrize("formats", [("F32", "F16"), ("BF16", "F32")])
@pytest.mark.parametrize("name", RUNS)
def test_a(name, formats, columns):
    """Two adapters of 24 and of 40 rows; what no run has is left alone."""
    tokens, runs = RUNS[name]
    rng = np.random.default_rng(columns)
    ranks, splits, slots = (24, 40), -(-columns // 1024), 3
    rows = [random_rows(rng, f, r, columns, 0.1) for f, r in zip(formats, ranks, strict=True)]
    packed = [pack(f, data, columns) for f, data in zip(formats, rows, strict=True)]
    matrices = [
        record(
            LORA_A_MATRIX, kernel=address(matmul_unit(f), f"tile_{f}"), weights=weights,
            tile_bytes=tile_bytes(f, columns), num_tiles=-(-rank // 16),
            column_bytes=16 * BYTES[f],
        )
        for f, weights, rank in zip(formats, packed, ranks, strict=True)
    ]  # fmt: skip
    matrices.append(record(LORA_A_MATRIX))  # a third one that changes nothing here
    x = np.full((tokens, columns + 16), np.nan, np.float32)
    x[:, :columns] = rng.standard_normal((tokens, columns))
    low = guarded(slots * splits * MAX_BATCH_TOKENS * 64)
    head = record(
        LORA_A, x=x.ctypes.data - 128, x_private=1, x_stride=x.strides[0], columns=columns,
        low=low, num_slots=slots, num_splits=splits,
    )  # fmt: skip
    moment, (_table, batch) = np.concatenate([head, *matrices]), batch_of(name)
    thread, run = Thread(SCRATCH, 128), kernel(lora_unit(), "lora_a")
    tiles = -(-tokens // BLOCK_TOKENS) * slots * splits
    for first, last in reversed(list(pairwise([0, 1, tiles // 2, tiles]))):
        run(moment, batch, thread.record, first, last)
    thread.check()
    check_guard(low)
    got = low[:-GUARD].view(np.float32).reshape(slots, splits, MAX_BATCH_TOKENS, 16)
    want = np.full(low.size - GUARD, 0xA5, np.uint8).view(np.float32).reshape(got.shape)
    for first, count, adapter in runs:
        if adapter == 2:
            continue
        where = slice(first, first + count)
        parts = naive_lora.low(formats[adapter], rows[adapter], x[where, :columns], **EXACTLY)
        padded = np.zeros((splits, count, -(-ranks[adapter] // 16) * 16), np.float32)
        padded[..., : ranks[adapter]] = parts
        for slot in range(padded.shape[2] // 16):
            want[slot, :, where] = padded[..., 16 * slot : 16 * slot + 16]
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


class Additions:
    """Two random adapters of a matrix, and what a table says of them."""

    def __init__(self, rng, rows, low, num_splits, format_name="F16"):
        self.ranks, self.first_rows, self.scales = (8, 24), (8, 16), (2.0, 0.3)
        self.low, self.num_splits, self.format_name = low, num_splits, format_name
        self.data = [random_rows(rng, format_name, rows, rank, 0.3) for rank in self.ranks]
        self.packed = [
            pack(format_name, data, rank) for data, rank in zip(self.data, self.ranks, strict=True)
        ]
        matrices = [
            record(
                LORA_B_MATRIX, weights=weights, tile_bytes=tile_bytes(format_name, rank),
                num_blocks=rank // 8, first_row=first, scale=scale,
            )
            for weights, rank, first, scale in zip(
                self.packed, self.ranks, self.first_rows, self.scales, strict=True
            )
        ]  # fmt: skip
        # A third one that leaves the matrix alone.
        matrices.append(record(LORA_B_MATRIX))
        add = address(lora_unit(), f"lora_b_{format_name}")
        head = record(LORA_B, kernel=add, low=low, num_splits=num_splits)
        self.table = np.concatenate([head, *matrices])

    def added(self, sums, runs):
        """The twin's (tokens, rows)."""
        sums = sums.copy()
        low = self.low.reshape(-1, self.num_splits, MAX_BATCH_TOKENS, 16)
        for first, count, adapter in runs:
            if adapter == 2:
                continue
            where, at = slice(first, first + count), self.first_rows[adapter]
            whole = low[:, :, where].transpose(1, 2, 0, 3).reshape(self.num_splits, count, -1)
            b = naive.dequantize(self.format_name, self.data[adapter])
            parts = whole[..., at : at + self.ranks[adapter]]
            scale = self.scales[adapter]
            sums[where] = naive_lora.add(sums[where], b, parts, scale, fused=FUSED)
        return sums


def low_of(rng, num_splits):
    shape = (3, num_splits, MAX_BATCH_TOKENS, 16)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("format_name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", RUNS)
def test_b(name, format_name, num_splits):
    """Onto the sums of each of three tiles."""
    tokens, runs = RUNS[name]
    rng = np.random.default_rng(num_splits)
    additions = Additions(rng, 40, low_of(rng, num_splits), num_splits, format_name)
    _table, batch = batch_of(name)
    run = kernel(lora_unit(), f"lora_b_{format_name}", 4)
    before = rng.standard_normal((tokens, 48)).astype(np.float32)
    before[:, 40:] = 0
    want = additions.added(before[:, :40], runs)
    for tile in range(3):
        sums = guarded(tokens * 64)
        sums[:-GUARD].view(np.float32)[:] = before[:, 16 * tile : 16 * tile + 16].reshape(-1)
        run(additions.table, batch, tile, sums)
        check_guard(sums)
        got = sums[:-GUARD].view(np.float32).reshape(tokens, 16)
        width = min(16, 40 - 16 * tile)
        np.testing.assert_array_equal(got[:, :width], want[:, 16 * tile :][:, :width])
        np.testing.assert_array_equal(got[:, width:], 0)


@pytest.mark.parametrize("name", ["one_token", "mixed"])
@pytest.mark.parametrize("format_name", ["Q4_1", "F16"])
def test_before_bias_and_residual(name, format_name):
    tokens, runs = RUNS[name]
    rng = np.random.default_rng(3)
    weights, plain = Weights(rng, format_name, 40, bias=True), Weights(rng, format_name, 40)
    plain.data, plain.packed = weights.data, weights.packed
    additions = Additions(rng, 40, low_of(rng, 1), 1)
    x, packed_x, stride = inputs(rng, format_name, tokens)
    hidden = rng.standard_normal((tokens, 48)).astype(np.float32)
    before = hidden.copy()
    moment = record(
        LINEAR, x=packed_x, x_stride=stride, columns=256, out=hidden, out_stride=48 * 4,
        add_to_out=1, num_parts=1,
    )  # fmt: skip
    part = weights.part(0)
    part[LINEAR_PART.index("lora")] = additions.table.ctypes.data
    whole, thread = np.concatenate([moment, part]), Thread(SCRATCH)
    _table, batch = batch_of(name)
    kernel(linear_unit(), "linear")(whole, batch, thread.record, 0, 3)
    thread.check()
    want = before[:, :40] + (additions.added(plain.sums(x), runs) + weights.bias[:40])
    np.testing.assert_array_equal(hidden[:, :40], want)


@pytest.mark.parametrize("changed", [("gate",), ("up",), ("gate", "up")])
def test_before_the_activation(changed):
    tokens, runs = RUNS["mixed"]
    rng = np.random.default_rng(4)
    gate, up = (Weights(rng, "Q8_0", 40) for _ in range(2))
    low = low_of(rng, 1)
    additions = {which: Additions(rng, 40, low, 1) for which in changed}
    x, packed_x, stride = inputs(rng, "Q8_0", tokens)
    out = guarded(tokens * 48 * 4)
    tile = address(matmul_unit("Q8_0"), "tile_Q8_0")
    moment = record(
        GATED, x=packed_x, x_stride=stride, columns=256, out=out, out_stride=48 * 4,
        gate_kernel=tile, gate=gate.packed, gate_tile_bytes=tile_bytes("Q8_0", 256),
        up_kernel=tile, up=up.packed, up_tile_bytes=tile_bytes("Q8_0", 256),
        **{f"{which}_lora": each.table for which, each in additions.items()},
    )  # fmt: skip
    _table, batch = batch_of("mixed")
    thread = Thread(SCRATCH)
    kernel(linear_unit(), "gated_silu")(moment, batch, thread.record, 0, 3)
    check_guard(out)
    sums = {
        name: additions[name].added(weights.sums(x), runs) if name in additions else weights.sums(x)
        for name, weights in (("gate", gate), ("up", up))
    }
    got = out[:-GUARD].view(np.float32).reshape(tokens, 48)
    want = naive.silu(sums["gate"]) * sums["up"]
    np.testing.assert_allclose(got[:, :40], want, rtol=1e-5, atol=1e-30)
