"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, one matrix for query, key and value,
and a feed-forward of two matrices with GELU between them. Everything has a bias.
"""

from __future__ import annotations

from cyclewise.machine.packing import Weights
from cyclewise.machine.program import Program
from cyclewise.models.config import Config
from cyclewise.models.decoder import Decoder


def build(config: Config, weights: Weights, num_threads: int) -> Program:
    """The list of moments."""
    decoder = Decoder(config, weights, num_threads)
    decoder.embed()
    decoder.positions()
    for layer in decoder.layers():
        layer.norm("attention.norm", "attn_norm")
        layer.fused_qkv()
        layer.rope((None, None))
        layer.attend()
        layer.project()
        layer.norm("ffn.norm", "ffn_norm")
        layer.up()
        layer.down()
    decoder.output()
    return decoder.program()
