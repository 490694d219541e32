"""How much an engine's arithmetic costs: perplexity, and divergence from float32, beside llama.cpp.

    python benchmarks/quality.py MODEL.gguf --reference FOLDER

Both engines read the same file and the same chunks of WikiText-2. Perplexity is over all chunks;
the mean Kullback-Leibler divergence of each engine from transformers in float32 is over the chunks
of the reference, in float64. FOLDER holds what `reference.py` writes; if it does not exist it is
made, by the interpreter that CYCLEWISE_REFERENCE_PYTHON names. Writes `results/quality-NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from cyclewise.bench.host import describe_host
from cyclewise.bench.peers import Peer
from cyclewise.bench.perplexity import cut, log_softmax, scored_logits
from cyclewise.bench.report import show_progress
from cyclewise.engine.engine import Engine
from cyclewise.models import load_model
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.weights.gguf import GGUFFile

HERE = pathlib.Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext-2/wikitext-2-raw-test.joined.txt"

# Evaluates a chunk; yields (position of the first row, logits (rows, vocab_size)).
Scored = Callable[[list[int]], Iterator[tuple[int, np.ndarray]]]


def llama_cpp_logits(peer: Peer, chunk: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The scored rows of a chunk, out of the file that the peer writes."""
    first, last = len(chunk) // 2, len(chunk) - 1
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "logits"
        peer.write_logits(chunk, path)
        rows = np.memmap(path, dtype=np.float32, mode="r").reshape(len(chunk), -1)
        yield first, rows[first:last]


def measure(
    name: str, scored: Scored, chunks: list[list[int]], reference: pathlib.Path
) -> dict[str, float]:
    """Perplexity over all chunks, and mean divergence over those that the reference has."""
    losses: list[float] = []
    divergences: list[float] = []
    for index, chunk in enumerate(chunks):
        show_progress(f"{name}: chunk {index + 1} of {len(chunks)}")
        path = reference / f"logits-{index}.npy"
        truth = np.load(path, mmap_mode="r") if path.exists() else None
        for first, logits in scored(chunk):
            for row, values in enumerate(logits):
                ours = log_softmax(values)
                losses.append(-ours[chunk[first + row + 1]])
                if truth is not None:
                    theirs = log_softmax(truth[first + row - len(chunk) // 2])
                    divergences.append(float(np.exp(theirs) @ (theirs - ours)))
    show_progress("")
    return {
        "perplexity": float(np.exp(np.mean(losses))),
        "tokens": len(losses),
        "kl_divergence": float(np.mean(divergences)),
        "kl_divergence_standard_error": float(np.std(divergences) / len(divergences) ** 0.5),
        "kl_tokens": len(divergences),
    }


def make_reference(model: pathlib.Path, chunks: list[list[int]], reference: pathlib.Path) -> None:
    """Run `reference.py` in the interpreter that has torch."""
    python = os.environ.get("CYCLEWISE_REFERENCE_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        tokens = pathlib.Path(folder) / "tokens.npy"
        np.save(tokens, np.array(chunks, dtype=np.int32))
        subprocess.run([python, HERE / "reference.py", model, tokens, reference], check=True)


def main() -> None:
    """Measures one model and writes its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--reference", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, default=TEXT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--reference-chunks", type=int, default=8)
    arguments = parser.parse_args()
    path, context = arguments.model, arguments.context

    with GGUFFile(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    chunks = cut(ids, tokenizer, context, arguments.chunks)
    if not arguments.reference.exists():
        make_reference(path, chunks[: arguments.reference_chunks], arguments.reference)
    referred = np.load(arguments.reference / "tokens.npy").tolist()
    if referred != chunks[: len(referred)]:
        parser.error(f"{arguments.reference} was made from other tokens; name another folder")

    with Peer("llama.cpp", path, num_threads=arguments.threads, context=context) as peer:
        version = peer.version
        theirs = measure(
            peer.kind.name, lambda chunk: llama_cpp_logits(peer, chunk), chunks, arguments.reference
        )
    engine = Engine(load_model(path, context=context, threads=arguments.threads))
    ours = measure(
        "cyclewise", lambda chunk: scored_logits(engine, chunk), chunks, arguments.reference
    )
    result = {
        "model": path.name,
        "text": arguments.text.name,
        "context": context,
        "chunks": len(chunks),
        "cyclewise": ours,
        "llama.cpp": {"version": version, **theirs},
        "perplexity_ratio": ours["perplexity"] / theirs["perplexity"],
        "kl_divergence_ratio": ours["kl_divergence"] / theirs["kl_divergence"],
        "host": describe_host(),
    }
    output = HERE / "results" / f"quality-{path.stem}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'':10}  perplexity  divergence from float32")
    for name, found in (("cyclewise", ours), ("llama.cpp", theirs)):
        print(f"{name:10}  {found['perplexity']:10.4f}  {found['kl_divergence']:.3e}")
    print(f"{'ratio':10}  {result['perplexity_ratio']:10.4f}  {result['kl_divergence_ratio']:.3f}")


if __name__ == "__main__":
    main()
