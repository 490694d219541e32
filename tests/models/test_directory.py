"""A Hugging Face directory computes what the GGUF file of the same weights does."""

from __future__ import annotations

import numpy as np
import pytest

from cyclewise.engine.engine import Engine
from cyclewise.models import load_model
from tests.models import tiny
from tests.weights.directories import write

NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def their_name(name):
    if not name.startswith("blk."):
        return f"{OUTSIDE[name.removesuffix('.weight')]}.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{kind}"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_gguf_file(tmp_path, tied):
    made = tiny.Tiny("qwen2", tied=tied, biases=("attn_q", "attn_k", "attn_v"))
    tensors = tiny.make_tensors(made)
    tiny.write_file(tmp_path / "model.gguf", made, tensors)
    arrays = {}
    for name, (data, _) in tensors.items():
        values = data.view(np.float32)
        arrays[their_name(name)] = values.reshape(len(values), -1) if data.ndim == 2 else values
    config = {
        "model_type": "qwen2", "hidden_size": made.hidden, "num_hidden_layers": made.layers,
        "num_attention_heads": made.heads, "num_key_value_heads": made.kv_heads,
        "intermediate_size": made.feed_forward, "max_position_embeddings": made.context,
        "rms_norm_eps": 1e-5, "vocab_size": made.vocab, "tie_word_embeddings": tied,
    }  # fmt: skip
    write(tmp_path / "hf", config, arrays, shards=2)
    logits = []
    for path in (tmp_path / "model.gguf", tmp_path / "hf"):
        model = load_model(path, threads=1)
        try:
            engine = Engine(model)
            logits.append(engine.evaluate(engine.new_sequence(), list(range(40))).copy())
        finally:
            model.close()
    assert np.array_equal(*logits)
