from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.errors import CyclewiseError, ModelFileError, UnsupportedModelError
from cyclewise.weights.hf_config import ARCHITECTURES, read_hf_config
from tests.weights.directories import config


def read(model_type, **changes):
    return read_hf_config(config(model_type, **changes), "config.json")


def test_a_llama():
    found = read("llama", rope_theta=5e5)
    assert found.metadata == {
        "general.architecture": "llama",
        "cyclewise.rope_halves": True,
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.block_count": 2,
        "llama.feed_forward_length": 12,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 4,
        "llama.attention.value_length": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 5e5,
        "llama.rope.dimension_count": 4,
    }
    assert not found.factors
    assert read("llama", rope_parameters={"rope_theta": 5e5}).metadata == found.metadata


def windows(found):
    prefix = f"{found.architecture}.attention.sliding_window"
    return found.metadata.get(prefix), found.metadata.get(f"{prefix}_pattern")


def test_windows():
    assert windows(read("mistral", sliding_window=7)) == (7, [True, True])
    assert windows(read("mistral", sliding_window=None)) == (None, None)
    assert windows(read("mistral")) == (4096, [True, True])
    assert windows(read("phi3", sliding_window=7)) == (7, [True, True])
    assert windows(read("qwen2", sliding_window=7)) == (None, None)
    qwen = {"sliding_window": 7, "use_sliding_window": True}
    assert windows(read("qwen2", **qwen, max_window_layers=1)) == (7, [False, True])
    assert windows(read("qwen2", **qwen)) == (None, None)
    layers = ["full_attention", "sliding_attention"]
    assert windows(read("qwen3", **qwen, layer_types=layers)) == (7, [False, True])
    assert windows(read("gemma2")) == (4096, [True, False])
    gemma = {"num_hidden_layers": 7, "sliding_window": 5}
    assert windows(read("gemma3_text", **gemma)) == (5, [True] * 5 + [False, True])
    assert windows(read("gemma3_text", **gemma, sliding_window_pattern=3)) == (
        5,
        [True, True, False] * 2 + [True],
    )


def test_gemma():
    two = read("gemma2", head_dim=4, query_pre_attn_scalar=16).metadata
    assert two["gemma2.attention.scale"] == 0.25
    assert two["gemma2.attn_logit_softcapping"] == 50
    assert two["gemma2.final_logit_softcapping"] == 30
    three = read("gemma3_text").metadata
    assert three["gemma3.rope.freq_base"] == 1e6
    assert three["gemma3.rope.freq_base_swa"] == 1e4
    assert three["gemma3.attention.key_length"] == 256
    assert "gemma3.attn_logit_softcapping" not in three
    stretched = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    three = read("gemma3_text", rope_parameters=stretched).metadata
    assert three["gemma3.rope.scaling.type"] == "linear"
    assert three["gemma3.rope.scaling.factor"] == 8
    assert three["gemma3.rope.freq_base_swa"] == 2e4


def test_experts():
    mixtral = read("mixtral").metadata
    assert (mixtral["llama.expert_count"], mixtral["llama.expert_used_count"]) == (8, 2)
    qwen = read(
        "qwen3_moe", num_experts=128, num_experts_per_tok=8, moe_intermediate_size=6,
        norm_topk_prob=True,
    ).metadata  # fmt: skip
    assert qwen["qwen3moe.expert_count"] == 128
    assert qwen["qwen3moe.expert_feed_forward_length"] == 6
    assert qwen["qwen3moe.expert_weights_norm"] is True
    with pytest.raises(ModelFileError, match="num_experts is missing"):
        read("qwen3_moe")


@pytest.mark.parametrize("model_type", ["mixtral", "phi3", "qwen3"])
def test_what_a_configuration_may_leave_out(model_type):
    found = read(model_type, rms_norm_eps=...)
    epsilon = found.metadata[f"{found.architecture}.attention.layer_norm_rms_epsilon"]
    assert epsilon == (1e-6 if model_type == "qwen3" else 1e-5)


def rope(model_type="llama", *, head_dim=8, **settings):
    found = read(model_type, head_dim=head_dim, rope_scaling=settings)
    prefix = f"{found.architecture}.rope.scaling."
    keys = {k.removeprefix(prefix): v for k, v in found.metadata.items() if k.startswith(prefix)}
    return keys, found.factors


