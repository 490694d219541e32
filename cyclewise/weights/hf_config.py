"""A Hugging Face `config.json` in GGUF's words.

In: the parsed file, which may hold anything. Out: metadata with GGUF's keys, as llama.cpp's
converter would have written them, and RoPE's factors, which GGUF keeps as tensors. Called by
`directory.py`. Both spellings of RoPE's settings are read: `rope_theta` beside `rope_scaling`, and
the later `rope_parameters`, at times one for each kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError, UnsupportedModelError
from cyclewise.weights.mapped import shown

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""`model_type` to GGUF's architecture."""

# What configurations of a type leave out, as transformers fills it in.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
    },
    "gemma2": {
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    },
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_local_base_freq": 1e4,
    },
    "gpt2": {"layer_norm_epsilon": 1e-5},
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8},
    "phi3": {"rms_norm_eps": 1e-5},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "num_experts_per_tok": 8},
}  # fmt: skip

_LARGEST = 1 << 31
# What lists are made of before a tensor has proved the number.
_MAX_LAYERS = 4096
_MAX_HEAD_DIM = 1 << 16
_LOCAL = "sliding_attention"


@dataclass(frozen=True, slots=True)
class HFConfig:
    """What a configuration says."""

    model_type: str  # a key of ARCHITECTURES
    metadata: dict[str, Any]  # with GGUF's keys
    factors: dict[str, npt.NDArray[np.float32]]  # tensors: what divides RoPE's frequencies
    values: Mapping[str, Any]  # the language model's part of the file

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.model_type]


