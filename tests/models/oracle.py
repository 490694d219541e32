"""Small random models whose logits transformers has computed, in every architecture and variant.

A case is a configuration in transformers' words. Its weights come from a generator of numpy, by
transformers' names, so that everybody can make them again; `make_oracle.py` runs transformers on
them and keeps logits in `oracle.npz`. The tests write the same weights as a GGUF file, following
llama.cpp's converter in names, keys and conventions, or as a directory as the Hugging Face Hub has
them.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FIXTURE = Path(__file__).with_name("oracle.npz")
VOCAB = 50
LENGTHS = (80, 41, 7)
"""Tokens of the sequences that are run; a page of the cache has 32."""
KEPT = (0, 31, 32, 47, 64)
"""Positions whose logits are kept, with the last one."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model: its configuration, and what a GGUF file says of it beyond what all files say."""

    model_type: str
    """transformers' name."""
    architecture: str
    """GGUF's."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of `config.json`, beyond SHAPE."""
    keys: dict[str, Any] = field(default_factory=dict)
    """GGUF's, without the architecture's prefix."""
    lengths: tuple[int, ...] = LENGTHS
    context: int | None = None
    """What the model is loaded for."""

    @property
    def full(self) -> dict[str, Any]:
        """The whole `config.json`."""
        return {"model_type": self.model_type, **SHAPE, **self.config}


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 9.0, 12.0, 20.0],
}  # fmt: skip
_LONG_KEYS = {
    "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64,
    "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(64)),
}  # fmt: skip
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 10, "sliding_window": 24,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_KEYS = {"attention.sliding_window": 24, "attention.scale": 10**-0.5}

