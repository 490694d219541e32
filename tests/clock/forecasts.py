"""Costs of kernels with round numbers, and a small program to predict with them."""

from __future__ import annotations

from cyclewise.clock.calibrate import COUNTS, ROW_KINDS
from cyclewise.clock.predict import Part, View
from cyclewise.machine import costs
from cyclewise.machine.kernels.blocks import ROWS, tile_bytes

FIXED, TILE, GROUP = 1e-6, 2e-8, 1e-8
"""Seconds of a matrix moment with one token."""
BANDWIDTH = 1e11
ROW = 1e-7
GAP = 5e-7
STEP, SEQUENCE, LOGIT = 3e-6, 2e-6, 1e-9


def kernel_costs(*formats, bandwidth=BANDWIDTH):
    """Half of what one token takes grows with the tokens; what is fixed does not."""

    def linear(value):
        return [value * (1 + count) / 2 for count in COUNTS]

    matrix = {
        "fixed": [FIXED] * len(COUNTS), "tile": linear(TILE), "group": linear(GROUP),
        "bandwidth": [bandwidth] * len(COUNTS),
    }  # fmt: skip
    others = {
        **{kind: linear(ROW) for kind in ROW_KINDS},
        "attend": [1e-10, 2e-10, 1e-7, GAP], "host": [STEP, SEQUENCE, LOGIT],
    }  # fmt: skip
    return {**dict.fromkeys(formats, matrix), "others": others}


def matrix(rows, columns, format_name="Q8_0"):
    return costs.MatrixShape(
        format_name, rows, columns, tile_bytes(format_name, columns) * -(-rows // ROWS)
    )


def view(layers=3, heads=8, kv_heads=2, head_dim=16, hidden=128, ff=256, vocab=512, chunk=64):
    """A program of the Llama family, without its machine."""
    keys = kv_heads * head_dim
    qkv = tuple(matrix(rows, hidden) for rows in (heads * head_dim, keys, keys))
    parts = [Part("embed", costs.embed_form(hidden, 4 * hidden))]
    for layer in range(layers):
        name = f"layers.{layer}."
        forms = {
            "attention.norm": costs.norm_form(hidden),
            "attention.qkv.quantize": costs.quantize_form(hidden),
            "attention.qkv": costs.linear_form(qkv, quantized=True),
            "attention.rope": costs.rope_form(heads, kv_heads, head_dim, head_dim),
            "attention.attend": costs.attention_form(heads, kv_heads, head_dim),
            "attention.output.quantize": costs.quantize_form(heads * head_dim),
            "attention.output": costs.linear_form(
                (matrix(hidden, heads * head_dim),), quantized=True, add=True
            ),
            "ffn.norm": costs.norm_form(hidden),
            "ffn.gate_up.quantize": costs.quantize_form(hidden),
            "ffn.gate_up": costs.gated_form(matrix(ff, hidden), matrix(ff, hidden), quantized=True),
            "ffn.down.quantize": costs.quantize_form(ff),
            "ffn.down": costs.linear_form((matrix(hidden, ff),), quantized=True, add=True),
        }
        parts += [Part(name + kind, form) for kind, form in forms.items()]
    parts += [
        Part("output.norm", costs.norm_form(hidden, of_logits=True)),
        Part("output.quantize", costs.quantize_form(hidden, of_logits=True)),
        Part("output", costs.linear_form((matrix(vocab, hidden),), quantized=True, of_logits=True)),
    ]
    return View(tuple(parts), heads, kv_heads, head_dim, vocab, chunk)
