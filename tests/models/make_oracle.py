"""Makes `oracle.npz` with transformers: python -m tests.models.make_oracle"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

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
        given["lm_head.weight"] = given["model.embed_tokens.weight"]
    model.load_state_dict(given, strict=True)
    rows = []
    with torch.no_grad():
        for ids in oracle.token_ids(case):
            whole = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            rows.append(whole[oracle.kept_rows(len(ids))])
    return np.concatenate(rows)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    np.savez_compressed(oracle.FIXTURE, **{name: logits(name) for name in oracle.CASES})