CASES: dict[str, Case] = {
    "llama": Case("llama", "llama"),
    "llama_tied": Case(
        "llama", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}
    ),
    "llama_biases": Case("llama", "llama", {"attention_bias": True}),
    "llama_linear": Case(
        "llama", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama_dynamic": Case(
        "llama", "llama",
        {
            "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
            "max_position_embeddings": 48,
        },
        {"rope.scaling.type": "dynamic", "rope.scaling.factor": 3.0},
        lengths=(80,), context=80,
    ),
    "llama_dynamic_short": Case(
        "llama", "llama",
        {
            "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
        },
        {"rope.scaling.type": "dynamic", "rope.scaling.factor": 3.0},
    ),
    "llama3": Case(
        "llama", "llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
        {},
    ),
    "llama_yarn": Case(
        "llama", "llama", {"rope_scaling": {"rope_type": "yarn", **_YARN}}, _YARN_KEYS
    ),
    "llama_yarn_factors": Case(
        "llama", "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn", "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0,
                **_YARN,
            }
        },
        {
            **_YARN_KEYS, "rope.scaling.attn_factor": 1.3 / (0.1 * math.log(4) + 1),
            "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "llama_longrope_short": Case(
        "llama", "llama", {"rope_scaling": _LONG}, _LONG_KEYS, lengths=(60, 41, 7)
    ),
    "llama_longrope_long": Case(
        "llama", "llama", {"rope_scaling": _LONG}, _LONG_KEYS, lengths=(80,), context=80
    ),
    "mistral": Case(
        "mistral", "llama", {"sliding_window": 24}, {"attention.sliding_window": 24}
    ),
    "mistral_wide": Case("mistral", "llama", {"sliding_window": None, "head_dim": 32}),
    "qwen2": Case("qwen2", "qwen2", {"rope_theta": 1e6}),
    "qwen2_yarn": Case(
        "qwen2", "qwen2", {"rope_scaling": {"rope_type": "yarn", **_YARN}}, _YARN_KEYS
    ),
    "qwen3": Case("qwen3", "qwen3", {"rope_theta": 1e6, "head_dim": 32}),
    "gemma2": Case(
        "gemma2", "gemma2",
        {
            **_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
            "num_hidden_layers": 4,
        },
        {**_GEMMA_KEYS, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": Case(
        "gemma3_text", "gemma3",
        {**_GEMMA, "num_hidden_layers": 7, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        _GEMMA_KEYS,
    ),
    "gemma3_linear": Case(
        "gemma3_text", "gemma3",
        {
            **_GEMMA, "num_hidden_layers": 7, "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            **_GEMMA_KEYS, "rope.freq_base_swa": 5000.0, "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": Case(
        "phi3", "phi3", {"sliding_window": 24}, {"attention.sliding_window": 24}
    ),
    "phi3_longrope": Case(
        "phi3", "phi3",
        {
            "rope_scaling": {**_LONG, "short_factor": _LONG["short_factor"][:6],
                             "long_factor": _LONG["long_factor"][:6]},
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
            "sliding_window": None, "tie_word_embeddings": True,
        },
        {**_LONG_KEYS, "rope.dimension_count": 12},
        lengths=(80,), context=80,
    ),
    "gpt2": Case(
        "gpt2", "gpt2",
        {
            "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "num_key_value_heads": 4,
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "intermediate_size": 256,
        },
    ),
    "mixtral": Case(
        "mixtral", "llama",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen3_moe": Case(
        "qwen3_moe", "qwen3moe",
        {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "norm_topk_prob": True, "head_dim": 32,
        },
        {
            "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 64,
        },
    ),
}  # fmt: skip


def token_ids(case: Case) -> list[list[int]]:
    """The sequences that are run."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB, length).tolist() for length in case.lengths]


def kept_rows(length: int) -> list[int]:
    """Positions of a sequence whose logits are kept."""
    return [*(row for row in KEPT if row < length - 1), length - 1]


def stored_logits(name: str) -> list[Floats]:
    """Of each sequence, float32 (kept rows, vocabulary)."""
    with np.load(FIXTURE) as fixture:
        whole: Floats = fixture[name]
    ends = np.cumsum([len(kept_rows(length)) for length in CASES[name].lengths])
    return np.split(whole, ends[:-1])


# Weights, by transformers' names


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the model."""
    config = case.full
    if case.model_type == "gpt2":
        return _gpt2_shapes(config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        parts: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            **_feed_forward(case, hidden, inner),
        }  # fmt: skip
        if case.model_type == "phi3":
            for part in ("q", "k", "v"):
                del parts[f"self_attn.{part}_proj"]
            parts["self_attn.qkv_proj"] = (queries + 2 * keys, hidden)
        if case.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
            norms = ("self_attn.q_norm", "self_attn.k_norm")
            parts |= dict.fromkeys(norms, (config["head_dim"],))
        if case.model_type.startswith("gemma"):
            norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
            parts |= dict.fromkeys(norms, (hidden,))
        for part, shape in parts.items():
            found[f"{name}{part}.weight"] = shape
            if part in _biased(case):
                found[f"{name}{part}.bias"] = shape[:1]
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCAB, hidden)
    return found


def _feed_forward(case: Case, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    config = case.full
    if case.model_type == "phi3":
        return {"mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner)}
    if case.model_type in ("mixtral", "qwen3_moe"):
        mixtral = case.model_type == "mixtral"
        block = "block_sparse_moe" if mixtral else "mlp"
        gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
        inner = inner if mixtral else config["moe_intermediate_size"]
        experts = config["num_local_experts" if mixtral else "num_experts"]
        found: dict[str, tuple[int, ...]] = {f"{block}.gate": (experts, hidden)}
        for expert in range(experts):
            name = f"{block}.experts.{expert}."
            found |= {name + gate: (inner, hidden), name + up: (inner, hidden)}
            found[name + down] = (hidden, inner)
        return found
    return {
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def _gpt2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """GPT-2 keeps matrices the other way round."""
    hidden, inner = config["n_embd"], 4 * config["n_embd"]
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for layer in range(config["n_layer"]):
        for part, shape in (
            ("ln_1", (hidden,)), ("attn.c_attn", (hidden, 3 * hidden)),
            ("attn.c_proj", (hidden, hidden)), ("ln_2", (hidden,)), ("mlp.c_fc", (hidden, inner)),
            ("mlp.c_proj", (inner, hidden)),
        ):  # fmt: skip
            found[f"transformer.h.{layer}.{part}.weight"] = shape
            found[f"transformer.h.{layer}.{part}.bias"] = shape[-1:]
    return found | {
        "transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)
    }  # fmt: skip


def _biased(case: Case) -> tuple[str, ...]:
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    if case.model_type == "qwen2":
        return projections[:3]
    return projections if case.full.get("attention_bias") else ()


def weights(name: str) -> dict[str, Floats]:
    """Random weights: matrices of about unit gain, and branches that add BRANCH of the residual
    stream's size. Keys and values are float16, which is what sets a random model's logits off from
    transformers' by more than 1e-5.
    """
    case = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    gemma = case.model_type.startswith("gemma")
    # What is tied gives logits too, and Gemma multiplies it by 8 to make the residual stream.
    size = case.full["hidden_size"] ** -0.5 if case.full["tie_word_embeddings"] else 1.0
    branch = BRANCH if gemma else BRANCH * size
    found = {}
    for tensor, shape in shapes(case).items():
        values = rng.standard_normal(shape)
        kind = tensor.split(".")[-2]
        if "embed" in kind or kind in ("wte", "wpe"):
            values *= size
        elif len(shape) > 1:
            inputs = shape[0] if case.model_type == "gpt2" else shape[-1]
            values *= inputs**-0.5 * (branch if kind in ADDED and not gemma else 1.0)
        elif tensor.endswith("bias"):
            values *= 0.5 * (branch if kind in ADDED else 1.0)
        elif gemma:  # 1 is added to these
            values = values * 0.2 if kind not in ADDED else values * 0.1 + branch - 1
        else:
            values = values * 0.2 + 1
        found[tensor] = values.astype(np.float32)
    return found


BRANCH = 0.3
ADDED = (
    *("o_proj", "down_proj", "w2", "c_proj"),
    *("post_attention_layernorm", "post_feedforward_layernorm"),
)
"""What writes to the residual stream; the norms do so in Gemma alone."""


# As a directory of the Hub


def write_directory(path: Path, name: str) -> Path:
    """`config.json` and `model.safetensors`, float32."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CASES[name].full))
    header, data = {}, b""
    for tensor, values in weights(name).items():
        raw = values.tobytes()
        ends = [len(data), len(data) + len(raw)]
        header[tensor] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": ends}
        data += raw
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    (path / "model.safetensors").write_bytes(whole)
    return path


# As a GGUF file


def write_gguf(path: Path, name: str, format_name: str = "F32", *, plain: bool = False) -> Path:
    """The file that llama.cpp's converter would write, matrices in `format_name`; `plain`: without
    the case's own keys and factors.
    """
    import gguf

    case = CASES[name]
    if plain:
        case = replace(case, keys={}, config={**case.config, "rope_scaling": None})
    writer = gguf.GGUFWriter(path, case.architecture)
    for key, value in gguf_keys(case).items():
        whole = f"{case.architecture}.{key}"
        match value:
            case str():
                writer.add_string(whole, value)
            case int():
                writer.add_uint32(whole, value)
            case float():
                writer.add_float32(whole, value)
            case _:
                writer.add_array(whole, value)
    kind = gguf.GGMLQuantizationType[format_name]
    for tensor, values in (gguf_tensors(name) | _rope_factors(case)).items():
        if values.ndim == 1 or format_name == "F32":
            writer.add_tensor(tensor, values)
        else:
            writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_keys(case: Case) -> dict[str, Any]:
    """GGUF's metadata, without the architecture's prefix."""
    config = case.full
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        f"attention.layer_norm_{'' if case.model_type == 'gpt2' else 'rms_'}epsilon": 1e-5,
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        **case.keys,
    }


def gguf_tensors(name: str) -> dict[str, Floats]:
    """The weights by GGUF's names, and as its files have them."""
    import gguf

    case = CASES[name]
    architecture = {a: number for number, a in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    names = gguf.get_tensor_name_map(architecture, case.full["num_hidden_layers"])
    found = {}
    for tensor, values in _stacked_experts(weights(name)).items():
        to = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        assert to is not None, tensor
        found[to] = _converted(case, tensor, values)
    return found


def _stacked_experts(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """GGUF has one tensor for the same matrix of all experts of a layer."""
    found: dict[str, Floats] = {}
    stacks: dict[str, list[Floats]] = {}
    for tensor, values in tensors.items():
        before, experts, rest = tensor.partition(".experts.")
        if experts:
            stacks.setdefault(before + experts + rest.partition(".")[2], []).append(values)
        else:
            found[tensor] = values
    return found | {tensor: np.stack(values) for tensor, values in stacks.items()}


def _converted(case: Case, tensor: str, values: Floats) -> Floats:
    config = case.full
    if case.architecture == "llama" and (".q_proj" in tensor or ".k_proj" in tensor):
        query = ".q_proj" in tensor
        heads = config["num_attention_heads" if query else "num_key_value_heads"]
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    if case.model_type.startswith("gemma") and "norm" in tensor:
        return values + np.float32(1)
    if case.model_type == "gpt2" and ".h." in tensor and values.ndim == 2:
        return np.ascontiguousarray(values.T)
    return values


def _rope_factors(case: Case) -> dict[str, Floats]:
    scaling = case.full.get("rope_scaling") or {}
    match scaling.get("rope_type"):
        case "longrope":
            return {
                f"rope_factors_{which}.weight": np.array(scaling[f"{which}_factor"], np.float32)
                for which in ("long", "short")
            }
        case "llama3":
            return {"rope_freqs.weight": _llama3_factors(case.full, scaling)}
    return {}


def _llama3_factors(config: dict[str, Any], scaling: dict[str, Any]) -> Floats:
    dim, original = config["head_dim"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for frequency in config["rope_theta"] ** (-np.arange(0, dim, 2) / dim):
        turns = original * frequency / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
