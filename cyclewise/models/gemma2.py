"""Gemma 2 (Gemma Team, 2024): every other layer sees a window only; scores and logits are capped;
norms stand before and behind attention and feed-forward; the gate opens by GELU.
"""

from __future__ import annotations

from cyclewise.machine.packing import Weights
from cyclewise.machine.program import Program
from cyclewise.models.config import Config
from cyclewise.models.decoder import Decoder


def build(config: Config, weights: Weights, num_threads: int) -> Program:
    """The list of moments."""
    decoder = Decoder(config, weights, num_threads)
    rope = decoder.rope_tables(config.rope)
    decoder.embed(scale=config.hidden_size**0.5)
    for layer in decoder.layers():
        layer.norm("attention.norm", "attn_norm")
        layer.qkv()
        layer.rope(rope)
        layer.attend()
        layer.project(apart=True)
        layer.add_norm("attention.post_norm", "post_attention_norm")
        layer.norm("ffn.norm", "ffn_norm")
        layer.gate_up("gelu")
        layer.down(apart=True)
        layer.add_norm("ffn.post_norm", "post_ffw_norm")
    decoder.output()
    return decoder.program()
