"""Gemma 3, text (Gemma Team, 2025): Gemma 2 with an RMSNorm of each head of queries and keys in
the place of capped scores; five layers with a window, which rotate by a base of their own, for each
that sees everything.
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
    local = decoder.rope_tables(config.local_rope or config.rope, factors=False)
    decoder.embed(scale=config.hidden_size**0.5)
    for layer in decoder.layers():
        layer.norm("attention.norm", "attn_norm")
        layer.qkv()
        layer.rope(local if layer.window else rope, norms=True)
        layer.attend()
        layer.project(apart=True)
        layer.add_norm("attention.post_norm", "post_attention_norm")
        layer.norm("ffn.norm", "ffn_norm")
        layer.gate_up("gelu")
        layer.down(apart=True)
        layer.add_norm("ffn.post_norm", "post_ffw_norm")
    decoder.output()
    return decoder.program()
