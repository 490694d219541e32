"""Makes `lora_oracle.npz` with transformers and PEFT: python -m tests.models.make_lora_oracle"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from tests.models import lora_oracle, oracle
from tests.models.oracle import Floats


def logits(name: str) -> Floats:
    """What PEFT computes in float32 (kept rows of all sequences, vocabulary), from the files that
    the tests write.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = lora_oracle.ADAPTERS[name].base
    with tempfile.TemporaryDirectory() as folder:
        path = oracle.write_directory(Path(folder) / "base", base)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not found["missing_keys"] and not found["unexpected_keys"], found
        whole = PeftModel.from_pretrained(
            model, str(lora_oracle.write_peft(Path(folder) / "adapter", name))
        ).eval()
        _compare(whole, name)
    rows = []
    with torch.no_grad():
        for length, kept in zip(lora_oracle.LENGTHS, lora_oracle.KEPT, strict=True):
            ids = torch.tensor([lora_oracle.token_ids(length)])
            rows.append(whole(ids, use_cache=False).logits[0].float().numpy()[list(kept)])
    return np.concatenate(rows)


def _compare(whole: object, name: str) -> None:
    """That PEFT has each A, B and scale which the tests think it has, and no other."""
    layers = {
        key.removeprefix("base_model.model."): module
        for key, module in whole.named_modules()  # type: ignore[attr-defined]
        if hasattr(module, "lora_A")
    }
    halves = lora_oracle.halves(name)
    assert layers.keys() == halves.keys(), layers.keys() ^ halves.keys()
    for key, (a, b) in halves.items():
        layer = layers[key]
        np.testing.assert_array_equal(layer.lora_A["default"].weight.detach().numpy(), a)
        np.testing.assert_array_equal(layer.lora_B["default"].weight.detach().numpy(), b)
        _, scale = lora_oracle.rank_and_scale(lora_oracle.ADAPTERS[name], key)
        assert abs(layer.scaling["default"] - scale) < 1e-9, (key, layer.scaling, scale)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    np.savez_compressed(
        lora_oracle.FIXTURE, **{name: logits(name) for name in lora_oracle.ADAPTERS}
    )
