"""Llama 1 to 3 (Touvron et al., 2023), SmolLM2, TinyLlama, Mistral (Jiang et al., 2023), Qwen2 and
Qwen2.5 (Yang et al., 2024).

Each layer adds to the residual stream twice: attention over RMS-normed input, then a SwiGLU
feed-forward. Qwen2's biases and Mistral's window are in its file.
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
        layer.qkv()
        layer.rope(rope)
        layer.attend()
        layer.project()
        layer.norm("ffn.norm", "ffn_norm")
        layer.gate_up("silu")
        layer.down()
    decoder.output()
    return decoder.program()
