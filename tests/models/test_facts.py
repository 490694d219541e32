from __future__ import annotations

import json
from dataclasses import replace

from cyclewise.models.config import Config, Rope
from cyclewise.models.facts import attention, facts, positions

PLAIN = Config(
    architecture="llama", name="Tiny", num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=4,
    head_dim=16, feed_forward=96, vocab_size=50, context_length=80, trained_context=256,
    norm_epsilon=1e-5, rope=Rope(16, 1e4), query_scale=0.25,
)  # fmt: skip


def stretched(scaling, context=80):
    rope = Rope(16, 1e4, scaling=scaling, factor=4.0, original_context=64)
    return positions(replace(PLAIN, rope=rope, context_length=context))


def test_attention():
    assert attention(PLAIN) == "4 heads of 16"
    shared = replace(PLAIN, num_kv_heads=2, windows=(24, 24, 24))
    assert attention(shared) == (
        "4 heads of 16, 2 of keys and values; all layers see the last 24 tokens"
    )
    gemma = replace(PLAIN, windows=(24, None, 24), attention_softcap=50.0)
    assert attention(gemma) == (
        "4 heads of 16; 2 of 3 layers see the last 24 tokens; scores capped at 50"
    )


def test_positions():
    assert positions(PLAIN) == "RoPE of base 10,000"
    assert positions(replace(PLAIN, architecture="gpt2")) == "learned, 256 of them"
    local = replace(PLAIN, rope=Rope(16, 1e6), local_rope=Rope(16, 1e4))
    assert positions(local) == "RoPE of base 1,000,000, of 10,000 in layers with a window"
    assert stretched("linear").endswith("; stretched 4 times, linearly")
    assert stretched("yarn").endswith("; stretched 4 times from 64 tokens (YaRN)")
    assert stretched("dynamic").endswith("beyond 64 tokens, as this one")
    assert stretched("dynamic", 64).endswith("beyond 64 tokens")
    assert stretched("longrope").endswith("; long factors (longrope, trained on 64 tokens)")
    assert stretched("longrope", 64).endswith("; short factors (longrope, trained on 64 tokens)")


def test_facts_are_plain():
    told = facts(replace(PLAIN, windows=(24, None, 24)))
    assert json.loads(json.dumps(told)) == told
    assert (told["window"], told["windowed_layers"], told["context"]) == (24, 2, 80)
    assert facts(PLAIN)["window"] is None
