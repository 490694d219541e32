"""Phi-3 (Abdin et al., 2024): Llama, with one matrix for query, key and value and one for gate and
up. Part of a head may rotate, by longrope's factors in long contexts.
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
    decoder.embed()
    for layer in decoder.layers():
        layer.norm("attention.norm", "attn_norm")
        layer.fused_qkv()
        layer.rope(rope)
        layer.attend()
        layer.project()
        layer.norm("ffn.norm", "ffn_norm")
        layer.fused_gate_up("silu")
        layer.down()
    decoder.output()
    return decoder.program()
