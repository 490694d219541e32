"""What a LoRA adapter costs: decode and prefill with one, in turns with the model alone.

    python benchmarks/lora.py MODEL.gguf ...

Each model is loaded twice, without adapters and with a random one of rank 16 (`--rank`) in float16
on all matrices of attention and feed-forward. In every round both take turns on the same random
ids, prompt by prompt and token by token, each round beginning with another; a round's ratio is the
time with the adapter over the time without. In the same rounds the second model runs without its
adapter too, which is what requests pay that do not ask for one. Writes `results/lora-NAME-Nt.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from cyclewise.bench.bench import HANDOVER_SECONDS, OurEngine, Spread, token_ids
from cyclewise.bench.host import describe_host
from cyclewise.bench.report import show_progress
from cyclewise.models import load_model
from cyclewise.weights.source import open_source
from cyclewise.weights.sources import resolve

RESULTS = pathlib.Path(__file__).parent / "results"
CHANGED = (
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


def write_adapter(model: pathlib.Path, path: pathlib.Path, rank: int) -> None:
    """A GGUF adapter with random A and B, which changes hidden states by about a tenth."""
    import gguf

    rng = np.random.default_rng(0)
    with open_source(model) as source:
        writer = gguf.GGUFWriter(path, source.metadata["general.architecture"])
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        for name, tensor in source.tensors.items():
            if name.startswith("blk.") and name.split(".")[2] in CHANGED and len(tensor.shape) == 2:
                rows, columns = tensor.shape
                a = rng.standard_normal((rank, columns)) * columns**-0.5
                b = rng.standard_normal((rows, rank)) * 0.1 * rank**-0.5
                writer.add_tensor(f"{name}.lora_a", a.astype(np.float16))
                writer.add_tensor(f"{name}.lora_b", b.astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def decode_seconds(
    engines: dict[str, OurEngine], ids: list[int], order: list[str]
) -> dict[str, float]:
    """Of each engine, token by token in turns: what else the computer does in a second strikes
    them all.
    """
    seconds = dict.fromkeys(engines, 0.0)
    sequences = {
        name: engine.engine.new_sequence(engine.adapter) for name, engine in engines.items()
    }
    for token_id in ids:
        for name in order:
            start = time.perf_counter()
            engines[name].engine.evaluate(sequences[name], [token_id], "last")
            seconds[name] += time.perf_counter() - start
    for name, sequence in sequences.items():
        engines[name].engine.free(sequence)
    return seconds


def measure(
    engines: dict[str, OurEngine], vocab_size: int, prompt: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Seconds of each engine's prefill and decode, round by round, and what they are of the
    first's.
    """
    for engine in engines.values():
        engine.prefill(token_ids(64, 0, vocab_size))
        engine.decode([], token_ids(4, 0, vocab_size))
    names = list(engines)
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {name: [] for name in engines} for phase in ("prefill", "decode")
    }
    for number in range(rounds):
        show_progress(f"round {number + 1} of {rounds}")
        ids = token_ids(max(prompt, steps), number + 1, vocab_size)
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order:
            time.sleep(HANDOVER_SECONDS)
            seconds["prefill"][name].append(engines[name].prefill(ids[:prompt]))
        time.sleep(HANDOVER_SECONDS)
        for name, spent in decode_seconds(engines, ids[:steps], order).items():
            seconds["decode"][name].append(spent)
    show_progress("")
    found: dict[str, Any] = {}
    for phase, count in (("prefill", prompt), ("decode", steps)):
        of = seconds[phase]
        found[phase] = {
            "tokens": count,
            "tokens_per_second": {
                name: asdict(Spread.of([count / value for value in values]))
                for name, values in of.items()
            },
            "time_of_base": {
                name: asdict(Spread.of([v / b for v, b in zip(of[name], of["base"], strict=True)]))
                for name in list(engines)[1:]
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.models:
        path = resolve(name)
        with tempfile.TemporaryDirectory() as folder:
            adapter = pathlib.Path(folder) / "adapter.gguf"
            write_adapter(path, adapter, arguments.rank)
            for threads in arguments.threads:
                base = load_model(path, context=1024, threads=threads)
                other = load_model(
                    path, context=1024, threads=threads, adapters={"random": adapter}
                )
                engines = {
                    "base": OurEngine(base), "adapter": OurEngine(other, 0),
                    "not asked for": OurEngine(other),
                }  # fmt: skip
                try:
                    found = measure(
                        engines, base.config.vocab_size, arguments.prompt, arguments.steps,
                        arguments.rounds,
                    )  # fmt: skip
                    facts = other.adapters[0]
                    streamed = {
                        "base": base.bytes_per_token, "adapter": other.bytes_per_token
                    }  # fmt: skip
                finally:
                    base.close()
                    other.close()
                result = {
                    "model": path.name, "threads": threads, "rank": arguments.rank,
                    "rounds": arguments.rounds, "adapter_bytes": facts.nbytes,
                    "adapter_matrices": facts.modules, "bytes_per_token": streamed, **found,
                    "host": describe_host(),
                }  # fmt: skip
                file = RESULTS / f"lora-{pathlib.Path(name).stem}-{threads}t.json"
                file.write_text(json.dumps(result, indent=2) + "\n")
                for phase in ("prefill", "decode"):
                    for which, ratio in found[phase]["time_of_base"].items():
                        rate = found[phase]["tokens_per_second"][which]["median"]
                        print(
                            f"{name} {threads}t, {phase}, {which}: {rate:.1f} tokens/s, "
                            f"{ratio['median']:.3f} of the time without "
                            f"({ratio['min']:.3f} to {ratio['max']:.3f})"
                        )


if __name__ == "__main__":
    main()
