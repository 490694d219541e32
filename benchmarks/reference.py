"""Computes float32 reference logits with transformers, for `quality.py` to measure engines against.

    python benchmarks/reference.py MODEL.gguf TOKENS.npy FOLDER

Runs in an interpreter that has torch, transformers, accelerate and gguf; Cyclewise is not needed
there. TOKENS.npy holds int32 (chunks, context). FOLDER gets `tokens.npy` and, per chunk,
`logits-N.npy`: float32 (scored, vocab_size), after the tokens of the second half but the last,
whose next token lies in the chunk. The file's weights are dequantized to float32 by transformers,
so what differs from these logits is an engine's arithmetic and nothing else.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil

import numpy as np


def main() -> None:
    """Writes one file of logits for each chunk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    tokens = np.load(arguments.tokens)
    first = tokens.shape[1] // 2
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model.parent, gguf_file=arguments.model.name, dtype=torch.float32
    )
    model.eval()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for index, chunk in enumerate(tokens):
        with torch.inference_mode():
            ids = torch.from_numpy(chunk.astype(np.int64))[None]
            hidden = model.model(ids).last_hidden_state[0, first:-1]
            logits = model.lm_head(hidden)
        np.save(arguments.folder / f"logits-{index}.npy", logits.numpy())
        print(f"chunk {index + 1} of {len(tokens)}", flush=True)
    if arguments.tokens.resolve() != (arguments.folder / "tokens.npy").resolve():
        shutil.copyfile(arguments.tokens, arguments.folder / "tokens.npy")


if __name__ == "__main__":
    main()
