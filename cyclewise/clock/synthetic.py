"""Programs of SmolLM2's shape with weights of no meaning, in any formats.

Speed does not depend on the values of weights, so the engine's tuning and the predictor are
measured on these: nothing has to be fetched, and any format can be had.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.builder import load_kernels
from cyclewise.machine.host import available_cpus
from cyclewise.machine.packing import Weights
from cyclewise.machine.program import Program
from cyclewise.models.config import Config, Rope
from cyclewise.models.llama import build
from cyclewise.weights.formats import FORMATS
from cyclewise.weights.gguf import GGUFFile, Tensor

SHAPE = Config(
    architecture="llama", name="SmolLM2-135M", num_layers=30, hidden_size=576, num_heads=9,
    num_kv_heads=3, head_dim=64, feed_forward=1536, vocab_size=49152, context_length=1024,
    trained_context=1024, norm_epsilon=1e-5, rope=Rope(64, 1e5, neighbours=True),
    query_scale=64**-0.5,
)  # fmt: skip


def synthetic_program(
    num_threads: int, default: str, *, num_layers: int = SHAPE.num_layers,
    context: int = SHAPE.context_length, **formats: str,
) -> Program:  # fmt: skip
    """A program whose results mean nothing.

    Args:
        num_threads: threads that it is built for.
        default: the format of its matrices.
        formats: those of kinds of matrices that have another one, by their names in a file:
            `ffn_down="Q6_K"`.
    """
    shape = replace(SHAPE, num_layers=num_layers, context_length=context)
    load_kernels({default, *formats.values()})
    with Weights(_SyntheticFile(shape, default, formats), available_cpus()) as weights:
        return build(shape, weights, num_threads)


class _SyntheticFile(GGUFFile):
    """What a file of SmolLM2's shape would hold, with the same bytes everywhere: small scales."""

    def __init__(self, shape: Config, default: str, formats: dict[str, str]) -> None:
        hidden, keys = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (shape.vocab_size, hidden)}
        for layer in range(shape.num_layers):
            parts: dict[str, tuple[int, ...]] = {
                "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (keys, hidden),
                "attn_v": (keys, hidden), "attn_output": (hidden, hidden), "ffn_norm": (hidden,),
                "ffn_gate": (shape.feed_forward, hidden), "ffn_up": (shape.feed_forward, hidden),
                "ffn_down": (hidden, shape.feed_forward),
            }  # fmt: skip
            shapes |= {f"blk.{layer}.{name}": part for name, part in parts.items()}
        shapes["output_norm"] = (hidden,)
        self.tensors = {
            f"{name}.weight": _tensor(name, part, formats.get(name.split(".")[-1], default))
            for name, part in shapes.items()
        }
        self._bytes = np.full(
            max(tensor.nbytes for tensor in self.tensors.values()), 0x24, np.uint8
        )
        self._ones = np.ones(hidden, np.float32).view(np.uint8)

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def data(self, name: str) -> NDArray[np.uint8]:
        tensor = self.tensors[name]
        source = self._ones if len(tensor.shape) == 1 else self._bytes
        return source[: tensor.nbytes]

    def release(self, name: str) -> None:
        pass


def _tensor(name: str, shape: tuple[int, ...], format_name: str) -> Tensor:
    format_ = FORMATS[format_name if len(shape) == 2 else "F32"]
    return Tensor(name, format_, shape, 0, prod(shape) // format_.block_size * format_.block_bytes)
