from __future__ import annotations

import json
import os

import numpy as np
import pytest

from cyclewise.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from cyclewise.weights.directory import ModelDirectory
from cyclewise.weights.gguf import GGUFFile
from cyclewise.weights.source import open_source
from tests.weights import build
from tests.weights.directories import config, weights, write

SUFFIXES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def values(source, name):
    tensor = source.tensors[name]
    data = source.data(name)
    assert data.dtype == np.uint8 and data.nbytes == tensor.nbytes
    source.release(name)
    return data.view(SUFFIXES[tensor.format.name]).reshape(tensor.shape)


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_have_ggufs_names(tmp_path, shards):
    tensors = weights("llama")
    write(tmp_path, config("llama"), tensors, shards=shards)
    with open_source(tmp_path) as source:
        assert isinstance(source, ModelDirectory) and source.path == tmp_path
        assert len(source.tensors) == len(tensors)
        for ours, theirs in (
            ("token_embd", "model.embed_tokens"),
            ("output_norm", "model.norm"),
            ("output", "lm_head"),
            ("blk.1.attn_q", "model.layers.1.self_attn.q_proj"),
            ("blk.1.attn_output", "model.layers.1.self_attn.o_proj"),
            ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
            ("blk.0.ffn_norm", "model.layers.0.post_attention_layernorm"),
            ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ):
            found = values(source, f"{ours}.weight")
            assert found.tolist() == tensors[f"{theirs}.weight"].tolist()


def test_numbers_are_kept_as_they_are(tmp_path):
    tensors = weights()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].view(np.uint32) >> 16).astype(np.uint16)
    write(tmp_path, config("llama"), tensors)
    with open_source(tmp_path) as source:
        assert source.tensors["output_norm.weight"].format.name == "F16"
        assert source.tensors["output.weight"].format.name == "BF16"
        for ours, theirs in (("output_norm", "model.norm"), ("output", "lm_head")):
            found = values(source, f"{ours}.weight")
            assert found.tobytes() == tensors[f"{theirs}.weight"].tobytes()


def test_a_tensor_at_an_odd_place_is_moved(tmp_path):
    write(tmp_path, config("llama"), weights())
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    with open_source(tmp_path) as source:
        data = source.data("output.weight")
        assert data.ctypes.data % 4 == 0
        assert data.tobytes() == weights()["lm_head.weight"].tobytes()


def test_named_by_a_file_inside(tmp_path):
    write(tmp_path, config("llama"), weights(), shards=2)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        with open_source(tmp_path / name) as source:
            assert source.path == tmp_path


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gemmas_norms_gain_one(tmp_path, model_type):
    tensors = weights(model_type)
    write(tmp_path, config(model_type, head_dim=4), tensors)
    with open_source(tmp_path) as source:
        for ours, theirs in (
            ("output_norm", "model.norm"),
            ("blk.1.post_attention_norm", "model.layers.1.post_attention_layernorm"),
            ("blk.1.ffn_norm", "model.layers.1.pre_feedforward_layernorm"),
            ("blk.1.post_ffw_norm", "model.layers.1.post_feedforward_layernorm"),
        ):
            expected = tensors[f"{theirs}.weight"] + 1
            assert values(source, f"{ours}.weight").tolist() == expected.tolist()
        found = values(source, "blk.1.ffn_gate.weight")
        assert found.tolist() == tensors["model.layers.1.mlp.gate_proj.weight"].tolist()


def test_gemma_3_with_its_vision_half(tmp_path):
    inner = config("gemma3_text", head_dim=4)
    for prefix, head in (
        ("language_model.model.", "language_model."),
        ("model.language_model.", ""),
    ):
        tensors = {
            name.replace("model.", prefix) if name.startswith("model.") else head + name: value
            for name, value in weights("gemma3_text").items()
        }
        tensors["vision_tower.vision_model.embeddings.weight"] = np.zeros(3, np.float32)
        tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(3, np.float32)
        write(tmp_path, {"model_type": "gemma3", "text_config": inner}, tensors)
        with open_source(tmp_path) as source:
            assert source.metadata["general.architecture"] == "gemma3"
            assert len(source.tensors) == len(weights("gemma3_text"))


