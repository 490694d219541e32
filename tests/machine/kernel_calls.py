"""How the kernels' tests call kernels: records by name, random blocks, packing."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.kernels.blocks import BLOCK_FORMATS as BLOCKS
from cyclewise.machine.kernels.blocks import ROWS, tile_bytes
from cyclewise.machine.kernels.compiler import Unit, callable_at, host_compiler
from cyclewise.machine.kernels.layout import THREAD
from cyclewise.machine.kernels.matmul import SCRATCH_BYTES, matmul_unit
from cyclewise.machine.kernels.pack import pack_unit
from cyclewise.machine.kernels.target import host_target
from cyclewise.weights.formats import FORMATS as FILE_FORMATS
from tests import naive

HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
}  # fmt: skip
"""Where in a file's block float16 scales lie, if not at its start alone."""

FLOAT_FORMATS = ("F32", "F16", "BF16")
BLOCK_FORMATS = tuple(BLOCKS)
FORMATS = FLOAT_FORMATS + BLOCK_FORMATS
GGML_FORMATS = tuple(n for n in BLOCK_FORMATS if FILE_FORMATS[n].ggml_id is not None)

FUSED = host_target().name != "plain" or platform.machine().lower() not in ("x86_64", "amd64")
"""Whether fused multiply-adds are fused: the plain x86 target has no instruction for them."""
EXACTLY = {"fused": FUSED, "bfloat": host_target().has_bf16}
"""What the twins of matrix kernels must know to give the same bits."""

GUARD = 64
"""Bytes behind a buffer that nobody may write."""


def kernel(unit: Unit, name: str, num_arguments: int = 5) -> Callable[..., None]:
    """A function of a unit, to be called with integers and arrays."""
    host_compiler().load([unit])
    function = callable_at(host_compiler().address(name), num_arguments)

    def call(*arguments: Any) -> None:
        function(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))

    return call


def address(unit: Unit, name: str) -> int:
    host_compiler().load([unit])
    return host_compiler().address(name)


def record(fields: Sequence[str], **values: Any) -> NDArray[np.int64]:
    """A kernel's record; what is not given is 0, an array is its address, a float its bits."""
    unknown = values.keys() - set(fields)
    assert not unknown, unknown
    return np.array([_field(values.get(name, 0)) for name in fields], np.int64)


