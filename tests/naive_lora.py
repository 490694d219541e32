"""The slow twin of the kernels of LoRA adapters: `cyclewise/machine/kernels/lora.py`."""

from __future__ import annotations

import numpy as np

from tests import naive
from tests.naive import Bytes, Floats

SPLIT = 1024
BLOCK = 8


def low(
    format_name: str, a: Bytes, x: Floats, *, fused: bool = True, bfloat: bool = False
) -> Floats:
    """A x, split by split of the columns: float32 (splits, tokens, rank) of A as in a file."""
    size = {"F32": 4, "F16": 2, "BF16": 2}[format_name]
    parts = [
        naive.matmul(
            format_name, np.ascontiguousarray(a[:, first * size : (first + SPLIT) * size]),
            np.ascontiguousarray(x[:, first : first + SPLIT]), fused=fused, bfloat=bfloat,
        )
        for first in range(0, x.shape[1], SPLIT)
    ]  # fmt: skip
    return np.stack(parts)


def add(sums: Floats, b: Floats, parts: Floats, scale: float, *, fused: bool = True) -> Floats:
    """sums + scale * B (the sum of the splits): (tokens, rows)."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    scaled = total * np.float32(scale)
    for first in range(0, b.shape[1], BLOCK):
        block = np.zeros_like(sums)
        for column in range(first, min(first + BLOCK, b.shape[1])):
            left = np.broadcast_to(b[None, :, column], sums.shape)
            right = np.broadcast_to(scaled[:, None, column], sums.shape)
            block = naive.fma(left, right, block, fused=fused)
        sums = sums + block
    return sums
