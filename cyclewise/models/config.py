"""A model's numbers, read from a GGUF file's metadata and proved before anything is built from
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cyclewise.errors import ModelFileError, UnsupportedModelError

DEFAULT_CONTEXT = 4096
"""The longest context that is taken unless asked for more."""
_LIMIT = 1 << 24


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of a decoder-only transformer."""

    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    context_length: int
    """Tokens that this run can hold: what was asked for, or the model's own, at most
    DEFAULT_CONTEXT.
    """
    trained_context: int
    norm_epsilon: float
    rope_dim: int
    rope_base: float
    rope_scaling: float
    """Linear scaling: positions are divided by it."""


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._prefix = f"{architecture}."

    def integer(self, key: str, default: int | None = None, largest: int = _LIMIT) -> int:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ModelFileError(f"The model file lacks {self._prefix}{key}.")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
            raise ModelFileError(
                f"The model file says {self._prefix}{key} = {value!r}, which cannot be."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ModelFileError(f"The model file lacks {self._prefix}{key}.")
        if not isinstance(value, int | float) or not 0 < value < 1e12:
            raise ModelFileError(
                f"The model file says {self._prefix}{key} = {value!r}, which cannot be."
            )
        return float(value)


def read_config(
    metadata: dict[str, Any], architecture: str, vocab_size: int, context: int | None
) -> Config:
    """The configuration of a Llama-like architecture, whose keys they all share."""
    read = _Metadata(metadata, architecture)
    hidden = read.integer("embedding_length")
    heads = read.integer("attention.head_count")
    kv_heads = read.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelFileError(f"{heads} query heads cannot share {kv_heads} key-value heads.")
    head_dim = read.integer("attention.key_length", hidden // heads)
    if read.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("Keys and values of different sizes are not supported.")
    rope_dim = read.integer("rope.dimension_count", head_dim)
    if rope_dim > head_dim or rope_dim % 2:
        raise ModelFileError(f"RoPE over {rope_dim} dimensions of heads of {head_dim} cannot be.")
    trained = read.integer("context_length", largest=1 << 31)
    return Config(
        architecture=architecture,
        name=str(metadata.get("general.name", architecture)),
        num_layers=read.integer("block_count", largest=4096),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=read.integer("feed_forward_length"),
        vocab_size=vocab_size,
        context_length=_context(context, trained),
        trained_context=trained,
        norm_epsilon=read.number("attention.layer_norm_rms_epsilon"),
        rope_dim=rope_dim,
        rope_base=read.number("rope.freq_base", 10000.0),
        rope_scaling=_scaling(metadata, architecture, read),
    )


def _context(asked: int | None, trained: int) -> int:
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= asked <= trained:
        from cyclewise.errors import InvalidParameterError

        raise InvalidParameterError(
            f"A context of {asked} tokens was asked for; this model can take 1 to {trained}."
        )
    return asked


def _scaling(metadata: dict[str, Any], architecture: str, read: _Metadata) -> float:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return 1.0
    if kind == "linear":
        return read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    raise UnsupportedModelError(
        f"RoPE scaling of type {kind!r} is not supported; none, linear and Llama 3's factors are."
    )
