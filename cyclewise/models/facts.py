"""What `cyclewise info` says of a model's configuration, for people and as plain values."""

from __future__ import annotations

from typing import Any

from cyclewise.models.config import Config, Rope


def facts(config: Config) -> dict[str, Any]:
    """Plain values for JSON."""
    windows = [window for window in config.windows if window is not None]
    return {
        "name": config.name,
        "architecture": config.architecture,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context": config.context_length,
        "trained_context": config.trained_context,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "window": windows[0] if windows else None,
        "windowed_layers": len(windows),
        "rope_scaling": config.rope.scaling,
        "experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
    }


def attention(config: Config) -> str:
    """Its heads, and what they see."""
    text = f"{config.num_heads} heads of {config.head_dim}"
    if config.num_kv_heads != config.num_heads:
        text += f", {config.num_kv_heads} of keys and values"
    windows = [window for window in config.windows if window is not None]
    if windows:
        all_of_them = len(windows) == config.num_layers
        which = "all" if all_of_them else f"{len(windows)} of {config.num_layers}"
        text += f"; {which} layers see the last {windows[0]} tokens"
    if config.attention_softcap is not None:
        text += f"; scores capped at {config.attention_softcap:g}"
    return text


def positions(config: Config) -> str:
    """How positions enter, and what was done for longer contexts."""
    if config.architecture == "gpt2":
        return f"learned, {config.trained_context} of them"
    text = f"RoPE of base {config.rope.base:,.0f}"
    if config.local_rope is not None:
        text += f", of {config.local_rope.base:,.0f} in layers with a window"
    return text + _stretch(config.rope, config.context_length)


def _stretch(rope: Rope, context_length: int) -> str:
    beyond = context_length > rope.original_context
    match rope.scaling:
        case "none":
            return ""
        case "linear":
            return f"; stretched {rope.factor:g} times, linearly"
        case "dynamic":
            return f"; stretched for contexts beyond {rope.original_context} tokens" + (
                ", as this one" if beyond else ""
            )
        case "yarn":
            return f"; stretched {rope.factor:g} times from {rope.original_context} tokens (YaRN)"
        case "longrope":
            which = "long" if beyond else "short"
            return f"; {which} factors (longrope, trained on {rope.original_context} tokens)"
