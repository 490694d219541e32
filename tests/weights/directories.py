"""Hugging Face directories, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.weights.build import safetensors

Arrays = dict[str, NDArray[Any]]

BASE = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small configuration; a change to ... leaves the key out."""
    values = {"model_type": model_type, **BASE, **changes}
    return {key: value for key, value in values.items() if value is not ...}


def weights(model_type: str = "llama", layers: int = 2) -> Arrays:
    """Random tensors under a type's own names, of `BASE`'s shapes."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        return rng.standard_normal((rows, columns)).astype(np.float32)

    def vector(length: int) -> NDArray[Any]:
        return rng.standard_normal(length).astype(np.float32)

    found: Arrays = {
        "model.embed_tokens.weight": matrix(20, 8),
        "model.norm.weight": vector(8),
        "lm_head.weight": matrix(20, 8),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }  # fmt: skip
        norms = ["input_layernorm", "post_attention_layernorm"]
        if model_type.startswith("gemma"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if model_type in ("gemma3_text", "qwen3"):
            norms += ["self_attn.q_norm", "self_attn.k_norm"]
        for part, shape in shapes.items():
            found[f"{name}{part}.weight"] = matrix(*shape)
        for part in norms:
            found[f"{name}{part}.weight"] = vector(4 if part.startswith("self_attn") else 8)
    return found


def write(
    path: Path, config: dict[str, Any], tensors: Arrays, *, shards: int = 1, **files: Any
) -> Path:
    """Writes a directory; `files` are JSON files by their names without the ending."""
    path.mkdir(exist_ok=True)
    files["config"] = config
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors(tensors, {"format": "pt"}))
    else:
        weight_map = {}
        names = list(tensors)
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            (path / file).write_bytes(safetensors(part))
            weight_map |= dict.fromkeys(part, file)
        files["model.safetensors.index"] = {"metadata": {}, "weight_map": weight_map}
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return path
