"""How much the arithmetic of a format costs on a real model: divergence from float32.

    python benchmarks/formats_quality.py MODEL.gguf FOLDER Q2_K Q3_K_M ...

llama.cpp quantizes the model to each format, and what comes out to float32 again, by the
interpreter that CYCLEWISE_PEERS_PYTHON names (`quantize.py`); its logits of the float32 file are
the reference. Printed is the mean Kullback-Leibler divergence from them of both engines reading the
quantized file. Files are removed as soon as they have been read.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from quality import TEXT, llama_cpp_logits, measure

from cyclewise.bench.peers import Peer
from cyclewise.bench.perplexity import cut, scored_logits
from cyclewise.engine.engine import Engine
from cyclewise.models import load_model
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.weights.gguf import GGUFFile

HERE = pathlib.Path(__file__).parent


def quantize(source: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
    python = os.environ.get("CYCLEWISE_PEERS_PYTHON", sys.executable)
    command = [python, HERE / "quantize.py", source, folder, name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / f"{name.lower()}.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--text", type=pathlib.Path, default=TEXT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=4)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with GGUFFile(arguments.model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[:100_000])
    chunks = cut(ids, tokenizer, arguments.context, arguments.chunks)
    settings = {"num_threads": arguments.threads, "context": arguments.context}
    print(f"{'format':10}  cyclewise  llama.cpp")
    for name in arguments.formats:
        path = quantize(arguments.model, arguments.folder, name)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            reference = pathlib.Path(folder)
            floats = quantize(path, reference, "F32")
            with Peer("llama.cpp", floats, **settings) as peer:
                for index, chunk in enumerate(chunks):
                    rows = [rows for _, rows in llama_cpp_logits(peer, chunk)]
                    np.save(reference / f"logits-{index}.npy", np.concatenate(rows))
            with Peer("llama.cpp", path, **settings) as peer:
                theirs = measure(
                    name, lambda chunk, peer=peer: llama_cpp_logits(peer, chunk), chunks, reference
                )
            model = load_model(path, context=arguments.context, threads=arguments.threads)
            engine = Engine(model)
            ours = measure(
                name, lambda chunk, engine=engine: scored_logits(engine, chunk), chunks, reference
            )
            model.close()
        path.unlink()
        print(f"{name:10}  {ours['kl_divergence']:.2e}   {theirs['kl_divergence']:.2e}", flush=True)


if __name__ == "__main__":
    main()
