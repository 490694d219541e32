"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on query, key and value, and RoPE
pairing a head's halves.
"""

from __future__ import annotations

from cyclewise.machine.packing import Weights
from cyclewise.machine.program import Program
from cyclewise.models import llama
from cyclewise.models.config import Config

QWEN2 = llama.Variant(neighbours_rotate=False)


def build(config: Config, weights: Weights, num_threads: int) -> Program:
    """The list of moments."""
    return llama.build(config, weights, num_threads, QWEN2)