def _field(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    if isinstance(value, float):
        return int(np.float32(value).view(np.int32))
    return int(value)


class Thread:
    """A thread's record with scratch of exactly the size asked for, and a guard behind it."""

    def __init__(self, scratch_bytes: int, private: int = 0) -> None:
        self._scratch = guarded(scratch_bytes)
        self.record = record(THREAD, scratch=self._scratch, private=private)

    def check(self) -> None:
        check_guard(self._scratch)


def guarded(num_bytes: int) -> NDArray[np.uint8]:
    """`num_bytes` and a guard behind them."""
    return np.full(num_bytes + GUARD, 0xA5, np.uint8)


def check_guard(buffer: NDArray[np.uint8]) -> None:
    assert (buffer[-GUARD:] == 0xA5).all(), "something was written behind a buffer"


# Weights


def row_bytes(format_name: str, columns: int) -> int:
    found = FILE_FORMATS[format_name]
    return columns // found.block_size * found.block_bytes


def random_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Any finite float16: normal, subnormal, zero, of both signs; bytes in the last axis."""
    words = rng.integers(0, 0x7C00, shape).astype(np.uint16)
    words |= (rng.integers(0, 2, shape) << 15).astype(np.uint16)
    return words[..., None].view(np.uint8)


def random_rows(
    rng: np.random.Generator, format_name: str, rows: int, columns: int, scale: float | None = None
) -> NDArray[np.uint8]:
    """A file's rows: random codes; scales are any finite float16, or small if `scale` is given.

    uint8 (rows, row bytes).
    """
    if format_name in FLOAT_FORMATS:
        values = rng.standard_normal((rows, columns)).astype(np.float32) * (scale or 1.0)
        if format_name == "F32":
            return values.view(np.uint8).reshape(rows, -1)
        if format_name == "F16":
            if scale is None:
                return random_halves(rng, (rows, columns)).reshape(rows, -1)
            return values.astype(np.float16).view(np.uint8).reshape(rows, -1)
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        return words.view(np.uint8).reshape(rows, -1)
    block = FILE_FORMATS[format_name]
    shape = (rows, columns // block.block_size)
    data = rng.integers(0, 256, (*shape, block.block_bytes)).astype(np.uint8)
    if format_name == "MXFP4":
        middle = 100 if scale is None else 128 + round(np.log2(scale))
        spread = 100 if scale is None else 1
        data[..., 0] = rng.integers(middle - spread, middle + spread + 1, shape)
    for at in HALVES.get(format_name, (0,)):
        if scale is None:
            data[..., at : at + 2] = random_halves(rng, shape)
        else:
            small = (scale * rng.uniform(0.5, 1.5, shape)).astype(np.float16)
            data[..., at : at + 2] = small[..., None].view(np.uint8)
    return data.reshape(rows, -1)


LLAMA_CPP = np.load(Path(__file__).parents[1] / "weights" / "blocks.npz")
"""Blocks quantized by llama.cpp and what it makes of them: `weights/make_blocks.py`."""


def llama_cpp_rows(format_name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A file's rows and their values."""
    return LLAMA_CPP[f"{format_name}.blocks"], LLAMA_CPP[f"{format_name}.values"]


def pack(
    format_name: str, data: NDArray[np.uint8], columns: int, order: NDArray[np.int32] | None = None
) -> NDArray[np.uint8]:
    """Packed tiles with a guard behind them."""
    rows = len(data)
    order = np.arange(rows, dtype=np.int32) if order is None else order
    tiles, stride = -(-rows // ROWS), tile_bytes(format_name, columns)
    out = guarded(tiles * stride)
    out[:-GUARD] = 0
    run = kernel(pack_unit(format_name), f"pack_{format_name}", 9)
    # Any split into ranges of tiles gives the whole.
    middle = tiles // 2
    for first, last in ((middle, tiles), (0, middle)):
        run(data, data.shape[1], order, rows, columns, out, stride, first, last)
    check_guard(out)
    return out


def packed_row(
    format_name: str, packed: NDArray[np.uint8], columns: int, row: int
) -> NDArray[np.float32]:
    """Row `row` of packed tiles as float32."""
    out, scratch = guarded(columns * 4), guarded(SCRATCH_BYTES)
    tile = packed.ctypes.data + row // ROWS * tile_bytes(format_name, columns)
    run = kernel(matmul_unit(format_name), f"row_{format_name}", 5)
    run(tile, columns, row % ROWS, out, scratch)
    check_guard(out)
    check_guard(scratch)
    return out[:-GUARD].view(np.float32)


def activations(format_name: str, x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], int]:
    """The bytes that matrix kernels of that format read, and the stride of float rows."""
    if naive.is_quantized(format_name):
        return naive.quantize(x).pack(), 0
    rows = np.full((len(x), x.shape[1] + 16), np.nan, np.float32)
    rows[:, : x.shape[1]] = x
    return rows.view(np.uint8).reshape(-1), rows.strides[0]


def tile_sums(
    format_name: str, tile: NDArray[np.uint8], x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A tile's rows times x: (tokens, 16)."""
    rows, stride = activations(format_name, x)
    sums, scratch = guarded(len(x) * ROWS * 4), guarded(SCRATCH_BYTES)
    run = kernel(matmul_unit(format_name), f"tile_{format_name}", 7)
    run(tile, x.shape[1], rows, stride, len(x), sums, scratch)
    check_guard(sums)
    check_guard(scratch)
    return sums[:-GUARD].view(np.float32).reshape(len(x), ROWS)
