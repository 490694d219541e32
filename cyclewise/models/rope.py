"""RoPE's tables: cosines and sines of every position that a run can hold.

RoPE: Su et al., 2021. A stretched model turns its pairs of dimensions more slowly: all alike
(linear; dynamic, by a larger base), each by a factor of the file's (Llama 3; longrope: Ding et
al., 2024), or the slow ones only (YaRN: Peng et al., 2023). Where a variant depends on the length
of what is read, the context of the run decides for all of it, so that a token's angles do not
depend on when it came.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cyclewise.errors import ModelFileError
from cyclewise.machine.packing import Weights
from cyclewise.models.config import Rope

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def rope_tables(
    rope: Rope, context_length: int, weights: Weights, *, factors: bool = True
) -> tuple[Floats, Floats]:
    """Cosines and sines, float32 (context, dim / 2); with `factors` those of the file count."""
    frequencies = _frequencies(rope, context_length)
    if factors:
        frequencies = frequencies / _file_factors(rope, context_length, weights)
    angles = np.arange(context_length)[:, None] * frequencies
    return weights.keep((np.cos(angles) * rope.attention_factor).astype(np.float32)), weights.keep(
        (np.sin(angles) * rope.attention_factor).astype(np.float32)
    )


def halves_order(rope_dim: int, head_dim: int, num_heads: int) -> NDArray[np.int32]:
    """Which row each is of a matrix whose heads have RoPE's pairs as neighbours, when the pairs are
    to be the halves of a head.
    """
    head, rotated = np.arange(head_dim), np.arange(rope_dim)
    head[:rope_dim] = np.concatenate([rotated[::2], rotated[1::2]])
    starts = np.arange(num_heads)[:, None] * head_dim
    return (starts + head).reshape(-1).astype(np.int32)


def mean_rotated(vectors: Floats, tables: tuple[Floats | None, Floats | None]) -> Floats:
    """The mean of float32 (heads, head_dim), rotated to each position of the tables: pairs of
    dimensions that turn slowly stay nearly as they are, those that turn fast vanish.
    """
    cosines, sines = tables
    if cosines is None or sines is None:
        return vectors
    cosine, sine = cosines.mean(axis=0), sines.mean(axis=0)
    half, found = cosine.size, vectors.copy()
    low, high = vectors[:, :half], vectors[:, half : 2 * half]
    found[:, :half] = low * cosine - high * sine
    found[:, half : 2 * half] = high * cosine + low * sine
    return found


def _frequencies(rope: Rope, context_length: int) -> Doubles:
    """Radians a position, (dim / 2)."""
    base = rope.base
    if rope.scaling == "dynamic" and context_length > rope.original_context:
        stretch = rope.factor * context_length / rope.original_context - (rope.factor - 1)
        base *= stretch ** (rope.dim / (rope.dim - 2))
    pairs = np.arange(rope.dim // 2)
    frequencies: Doubles = base ** (-2.0 * pairs / rope.dim)
    match rope.scaling:
        case "linear":
            return frequencies / rope.factor
        case "yarn":
            first = max(math.floor(_pair_of(rope, rope.beta_fast)), 0)
            last = min(math.ceil(_pair_of(rope, rope.beta_slow)), rope.dim - 1)
            stretched = np.clip((pairs - first) / max(last - first, 0.001), 0, 1)
            return frequencies * (1 - stretched + stretched / rope.factor)
        case _:
            return frequencies


def _pair_of(rope: Rope, rotations: float) -> float:
    """The pair that turns so often within the original context."""
    length = rope.original_context / (rotations * 2 * math.pi)
    return rope.dim * math.log(length) / (2 * math.log(rope.base))


def _file_factors(rope: Rope, context_length: int, weights: Weights) -> Doubles:
    """What the file divides each frequency by, (dim / 2)."""
    name = "rope_freqs.weight"
    if rope.scaling == "longrope":
        long = context_length > rope.original_context
        name = f"rope_factors_{'long' if long else 'short'}.weight"
    elif name not in weights:
        return np.ones(rope.dim // 2)
    factors = weights.vector(name, rope.dim // 2)[: rope.dim // 2].astype(np.float64)
    if not ((factors > 1e-30) & (factors < 1e12)).all():
        raise ModelFileError(f"Tensor {name} holds a factor that no frequency is divided by.")
    return factors