class _Fields:
    """Typed access to a JSON object."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, largest: int = _LARGEST) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= largest:
            raise self.wrong(key, "a whole number above 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or value is None or not 1e-30 < value < 1e12:
            raise self.wrong(key, "a number above 0", value)
        return float(value)

    def factors(self, key: str, count: int) -> npt.NDArray[np.float32]:
        value = self._values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(type(each) in (int, float) and 1e-30 < each < 1e12 for each in value)
        ):
            raise self.wrong(key, f"{count} numbers above 0", value)
        return np.array(value, np.float32)

    def inner(self, key: str) -> _Fields:
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return _Fields(value, f"{self._where}: {key}")

    def wrong(self, key: str, wanted: str, value: object) -> ModelFileError:
        if value is None:
            return ModelFileError(f"{self._where}: {key} is missing, where {wanted} is needed")
        return ModelFileError(f"{self._where}: {key} should be {wanted}, not {shown(value)}")

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._where}: {what}")


def read_hf_config(values: Mapping[str, Any], where: str) -> HFConfig:
    """A `config.json`, checked and translated; `where` names the file in errors.

    Raises ModelFileError where it is damaged and UnsupportedModelError for another kind of model.
    """
    model_type = values.get("model_type")
    inner = values.get("text_config")
    if model_type == "gemma3" and isinstance(inner, dict):  # its vision half is left out
        values, model_type = {"tie_word_embeddings": True, **inner}, "gemma3_text"
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: models of type {shown(model_type)} are not supported; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    values = {**_DEFAULTS.get(model_type, {}), **values}
    fields = _Fields(values, where)
    metadata: dict[str, Any] = {
        "general.architecture": ARCHITECTURES[model_type],
        "cyclewise.rope_halves": True,
    }
    prefix = ARCHITECTURES[model_type] + "."
    factors: dict[str, npt.NDArray[np.float32]] = {}
    if model_type == "gpt2":
        translated = _gpt2(fields)
    else:
        translated = _decoder(fields, model_type)
        rope, factors = _rope(fields, model_type, translated["attention.key_length"])
        translated |= rope | _windows(fields, model_type, translated["block_count"])
        translated |= _experts(fields, model_type)
    metadata |= {prefix + key: value for key, value in translated.items() if value is not None}
    return HFConfig(model_type, metadata, factors, values)


def _gpt2(fields: _Fields) -> dict[str, Any]:
    _check_activation(fields, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    for key, default in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if (default if fields.get(key) is None else fields.get(key)) is not default:
            raise fields.unsupported(f"{key} other than {default} is not supported")
    hidden = fields.integer("n_embd")
    return {
        "context_length": fields.integer("n_positions", fields.get("n_ctx")),
        "embedding_length": hidden,
        "block_count": fields.integer("n_layer"),
        "feed_forward_length": fields.integer("n_inner", 4 * hidden),
        "attention.head_count": fields.integer("n_head"),
        "attention.layer_norm_epsilon": fields.number("layer_norm_epsilon"),
    }


def _decoder(fields: _Fields, model_type: str) -> dict[str, Any]:
    is_gemma = model_type.startswith("gemma")
    if is_gemma:
        # Gemma's files say "gelu" in hidden_act, and its code has always taken the approximation.
        _check_activation(fields, "hidden_activation", ("gelu_pytorch_tanh",))
    else:
        _check_activation(fields, "hidden_act", ("silu", "swish"))
    if fields.get("use_bidirectional_attention"):
        raise fields.unsupported("attention in both directions is not supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(hidden // heads, 1), largest=_MAX_HEAD_DIM)
    return {
        "context_length": fields.integer("max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": fields.integer("num_hidden_layers", largest=_MAX_LAYERS),
        "feed_forward_length": fields.integer("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": fields.integer("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": fields.number("rms_norm_eps"),
        "attention.scale": fields.number("query_pre_attn_scalar") ** -0.5 if is_gemma else None,
        "attn_logit_softcapping": _optional(fields, "attn_logit_softcapping", is_gemma),
        "final_logit_softcapping": _optional(fields, "final_logit_softcapping", is_gemma),
    }


def _optional(fields: _Fields, key: str, read: bool) -> float | None:
    return fields.number(key) if read and fields.get(key) is not None else None


def _check_activation(fields: _Fields, key: str, known: tuple[str, ...]) -> None:
    activation = fields.get(key) or known[0]
    if activation not in known:
        raise fields.unsupported(
            f"the activation {shown(activation)} is not supported here, only {known[0]}"
        )


def _experts(fields: _Fields, model_type: str) -> dict[str, Any]:
    if model_type not in ("mixtral", "qwen3_moe"):
        return {}
    experts = fields.get("num_local_experts") or fields.get("num_experts")
    if experts is None:
        raise fields.wrong("num_experts", "a whole number above 0", None)
    chosen = {
        "expert_count": _Fields({"num_experts": experts}, "config.json").integer("num_experts"),
        "expert_used_count": fields.integer("num_experts_per_tok"),
    }
    if model_type == "qwen3_moe":
        if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step") not in (None, 1):
            raise fields.unsupported(
                "layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"
            )
        chosen["expert_feed_forward_length"] = fields.integer("moe_intermediate_size")
        chosen["expert_weights_norm"] = bool(fields.get("norm_topk_prob"))
    return chosen


def _windows(fields: _Fields, model_type: str, num_layers: int) -> dict[str, Any]:
    """The size of a sliding window, and which layers have one."""
    if not fields.get("sliding_window") or model_type == "llama":
        return {}
    window = fields.integer("sliding_window")
    types = fields.get("layer_types")
    if model_type in ("qwen2", "qwen3", "qwen3_moe") and not fields.get("use_sliding_window"):
        return {}
    if isinstance(types, list) and len(types) == num_layers and model_type != "qwen3_moe":
        local = [kind == _LOCAL for kind in types]
    elif model_type.startswith("gemma"):
        period = 2
        if model_type == "gemma3_text":
            key = "_sliding_window_pattern"
            period = fields.integer(key, fields.integer("sliding_window_pattern", 6))
        local = [(layer + 1) % period != 0 for layer in range(num_layers)]
    elif model_type in ("qwen2", "qwen3"):
        first = fields.get("max_window_layers")
        first = 28 if first is None else first
        if type(first) is not int:
            raise fields.wrong("max_window_layers", "a whole number", first)
        local = [layer >= first for layer in range(num_layers)]
    else:
        local = [True] * num_layers
    if not any(local):
        return {}
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": local}


def _rope(
    fields: _Fields, model_type: str, head_dim: int
) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """RoPE's keys, and its factors as tensors."""
    keys: dict[str, Any] = {}
    parameters = fields.get("rope_parameters")
    if isinstance(parameters, dict) and "full_attention" in parameters:  # one a kind of layer
        rope = fields.inner("rope_parameters").inner("full_attention")
        if _LOCAL in parameters:
            local = fields.inner("rope_parameters").inner(_LOCAL)
            if (_rope_type(local) or "default") != "default":
                raise fields.unsupported("RoPE scaling of layers with a window is not supported")
            keys["rope.freq_base_swa"] = local.number("rope_theta", 1e4)
    elif isinstance(parameters, dict):
        rope = fields.inner("rope_parameters")
    else:
        rope = _Fields({}, "config.json")
        if fields.get("rope_scaling") is not None:
            rope = fields.inner("rope_scaling")
    if model_type == "gemma3_text":
        keys.setdefault("rope.freq_base_swa", fields.number("rope_local_base_freq"))
    base = rope.number("rope_theta", fields.number("rope_theta", 1e4))
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * partial)
    if partial > 1 or dim < 2:
        raise fields.wrong("partial_rotary_factor", "a share of a head", partial)
    keys |= {"rope.freq_base": base, "rope.dimension_count": dim}
    trained = fields.integer("max_position_embeddings")
    match _rope_type(rope):
        case None | "default":
            return keys, {}
        case "linear":
            return keys | _scaling("linear", factor=rope.number("factor")), {}
        case "dynamic":
            found = _scaling("dynamic", factor=rope.number("factor"), original=trained)
            return keys | found, {}
        case "llama3":
            return keys, {"rope_freqs.weight": _llama3_factors(rope, base, dim)}
        case "yarn":
            return keys | _yarn(rope, trained), {}
        case "longrope" | "su":
            original = rope.integer(
                "original_max_position_embeddings",
                fields.integer("original_max_position_embeddings", trained),
            )
            found = _scaling("longrope", original=original)
            found["rope.scaling.attn_factor"] = _longrope_attention(rope, trained, original)
            return keys | found, {
                f"rope_factors_{length}.weight": rope.factors(f"{length}_factor", dim // 2)
                for length in ("long", "short")
            }
        case other:
            raise fields.unsupported(
                f"RoPE of type {shown(other)} is not supported; default, linear, dynamic, llama3, "
                "yarn and longrope are"
            )


def _rope_type(rope: _Fields) -> Any:
    return rope.get("rope_type") or rope.get("type")


def _scaling(
    kind: str, *, factor: float | None = None, original: int | None = None
) -> dict[str, Any]:
    keys = {"type": kind, "factor": factor, "original_context_length": original}
    return {f"rope.scaling.{key}": value for key, value in keys.items() if value is not None}


def _llama3_factors(rope: _Fields, base: float, dim: int) -> npt.NDArray[np.float32]:
    """What Llama 3 divides each frequency by: long waves by `factor`, short ones by 1."""
    factor, original = rope.number("factor"), rope.integer("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.wrong("high_freq_factor", "above low_freq_factor", high)
    waves = 2 * np.pi * base ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _yarn(rope: _Fields, trained: int) -> dict[str, Any]:
    original = rope.integer("original_max_position_embeddings", trained)
    factor = rope.number("factor", max(trained / original, 1.0))
    keys = _scaling("yarn", factor=factor, original=original)
    keys["rope.scaling.yarn_beta_fast"] = rope.number("beta_fast", 32.0)
    keys["rope.scaling.yarn_beta_slow"] = rope.number("beta_slow", 1.0)
    if rope.get("truncate") is False:
        raise rope.unsupported("truncate: false is not supported")
    own = 0.1 * math.log(max(factor, 1.0)) + 1.0  # what readers of GGUF multiply with by themselves
    if rope.get("attention_factor") is not None:
        keys["rope.scaling.attn_factor"] = rope.number("attention_factor") / own
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        above, below = (
            0.1 * rope.number(key) * math.log(max(factor, 1.0)) + 1.0
            for key in ("mscale", "mscale_all_dim")
        )
        keys["rope.scaling.attn_factor"] = above / below / own
    return keys


def _longrope_attention(rope: _Fields, trained: int, original: int) -> float:
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    factor = rope.number("factor", trained / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
