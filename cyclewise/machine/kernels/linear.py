"""Moments that multiply by weights: which tiles, for how many tokens, and what becomes of the sums.

`linear` runs over the tiles of one or more matrices that share an input (query, key and value)
and writes or adds the sums, with a bias where there is one, `linear_gelu` through a GELU;
`gated_silu` and `gated_gelu` take
tile i of the gate and of the up projection and write silu(gate) * up (SwiGLU: Shazeer, 2020) or
gelu(gate) * up. The arithmetic is in
`matmul.py`, called by address: the formats may be mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import F32, Emitter, Value, vector
from cyclewise.machine.kernels.layout import (
    BATCH,
    GATED,
    LINEAR,
    LINEAR_PART,
    LORA_B,
    THREAD,
    Record,
)
from cyclewise.machine.kernels.math import gelu, silu

Activation = Callable[[Emitter, Value], Value]

LANES = 16
MAX_BATCH_TOKENS = 512
SUMS_BYTES = MAX_BATCH_TOKENS * LANES * 4
"""Bytes of a tile's sums, of which `gated` needs two; the kernels' own scratch lies behind them."""


def _linear(
    activation: Activation | None, emitter: Emitter, moment: Value, batch: Value, thread: Value,
    first: Value, last: Value,
) -> None:  # fmt: skip
    m, b, t = (
        Record(emitter, moment, LINEAR),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    floats = vector(F32, LANES)
    tokens = emitter.variable(b.num_tokens)
    with emitter.when(m.of_logits.differs(0)):
        tokens.set(b.num_logits)
    count = tokens.get()
    x = m.x + t.private * m.x_private
    sums = t.scratch
    scratch = sums + 2 * SUMS_BYTES
    before = emitter.variable(emitter.constant(0))
    with emitter.range(0, m.num_parts) as index:
        part = Record(
            emitter, moment + 8 * len(LINEAR) + index * (8 * len(LINEAR_PART)), LINEAR_PART
        )
        begin = first - before.get()
        begin = (begin < 0).select(emitter.constant(0), begin)
        end = last - before.get()
        end = (end > part.num_tiles).select(part.num_tiles, end)
        with emitter.range(begin, end) as tile:
            weights = part.weights + tile * part.tile_bytes
            emitter.call_address(
                part.tile_kernel, weights, m.columns, x, m.x_stride, count, sums, scratch
            )
            _add_adapters(emitter, part.lora, batch, tile, sums)
            initial = emitter.variable(emitter.constant(0.0, floats))
            with emitter.when(part.bias.differs(0)):
                initial.set(emitter.load(part.bias + tile * 64, floats))
            bias = initial.get()
            out = m.out + part.out_offset + tile * 64
            with emitter.range(0, count) as token:
                to = out + token * m.out_stride
                value = emitter.variable(emitter.load(sums + token * 64, floats) + bias)
                with emitter.when(m.add_to_out.differs(0)):
                    value.set(emitter.load(to, floats) + value.get())
                if activation is not None:
                    value.set(activation(emitter, value.get()))
                emitter.store(to, value.get())
        before.add(part.num_tiles)


def _gated(
    activation: Activation, emitter: Emitter, moment: Value, batch: Value, thread: Value,
    first: Value, last: Value,
) -> None:  # fmt: skip
    m, b, t = (
        Record(emitter, moment, GATED),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    floats = vector(F32, LANES)
    count = b.num_tokens
    x = m.x + t.private * m.x_private
    gates = t.scratch
    ups, scratch = gates + SUMS_BYTES, gates + 2 * SUMS_BYTES
    with emitter.range(first, last) as tile:
        gate, up = m.gate + tile * m.gate_tile_bytes, m.up + tile * m.up_tile_bytes
        emitter.call_address(m.gate_kernel, gate, m.columns, x, m.x_stride, count, gates, scratch)
        emitter.call_address(m.up_kernel, up, m.columns, x, m.x_stride, count, ups, scratch)
        _add_adapters(emitter, m.gate_lora, batch, tile, gates)
        _add_adapters(emitter, m.up_lora, batch, tile, ups)
        with emitter.range(0, count) as token:
            opened = activation(emitter, emitter.load(gates + token * 64, floats))
            value = opened * emitter.load(ups + token * 64, floats)
            emitter.store(m.out + token * m.out_stride + tile * 64, value)


def _add_adapters(emitter: Emitter, lora: Value, batch: Value, tile: Value, sums: Value) -> None:
    """Adds to a tile's sums what the tokens' adapters (`lora.py`) add to them."""
    with emitter.when(lora.differs(0)):
        emitter.call_address(Record(emitter, lora, LORA_B).kernel, lora, batch, tile, sums)


def linear_unit() -> Unit:
    kernels = {
        "linear": partial(_linear, None), "linear_gelu": partial(_linear, gelu),
        "gated_silu": partial(_gated, silu), "gated_gelu": partial(_gated, gelu),
    }  # fmt: skip

    def write(emitter: Emitter) -> None:
        for name, kernel in kernels.items():
            emitter.function(name, 5, lambda *a, kernel=kernel: kernel(emitter, *a))

    return Unit("linear", write, tuple(kernels))
