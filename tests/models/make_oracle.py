"""Makes `oracle.npz` with transformers: python -m tests.models.make_oracle"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import oracle


def logits(name: str) -> oracle.Floats:
    """What transformers computes, float32 (kept rows of all sequences, vocabulary)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    case = oracle.CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.full))
        config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().float()
    given = {key: torch.from_numpy(values) for key, values in oracle.weights(name).items()}
    if config.tie_word_embeddings:
        table = "transformer.wte" if case.model_type == "gpt2" else "model.embed_tokens"
        given["lm_head.weight"] = given[f"{table}.weight"]
    model.load_state_dict(_fused_experts(given), strict=True)
    rows = []
    with torch.no_grad():
        for ids in oracle.token_ids(case):
            whole = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            rows.append(whole[oracle.kept_rows(len(ids))])
    return np.concatenate(rows)


def _fused_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps the experts of a layer in two tensors; its files have one for each."""
    import torch

    found: dict[str, Any] = {}
    experts: dict[str, dict[str, list[Any]]] = {}
    for name, values in tensors.items():
        before, inside, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if inside:
            part = rest.split(".")[1]
            experts.setdefault(before + inside, {}).setdefault(part, []).append(values)
        else:
            found[before] = values
    for name, parts in experts.items():
        gate, up, down = (
            torch.stack(parts.get(old) or parts[new])
            for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
        )
        found[name + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[name + "down_proj"] = down
    return found


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    np.savez_compressed(oracle.FIXTURE, **{name: logits(name) for name in oracle.CASES})
