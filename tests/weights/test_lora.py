"""Adapters' files: what is refused, and why."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from cyclewise.errors import CyclewiseError, ModelFileError, ModelNotFoundError
from cyclewise.models import load_model
from cyclewise.weights.lora import read_lora
from tests.models import lora_oracle, oracle
from tests.weights import build

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
F32 = np.float32


def halves(rank=4, rows=64, columns=64, stem=STEM, infix=""):
    return {
        f"{stem}.lora_A{infix}.weight": ("F32", np.ones((rank, columns), F32)),
        f"{stem}.lora_B{infix}.weight": ("F32", np.ones((rows, rank), F32)),
    }


def write(path, tensors=None, **config):
    path.mkdir()
    said = lora_oracle.peft_config("llama") | config
    (path / "adapter_config.json").write_text(json.dumps(said))
    found = halves() if tensors is None else tensors
    lora_oracle.write_safetensors(path / "adapter_model.safetensors", found)
    return path


@pytest.mark.parametrize("infix", ["", ".default", ".pirate"])
def test_the_names_of_tensors(tmp_path, infix):
    path = write(tmp_path / "adapter", halves(infix=infix))
    for named in (path, path / "adapter_model.safetensors", path / "adapter_config.json"):
        file = read_lora(named, "llama")
        assert (file.path, list(file.modules)) == (path, ["blk.0.attn_q.weight"])
    module = file.modules["blk.0.attn_q.weight"]
    assert (module.format, module.a.shape, module.b.shape) == ("F32", (4, 64), (64, 4))
    assert (module.rank, module.scale, file.gguf_rows) == (4, 2.0, False)


def test_scales(tmp_path):
    name = "blk.0.attn_q.weight"
    for i, (config, scale) in enumerate([
        ({"lora_alpha": 3}, 0.75),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"k_proj": 1, "q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 1}}, 2.0),  # no whole name of a module
        ({"alpha_pattern": {r".*layers\.[0-9].self_attn.q_proj": 1}}, 0.25),
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True}, 0.5),
    ]):  # fmt: skip
        path = write(tmp_path / str(i), **config)
        assert read_lora(path, "llama").modules[name].scale == scale


def test_halves_of_two_types_become_float32(tmp_path):
    tensors = halves()
    a, b = tensors
    tensors[a] = "BF16", tensors[a][1]
    tensors[b] = "F16", tensors[b][1]
    module = read_lora(write(tmp_path / "adapter", tensors), "llama").modules["blk.0.attn_q.weight"]
    assert module.format == "F32"
    assert (module.a.view(F32) == 1).all() and (module.b.view(F32) == 1).all()


CONFIGS = {
    "another type": ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA"),
    "no type": ({"peft_type": None}, "an adapter of type None; only LORA"),
    "DoRA": ({"use_dora": True}, "adapters with use_dora are not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "with modules_to_save are not"),
    "biases": ({"bias": "lora_only"}, r"with biases \(bias: 'lora_only'\) are not supported"),
    "B's biases": ({"lora_bias": True}, "with lora_bias are not supported"),
    "tokens": ({"trainable_token_indices": [1]}, "with trainable_token_indices are not"),
    "layers twice": ({"layer_replication": [[0, 2]]}, "with layer_replication are not"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "which changes the base model too"),
    "no rank": ({"r": None}, "r should be a whole number from 1 to 1024, not None"),
    "rank 0": ({"r": 0}, "r should be a whole number from 1 to 1024, not 0"),
    "a large rank": ({"r": 1025}, "r should be a whole number from 1 to 1024, not 1025"),
    "a rank that is true": ({"r": True}, "r should be a whole number"),
    "no alpha": ({"lora_alpha": "8"}, "lora_alpha should be a number, not '8'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha should be a number, not inf"),
    "no patterns": ({"rank_pattern": [1]}, r"rank_pattern should be an object, not \[1\]"),
    "a pattern's rank": ({"rank_pattern": {"x": 0}}, "rank_pattern of x should be a whole number"),
    "a slow pattern": ({"alpha_pattern": {"(a+)+": 1}}, r"has the pattern '\(a\+\)\+', which"),
    "a broken pattern": ({"alpha_pattern": {"(": 1}}, r"has the pattern '\(', which"),
    "looking back": ({"alpha_pattern": {r"(a)\1": 1}}, "which is not supported"),
    "the wrong rank": ({"r": 8}, r"shapes \(4, 64\) and \(64, 4\), where the rank is 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_refused(tmp_path, name):
    config, sentence = CONFIGS[name]
    with pytest.raises(CyclewiseError, match=sentence):
        read_lora(write(tmp_path / "adapter", **config), "llama")


def with_tensor(name, values, dtype="F32"):
    return halves() | {f"base_model.model.{name}": (dtype, values)}


ONES = np.ones((4, 64), F32)
LAYER = "model.layers.0."
TENSORS = {
    "nothing": ({}, "the adapter changes nothing"),
    "half": ({f"{STEM}.lora_A.weight": ("F32", ONES)}, "there is only a of A and B"),
    "twice": (halves() | halves(infix=".default"), "is there under two names"),
    "a vector": (halves() | {f"{STEM}.lora_A.weight": ("F32", ONES[0])}, "where a matrix is"),
    "ranks apart": (
        halves() | {f"{STEM}.lora_B.weight": ("F32", np.ones((64, 5), F32))},
        r"shapes \(4, 64\) and \(64, 5\), where the rank is 4",
    ),
    "integers": (
        halves() | {f"{STEM}.lora_A.weight": ("I32", np.ones((4, 64), np.int32))},
        "is I32; an adapter's may be F32, F16 or BF16",
    ),
    "no number": (
        halves() | {f"{STEM}.lora_A.weight": ("F32", ONES * np.nan)}, "holds what is no finite",
    ),
    "a magnitude": (
        with_tensor(f"{LAYER}self_attn.q_proj.lora_magnitude_vector", ONES[0]), "is no A or B",
    ),
    "a bias": (with_tensor(f"{LAYER}self_attn.q_proj.lora_B.bias", ONES[0]), "is no A or B"),
    "an embedding": (with_tensor("model.embed_tokens.lora_embedding_A", ONES), "is no A or B"),
    "the output": (with_tensor("lm_head.lora_A.weight", ONES), "lm_head.*changes what no adapter"),
    "a norm": (with_tensor(f"{LAYER}input_layernorm.lora_A.weight", ONES), "changes what no"),
    "an expert": (
        with_tensor(f"{LAYER}block_sparse_moe.experts.0.w1.lora_A.weight", ONES),
        "changes what no adapter can change here: only the matrices of attention",
    ),
    "anything": (with_tensor("x.y.lora_A.weight", ONES), "changes what no adapter"),
    "another name": ({"model.layers.0.x": ("F32", ONES)}, "is no A or B of a LoRA adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused(tmp_path, name):
    tensors, sentence = TENSORS[name]
    with pytest.raises(CyclewiseError, match=sentence):
        read_lora(write(tmp_path / "adapter", tensors), "llama")


def test_directories_that_are_none(tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no adapter of that name"):
        read_lora(tmp_path / "nothing", "llama")
    with pytest.raises(ModelNotFoundError):
        read_lora(tmp_path / "nothing.gguf", "llama")
    path = write(tmp_path / "adapter")
    weights = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"adapter_model.safetensors is missing"):
        read_lora(path, "llama")
    (path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CyclewiseError, match="is a pickle, a program that runs when it is read"):
        read_lora(path, "llama")
    (path / "adapter_model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        read_lora(path, "llama")
    (path / "adapter_config.json").write_text("[")
    with pytest.raises(ModelFileError, match="the file is no JSON"):
        read_lora(path, "llama")
    (path / "adapter_config.json").unlink()
    with pytest.raises(ModelFileError, match=r"adapter_config\.json is missing, so this is no"):
        read_lora(path, "llama")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return oracle.write_gguf(tmp_path_factory.mktemp("base") / "model.gguf", "llama")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (halves(rows=32), r"blk.0.attn_q.weight of shape \(32, 64\), which in the model .* is"),
        (halves(columns=48), r"of shape \(64, 48\), which in the model .* is \(64, 64\)"),
        (
            halves(stem="base_model.model.model.layers.7.mlp.up_proj", rows=96),
            "changes blk.7.ffn_up.weight, which the model .* does not have",
        ),
    ],
)
def test_an_adapter_of_another_model(tmp_path, llama, tensors, sentence):
    with pytest.raises(CyclewiseError, match=sentence):
        load_model(llama, threads=1, adapters={"one": write(tmp_path / "adapter", tensors)})


def test_gguf_adapters_that_are_refused(tmp_path):
    for i, (said, sentence) in enumerate([
        ({"type": "model"}, "no LoRA adapter: general.type is 'model'"),
        ({"adapter_type": "control_vector"}, "adapter.type 'control_vector'"),
        ({"architecture": "qwen2"}, "for the architecture 'qwen2', and the model is of llama"),
    ]):  # fmt: skip
        path = lora_oracle.write_gguf(tmp_path / f"{i}.gguf", "llama", **said)
        with pytest.raises(CyclewiseError, match=sentence):
            read_lora(path, "llama")
    entries = [
        build.entry("general.architecture", build.STRING, "llama"),
        build.entry("general.type", build.STRING, "adapter"),
        build.entry("adapter.type", build.STRING, "lora"),
    ]
    pair = [
        build.tensor("blk.0.attn_q.weight.lora_a", (32, 4), 0, 0),
        build.tensor("blk.0.attn_q.weight.lora_b", (4, 8), 0, 512),
    ]
    data = struct.pack("<160f", *range(160))
    path = tmp_path / "made.gguf"
    path.write_bytes(build.gguf(entries, pair, data))
    module = read_lora(path, "llama").modules["blk.0.attn_q.weight"]
    assert (module.a.shape, module.b.shape, module.scale) == ((4, 32), (8, 4), 1.0)  # no alpha
    for more, tensors, sentence in [
        ([build.entry("adapter.lora.alpha", build.F32, float("nan"))], pair, "alpha is nan"),
        ([build.entry("adapter.lora.alpha", build.STRING, "x")], pair, "alpha is 'x', no number"),
        (
            [build.entry("adapter.alora.invocation_tokens", build.ARRAY, build.array(4, [1]))],
            pair,
            "alora",
        ),
        ([], pair[:1], "there is only a of A and B"),
        ([], [build.tensor("blk.0.attn_q.weight", (32, 4))], "is no A or B of a LoRA adapter"),
        ([], [build.tensor("token_embd.weight.lora_a", (32, 4))], "changes what no adapter"),
        ([], [build.tensor("blk.0.attn_q.weight.lora_a", (32, 4), 8), pair[1]], "is Q8_0; an"),
    ]:
        path.write_bytes(build.gguf(entries + more, tensors, data))
        with pytest.raises(CyclewiseError, match=sentence):
            read_lora(path, "llama")