def test_rope_scaling():
    assert rope(type="linear", factor=4.0) == ({"type": "linear", "factor": 4.0}, {})
    dynamic = {"type": "dynamic", "factor": 2.0, "original_context_length": 64}
    assert rope(rope_type="dynamic", factor=2.0) == (dynamic, {})
    yarn = {
        "type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }  # fmt: skip
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert rope(**given) == (yarn, {})
    keys, _ = rope(**given, attention_factor=2.0)
    assert math.isclose(keys["attn_factor"] * (0.1 * math.log(4) + 1), 2)
    keys, _ = rope(**given, mscale=2.0, mscale_all_dim=1.0)
    assert math.isclose(keys["attn_factor"], (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1) ** 2)


def test_llama_3s_factors():
    keys, factors = rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )  # fmt: skip
    assert keys == {}
    # waves of 6.3, 63, 628 and 6283 tokens: short, in between, long, long
    smooth = (64 / (2 * math.pi * 10) - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    assert np.allclose(factors["rope_freqs.weight"], [1, between, 8, 8])


def test_longrope():
    keys, factors = rope(
        "phi3", type="su", short_factor=[1, 1.5, 2, 2], long_factor=[1, 2, 4, 8],
        original_max_position_embeddings=16,
    )  # fmt: skip
    assert keys["type"] == "longrope" and keys["original_context_length"] == 16
    assert math.isclose(keys["attn_factor"], math.sqrt(1 + math.log(4) / math.log(16)))
    assert factors["rope_factors_short.weight"].tolist() == [1, 1.5, 2, 2]
    assert factors["rope_factors_long.weight"].tolist() == [1, 2, 4, 8]
    with pytest.raises(ModelFileError, match="short_factor should be 4 numbers"):
        rope("phi3", type="longrope", short_factor=[1], long_factor=[1, 2, 4, 8])


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama", {"hidden_size": "8"}, "hidden_size should be a whole number above 0, not '8'"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers should be"),
        ("mistral", {"num_hidden_layers": 1 << 30}, "num_hidden_layers should be"),
        ("llama", {"head_dim": 1 << 30}, "head_dim should be"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps should be a number above 0, not -1"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1e-300}}, "factor should be"),
        ("llama", {"rope_scaling": 3}, "rope_scaling should be an object, not 3"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("phi3", {"partial_rotary_factor": 0.1}, "partial_rotary_factor should be"),
    ],
)
def test_damaged(model_type, changes, reason):
    with pytest.raises(ModelFileError, match=reason):
        read(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mamba", {}, "models of type 'mamba' are not supported; known are llama, mistral"),
        (None, {}, "models of type None"),
        ("x" * 1000, {}, r"models of type 'x+\.\.\. are"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu' is not supported here, only silu"),
        ("llama", {"rope_scaling": {"type": "mrope"}}, "RoPE of type 'mrope'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
        ("qwen3_moe", {"num_experts": 4, "mlp_only_layers": [1]}, "layers without experts"),
        ("qwen3_moe", {"num_experts": 4, "decoder_sparse_step": 2}, "layers without experts"),
        ("gemma3n", {}, "models of type 'gemma3n' are not supported"),
        ("smollm3", {}, "models of type 'smollm3' are not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_unsupported(model_type, changes, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        read(model_type, **changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
KEYS = [
    *config("llama"), "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "layer_types",
    "sliding_window", "use_sliding_window", "max_window_layers", "partial_rotary_factor",
    "sliding_window_pattern", "num_experts", "text_config", "hidden_act", "n_embd", "n_ctx",
]  # fmt: skip
ROPES = st.dictionaries(
    st.sampled_from(
        ["rope_type", "factor", "rope_theta", "long_factor", "short_factor", "mscale", "beta_fast",
         "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
         "full_attention", "sliding_attention", "mscale_all_dim", "attention_factor"]
    ),
    JSON | st.sampled_from(["llama3", "yarn", "longrope", "dynamic", 1, 2, 1e300, 4.0]),
)  # fmt: skip


@settings(max_examples=400)
@given(
    st.sampled_from([*ARCHITECTURES, "gemma3"]),
    st.dictionaries(st.sampled_from(KEYS), JSON | ROPES, max_size=4),
)
def test_fuzz(model_type, changes):
    changes.pop("model_type", None)
    try:
        read(model_type, **changes)
    except CyclewiseError as error:
        assert "\n" not in str(error)
