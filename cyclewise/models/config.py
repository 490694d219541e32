"""A model's numbers, read from GGUF's metadata keys and proved before anything is built from them.

Every architecture has the same keys behind its own prefix (`gemma2.attention.sliding_window`);
llama.cpp's converter writes them, and its rules hold where a file leaves something out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cyclewise.errors import InvalidParameterError, ModelFileError, UnsupportedModelError
from cyclewise.machine.names import CacheKind
from cyclewise.weights.mapped import shown

DEFAULT_CONTEXT = 4096
"""The longest context that is taken unless asked for more."""
_LIMIT = 1 << 24

WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}
"""Of so many layers the last one sees everything, where the file does not say which do."""
LOCAL_ROPE_BASES = {"gemma3": 10000.0}
"""RoPE's base in layers with a window, where it is not that of the others."""

Scaling = Literal["none", "linear", "dynamic", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embeddings; `models/rope.py` makes tables of it."""

    dim: int
    """Dimensions of a head that are rotated."""
    base: float
    neighbours: bool = False
    """The file pairs dimensions 2i and 2i + 1, not i and i + dim / 2."""
    scaling: Scaling = "none"
    factor: float = 1.0
    original_context: int = 0
    """Tokens that the model was trained on before it was stretched."""
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """YaRN: rotations within the original context from which on a pair is left as it is, and up
    to which it is stretched in full.
    """


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
    rope: Rope
    query_scale: float
    """Queries are multiplied by it before they meet keys."""
    local_rope: Rope | None = None
    """That of layers with a window, where it is another one."""
    windows: tuple[int | None, ...] = ()
    """How many keys a token of each layer sees, its own included; None or no entry: all."""
    attention_softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap); likewise logits."""
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_feed_forward: int = 0
    expert_weights_normalized: bool = True
    """The weights of a token's experts have the sum 1."""
    kv: CacheKind = "f16"
    """What this run's KV cache holds."""
    sequences: int = 1
    """Of the whole context, for which the KV cache has pages."""

    def window(self, layer: int) -> int | None:
        """How many keys a token of that layer sees; None: all."""
        return self.windows[layer] if self.windows else None


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._prefix = f"{architecture}."

    def get(self, key: str) -> Any:
        return self._metadata.get(self._prefix + key)

    def scalar(self, key: str) -> Any:
        """Anything but an array; None where the file has none."""
        value = self.get(key)
        if isinstance(value, list | np.ndarray):
            raise self.wrong(key, value)
        return value

    def integer(self, key: str, default: int | None = None, largest: int = _LIMIT) -> int:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ModelFileError(f"The model file lacks {self._prefix}{key}.")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ModelFileError(f"The model file lacks {self._prefix}{key}.")
        if not isinstance(value, int | float) or not 1e-30 < value < 1e12:
            raise self.wrong(key, value)
        return float(value)

    def optional(self, key: str) -> float | None:
        """A number; None where the file has none, or says 0."""
        return self.number(key) if self.scalar(key) else None

    def wrong(self, key: str, value: object) -> ModelFileError:
        return ModelFileError(
            f"The model file says {self._prefix}{key} = {shown(value)}, which cannot be."
        )


def read_config(
    metadata: dict[str, Any], architecture: str, vocab_size: int, context: int | None,
    kv: CacheKind = "f16",
) -> Config:  # fmt: skip
    """The configuration of an architecture from its keys.

    Raises ModelFileError, UnsupportedModelError, or InvalidParameterError for the context.
    """
    read = _Metadata(metadata, architecture)
    hidden = read.integer("embedding_length")
    heads = read.integer("attention.head_count")
    kv_heads = read.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelFileError(f"{heads} query heads cannot share {kv_heads} key-value heads.")
    head_dim = read.integer("attention.key_length", max(1, hidden // heads))
    if read.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("Keys and values of different sizes are not supported.")
    trained = read.integer("context_length", largest=1 << 31)
    layers = read.integer("block_count", largest=4096)
    windows = _windows(read, architecture, layers)
    rope = _rope(read, metadata, architecture, head_dim, trained)
    if rope.scaling == "dynamic":
        trained = int(trained * rope.factor)
    local_base = read.optional("rope.freq_base_swa") or LOCAL_ROPE_BASES.get(architecture)
    feed_forward = read.integer("feed_forward_length")
    has_experts = read.scalar("expert_count") or architecture == "qwen3moe"
    experts = read.integer("expert_count") if has_experts else 0
    return Config(
        architecture=architecture,
        name=_name(metadata.get("general.name", architecture)),
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=feed_forward,
        vocab_size=vocab_size,
        context_length=_context(context, trained, rope),
        trained_context=trained,
        norm_epsilon=read.number(
            "attention.layer_norm_epsilon"
            if architecture == "gpt2"
            else "attention.layer_norm_rms_epsilon"
        ),
        rope=rope,
        query_scale=read.optional("attention.scale")
        or _query_scale(architecture, layers, hidden, heads, head_dim),
        local_rope=Rope(rope.dim, local_base, rope.neighbours) if local_base else None,
        windows=windows,
        attention_softcap=read.optional("attn_logit_softcapping"),
        logit_softcap=read.optional("final_logit_softcapping"),
        num_experts=experts,
        experts_per_token=read.integer("expert_used_count", largest=experts) if experts else 0,
        expert_feed_forward=read.integer("expert_feed_forward_length", feed_forward)
        if experts
        else 0,
        expert_weights_normalized=bool(read.scalar("expert_weights_norm") in (None, True)),
        kv=kv,
    )


def _name(value: object) -> str:
    """For people: nothing in it moves a terminal's cursor or renames its window."""
    return "".join(c for c in str(value)[:200] if c.isprintable())


def _context(asked: int | None, trained: int, rope: Rope) -> int:
    if asked is None:
        # Where a longer context changes every angle, it must be asked for.
        whole = rope.original_context if rope.scaling in ("dynamic", "longrope") else trained
        return min(trained, whole, DEFAULT_CONTEXT)
    if not 1 <= asked <= trained:
        raise InvalidParameterError(
            f"A context of {asked} tokens was asked for; this model can take 1 to {trained}."
        )
    return asked


def _query_scale(
    architecture: str, num_layers: int, hidden: int, heads: int, head_dim: int
) -> float:
    """The largest Gemmas, which GGUF knows by their layers, scale by a size of their own."""
    if (architecture, num_layers) in (("gemma2", 46), ("gemma3", 62)):
        return float((hidden // heads) ** -0.5)
    return float(head_dim**-0.5)


def _windows(read: _Metadata, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if not read.scalar("attention.sliding_window"):
        return ()
    window = read.integer("attention.sliding_window", largest=1 << 31)
    pattern: Any = read.get("attention.sliding_window_pattern")
    if pattern is None:
        pattern = WINDOW_PERIODS.get(architecture, 0)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and 0 <= pattern <= _LIMIT:
        local = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(num_layers)]
    elif isinstance(pattern, list | np.ndarray) and len(pattern) == num_layers:
        local = [bool(each) for each in pattern]
    else:
        raise read.wrong("attention.sliding_window_pattern", pattern)
    return tuple(window if each else None for each in local)


def _rope(
    read: _Metadata, metadata: dict[str, Any], architecture: str, head_dim: int, trained: int
) -> Rope:
    dim = read.integer("rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2:
        raise ModelFileError(f"RoPE over {dim} dimensions of heads of {head_dim} cannot be.")
    kind: Any = read.scalar("rope.scaling.type") or "none"
    if architecture == "phi3" and kind == "none" and read.scalar("rope.scaling.attn_factor"):
        kind = "longrope"  # llama.cpp's converter does not name it
    if kind not in get_args(Scaling):
        raise UnsupportedModelError(
            f"RoPE scaling of type {shown(kind)} is not supported; "
            f"{', '.join(get_args(Scaling))} and Llama 3's factors are."
        )
    factor = 1.0
    if kind != "none":
        factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    base = read.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise read.wrong("rope.freq_base", base)
    if kind == "dynamic" and dim == 2:
        raise UnsupportedModelError("Dynamic RoPE scaling of one pair of dimensions cannot be.")
    original = read.integer("rope.scaling.original_context_length", trained, largest=1 << 31)
    attention_factor = read.optional("rope.scaling.attn_factor") or 1.0
    if kind == "yarn":
        attention_factor *= 0.1 * math.log(factor) + 1.0
    return Rope(
        dim=dim,
        base=base,
        neighbours=architecture == "llama" and not metadata.get("cyclewise.rope_halves"),
        scaling=kind,
        factor=factor,
        original_context=original,
        attention_factor=attention_factor,
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
    )