def test_gpt2s_matrices_are_turned_round(tmp_path):
    rng = np.random.default_rng(0)
    c_attn = rng.standard_normal((8, 24)).astype(np.float32)
    embedding = rng.standard_normal((20, 8)).astype(np.float32)
    tensors = {
        "transformer.wte.weight": embedding,
        "wpe.weight": rng.standard_normal((16, 8)).astype(np.float32),
        "h.0.attn.c_attn.weight": c_attn,
        "h.0.attn.c_attn.bias": np.arange(24, dtype=np.float32),
        "h.0.attn.bias": np.zeros((1, 1, 16, 16), np.uint8),
        "transformer.ln_f.bias": np.ones(8, np.float32),
    }
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    write(tmp_path, {"model_type": "gpt2", **shape}, tensors)
    with open_source(tmp_path) as source:
        assert values(source, "blk.0.attn_qkv.weight").tolist() == c_attn.T.tolist()
        assert values(source, "token_embd.weight").tolist() == embedding.tolist()
        assert list(source.tensors) == [
            "token_embd.weight", "position_embd.weight", "blk.0.attn_qkv.weight",
            "blk.0.attn_qkv.bias", "output_norm.bias",
        ]  # fmt: skip


def test_experts_are_matrices(tmp_path):
    tensors = {"model.layers.3.block_sparse_moe.gate.weight": np.zeros((2, 8), np.float32)}
    for part in ("w1", "w2", "w3"):
        tensors[f"model.layers.3.block_sparse_moe.experts.1.{part}.weight"] = np.full(
            (2, 8), int(part[1]), np.float32
        )
    write(tmp_path, config("mixtral", num_local_experts=2, tie_word_embeddings=...), tensors)
    with open_source(tmp_path) as source:
        for name, first in (("gate", 1), ("down", 2), ("up", 3)):
            assert values(source, f"blk.3.ffn_{name}.1.weight")[0, 0] == first
        assert "blk.3.ffn_gate_inp.weight" in source.tensors


def test_tied_embeddings(tmp_path):
    tensors = weights()
    write(tmp_path, config("llama", tie_word_embeddings=True), tensors)
    with open_source(tmp_path) as source:
        assert "output.weight" not in source.tensors
    del tensors["lm_head.weight"]
    write(tmp_path, config("llama", tie_word_embeddings=...), tensors)
    with open_source(tmp_path) as source:
        assert "output.weight" not in source.tensors
    write(tmp_path, config("llama"), tensors)
    with pytest.raises(ModelFileError, match=r"'lm_head\.weight' is missing"):
        open_source(tmp_path)


def test_a_directory_and_a_gguf_file_give_the_same_bytes(tmp_path):
    tensors = weights("qwen2")
    write(tmp_path / "hf", config("qwen2"), tensors)
    data = tensors["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "m.gguf").write_bytes(
        build.gguf(
            tensors=[build.tensor("blk.1.ffn_up.weight", data.shape[::-1])], data=data.tobytes()
        )
    )
    with open_source(tmp_path / "hf") as ours, open_source(tmp_path / "m.gguf") as theirs:
        assert isinstance(theirs, GGUFFile)
        name = "blk.1.ffn_up.weight"
        assert ours.tensors[name].shape == theirs.tensors[name].shape
        assert ours.data(name).tobytes() == theirs.data(name).tobytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_pipes_and_devices_are_not_waited_for(tmp_path, name):
    write(tmp_path, config("llama"), weights("llama"))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(ModelFileError, match="not a regular file"):
            open_source(tmp_path)
        path.unlink()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "m.ckpt"])
def test_pickle_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(UnsupportedModelError, match=r"pickle.*programs.*\.safetensors"):
        open_source(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(config("llama")))
    with pytest.raises(UnsupportedModelError, match=r"pickle.*programs.*\.safetensors"):
        open_source(tmp_path)


