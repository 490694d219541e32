"""The Llama family: Llama 1 to 3, SmolLM2, TinyLlama, Mistral; and what Qwen2 changes of it.

Touvron et al., 2023. Each layer adds to the residual stream twice: attention over RMS-normed
input, then a SwiGLU feed-forward. The file's llama tensors pair neighbouring dimensions for RoPE;
here a head's halves are pairs, so query and key rows are packed in that order, which changes no
dot product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.builder import Builder
from cyclewise.machine.packing import Weights
from cyclewise.machine.program import Program
from cyclewise.models.config import Config


@dataclass(frozen=True, slots=True)
class Variant:
    """Where the architectures of the family differ."""

    neighbours_rotate: bool
    """The file pairs dimensions 2i and 2i+1 for RoPE, not i and i + half."""


LLAMA = Variant(neighbours_rotate=True)


def build(config: Config, weights: Weights, num_threads: int, variant: Variant = LLAMA) -> Program:
    """The list of moments."""
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    builder = Builder(
        hidden_size=hidden, head_dim=config.head_dim, num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads, num_layers=config.num_layers,
        feed_forward=config.feed_forward, vocab_size=config.vocab_size,
        context_length=config.context_length, num_threads=num_threads,
        epsilon=config.norm_epsilon,
    )  # fmt: skip
    query_order = _row_order(config, config.num_heads, variant)
    key_order = _row_order(config, config.num_kv_heads, variant)
    cosines, sines = rope_tables(config, weights)
    table = weights.matrix("token_embd.weight", (config.vocab_size, hidden))

    builder.embed("embed", table)
    for layer in range(config.num_layers):
        file, name = f"blk.{layer}.", f"layers.{layer}."
        parts = (
            ("attn_q", queries, query_order),
            ("attn_k", keys, key_order),
            ("attn_v", keys, None),
        )
        builder.norm(name + "attention.norm", weights.vector(file + "attn_norm.weight", hidden))
        builder.qkv(
            name + "attention.qkv",
            [
                weights.matrix(f"{file}{part}.weight", (size, hidden), order)
                for part, size, order in parts
            ],
            [_bias(weights, f"{file}{part}.bias", size, order) for part, size, order in parts],
        )
        builder.rope(name + "attention.rope", layer, cosines, sines)
        builder.attention(name + "attention.attend", layer)
        builder.project(
            name + "attention.output",
            weights.matrix(file + "attn_output.weight", (hidden, queries)),
            _bias(weights, file + "attn_output.bias", hidden, None),
        )
        builder.norm(name + "ffn.norm", weights.vector(file + "ffn_norm.weight", hidden))
        builder.gated(
            name + "ffn.gate_up",
            *weights.pair(
                (file + "ffn_gate.weight", file + "ffn_up.weight"), (config.feed_forward, hidden)
            ),
        )
        builder.down(
            name + "ffn.down",
            weights.matrix(file + "ffn_down.weight", (hidden, config.feed_forward)),
        )
    builder.norm("output.norm", weights.vector("output_norm.weight", hidden), of_logits=True)
    tied = "output.weight" not in weights
    builder.output(
        "output", table if tied else weights.matrix("output.weight", (config.vocab_size, hidden))
    )
    return builder.build(weights)


def _bias(
    weights: Weights, name: str, size: int, order: NDArray[np.int32] | None
) -> NDArray[np.float32] | None:
    return weights.vector(name, size, order) if name in weights else None


def _row_order(config: Config, num_heads: int, variant: Variant) -> NDArray[np.int32] | None:
    """Which row of the file each packed row is, so that a head's halves are RoPE's pairs."""
    if not variant.neighbours_rotate:
        return None
    head = np.arange(config.head_dim)
    rotated = np.arange(config.rope_dim)
    head[: config.rope_dim] = np.concatenate([rotated[::2], rotated[1::2]])
    starts = np.arange(num_heads)[:, None] * config.head_dim
    return (starts + head).reshape(-1).astype(np.int32)


def rope_tables(
    config: Config, weights: Weights
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, float32 (context, rope_dim / 2); Llama 3's scaling comes as factors in
    the file.
    """
    half = config.rope_dim // 2
    frequencies = config.rope_base ** (-np.arange(half) / half) / config.rope_scaling
    if "rope_freqs.weight" in weights:
        frequencies = frequencies / weights.vector("rope_freqs.weight", half)[:half]
    angles = np.arange(config.context_length)[:, None] * frequencies
    return weights.keep(np.cos(angles).astype(np.float32)), weights.keep(
        np.sin(angles).astype(np.float32)
    )