def edit(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such directory"):
        ModelDirectory(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"config\.json is missing"):
        open_source(tmp_path)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelFileError, match=r"name one, as b\.gguf"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config("llama")))
    with pytest.raises(ModelFileError, match=r"no \.safetensors files"):
        open_source(tmp_path)
    write(tmp_path, config("llama"), weights(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ModelFileError, match=r"model-00002-of-00003\.safetensors is missing, one"):
        open_source(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "model-00002-of-00003.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    edit(index, weight_map={"a": "../outside.safetensors"})
    with pytest.raises(ModelFileError, match=r"'\.\./outside\.safetensors' is no name of a shard"):
        open_source(tmp_path)
    for name in ("x" * 300, "a\0b", "a\nb", "\ud800", "/etc/x", "C:\\x", ""):
        edit(index, weight_map={"a": f"{name}.safetensors"})
        with pytest.raises(ModelFileError, match="is no name of a shard") as caught:
            open_source(tmp_path)
        assert str(caught.value).isprintable()
    more = json.loads(whole)["weight_map"] | {"extra": "model-00001-of-00003.safetensors"}
    edit(index, weight_map=more)
    with pytest.raises(ModelFileError, match="no shard holds tensor 'extra'"):
        open_source(tmp_path)
    index.unlink()
    with pytest.raises(ModelFileError, match=r"index\.json is missing, which says where in 3"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model.layers.0.self_attn.rotary.weight", np.ones(4, np.float32), "no tensor 'model.la"),
        ("model.layers.0.self_attn.q_proj.scale", np.ones(4, np.float32), "no tensor 'model.la"),
        ("model.norm.weight", np.ones((2, 2, 2), np.float32), "which no weight has"),
        ("model.norm.weight", np.ones(0, np.float32), "which no weight has"),
        ("model.norm.weight", np.ones(8, np.int64), "is I64; weights may be"),
        ("norm.weight", np.ones(8, np.float32), "there under two names"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, name, value, reason):
    write(tmp_path, config("llama"), weights() | {name: value})
    with pytest.raises((ModelFileError, UnsupportedModelError), match=reason):
        open_source(tmp_path)


def test_what_lies_beside_the_weights(tmp_path):
    write(
        tmp_path,
        config("llama", eos_token_id=7),
        weights(),
        tokenizer={"model": {}},
        tokenizer_config={"chat_template": "{{ messages }}"},
        generation_config={
            "eos_token_id": [5, 6], "temperature": 0.6, "top_p": 0.9, "top_k": 20,
            "repetition_penalty": 1.05, "do_sample": True, "min_p": None,
        },
    )  # fmt: skip
    with open_source(tmp_path) as source:
        metadata = source.metadata
    assert json.loads(metadata["tokenizer.huggingface.json"]) == {"model": {}}
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["cyclewise.stop_token_ids"] == [5, 6]
    assert metadata["cyclewise.vocab_size"] == 20
    assert {k: v for k, v in metadata.items() if k.startswith("general.sampling")} == {
        "general.sampling.temp": 0.6,
        "general.sampling.top_p": 0.9,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.05,
    }
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    (tmp_path / "chat_template.jinja").write_text("alone")
    with open_source(tmp_path) as source:
        assert source.metadata["general.sampling.temp"] == 0
        assert source.metadata["tokenizer.chat_template"] == "alone"
        assert source.metadata["cyclewise.stop_token_ids"] == [7]


def test_several_chat_templates(tmp_path):
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, 3]
    write(tmp_path, config("llama"), weights(), tokenizer_config={"chat_template": templates})
    with open_source(tmp_path) as source:
        assert source.metadata["tokenizer.chat_template"] == "a"
        assert source.metadata["tokenizer.chat_template.tool_use"] == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    with open_source(tmp_path) as source:
        assert source.metadata["tokenizer.chat_template"] == "c"
        assert source.metadata["tokenizer.chat_template.tool_use"] == "d"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "no JSON"), (b"[]", "a JSON object"), (b"\xff", "no UTF-8"), (b"[" * 10**6, "deeply")],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json(tmp_path, name, content, reason):
    write(tmp_path, config("llama"), weights())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=f"{name}: .*{reason}"):
        open_source(tmp_path)
