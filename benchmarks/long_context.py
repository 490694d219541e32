"""Long contexts: prefill beside llama.cpp with flash attention, and decode with both kinds of KV
cache.

    python benchmarks/long_context.py MODEL.gguf --threads 2 --rounds 2
    python benchmarks/long_context.py MODEL.gguf --threads 2 --rounds 2 --skip-prefill

A round of prefill is a prompt of `--tokens` tokens by llama.cpp, by Cyclewise, and by Cyclewise
with `kv="int8"`, in turns; ratios are of neighbours. A round of decode is `--steps` tokens with
each kind of cache at each of `--depths`, in turns, between two readings of the memory's bandwidth:
the limit is that bandwidth over the bytes of weights and of the cache that a token reads. Rounds
are added to those that lie in `results/long-context-NAME-Nt.json`; `--anew` begins a new file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from cyclewise.bench.bench import (
    HANDOVER_SECONDS,
    PROBE_SECONDS,
    Spread,
    bytes_per_decode_token,
    token_ids,
)
from cyclewise.bench.host import describe_host
from cyclewise.bench.peers import Peer
from cyclewise.bench.report import show_progress
from cyclewise.engine.engine import Engine
from cyclewise.engine.kvcache import Sequence
from cyclewise.models import Model, load_model
from cyclewise.weights.sources import resolve

RESULTS = pathlib.Path(__file__).parent / "results"
KINDS = ("f16", "int8")


class Ours:
    """A loaded model with one kind of cache, and a sequence that fills its context."""

    def __init__(self, path: pathlib.Path, threads: int, context: int, kv: str) -> None:
        self.model: Model = load_model(path, context=context, threads=threads, kv=kv)
        self.engine = Engine(self.model)
        self.sequence: Sequence = self.engine.new_sequence()
        self.prefill(token_ids(64, 0, self.engine.vocab_size))

    def prefill(self, ids: list[int]) -> float:
        """Seconds, from an empty context; what was read stays."""
        self.engine.free(self.sequence)
        start = time.perf_counter()
        self.engine.evaluate(self.sequence, ids, "last")
        return time.perf_counter() - start

    def decode(self, depth: int, ids: list[int]) -> dict[str, float]:
        """Seconds of a token behind `depth` others, beside the least that bandwidth allows."""
        self.sequence.truncate(depth)
        machine, seconds = self.model.machine, 0.0
        before = machine.read_bandwidth(PROBE_SECONDS)
        start = time.perf_counter()
        for token_id in ids:
            self.engine.evaluate(self.sequence, [token_id], "last")
        seconds = (time.perf_counter() - start) / len(ids)
        bandwidth = (before + machine.read_bandwidth(PROBE_SECONDS)) / 2
        streamed = bytes_per_decode_token(
            self.model.bytes_per_token, self.model.kv_bytes_per_token, depth, len(ids)
        )
        return {
            "seconds": seconds, "bandwidth": bandwidth, "bytes": streamed,
            "of_limit": streamed / bandwidth / seconds,
        }  # fmt: skip


def prefill_round(
    engines: dict[str, Any], tokens: int, vocab_size: int, seed: int
) -> dict[str, float]:
    """Seconds of each engine."""
    found = {}
    for name, engine in engines.items():
        show_progress(f"{name} reads {tokens} tokens")
        time.sleep(HANDOVER_SECONDS)
        found[name] = engine.prefill(token_ids(tokens, seed, vocab_size))
    return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Spreads of all rounds so far."""
    told: dict[str, Any] = {}
    turns = result["prefill"]
    for name in turns[0] if turns else ():
        told[f"prefill {name}, tokens/s"] = [result["tokens"] / turn[name] for turn in turns]
    for kv in KINDS if turns and "llama.cpp" in turns[0] else ():
        told[f"prefill {kv} over llama.cpp"] = [turn["llama.cpp"] / turn[kv] for turn in turns]
    for depth in result["depths"]:
        at = [turn[str(depth)] for turn in result["decode"]]
        for kv in KINDS if at else ():
            told[f"decode {kv} at {depth}, tokens/s"] = [1 / turn[kv]["seconds"] for turn in at]
            told[f"decode {kv} at {depth}, of its limit"] = [turn[kv]["of_limit"] for turn in at]
        if at:
            gains = [turn["f16"]["seconds"] / turn["int8"]["seconds"] for turn in at]
            told[f"decode int8 over f16 at {depth}"] = gains
    return {name: asdict(Spread.of(values)) for name, values in told.items()}


def measure(path: pathlib.Path, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Adds rounds to the result."""
    context = options.tokens + options.steps
    with ExitStack() as stack:
        engines: dict[str, Any] = {}
        if not options.skip_prefill and not options.skip_peer:
            peer = Peer(
                "llama.cpp", path, num_threads=options.threads, context=options.tokens,
                flash_attention=True,
            )  # fmt: skip
            engines["llama.cpp"] = stack.enter_context(peer)
            result["llama.cpp"] = {"version": peer.version, **peer.details}
        ours = {kv: Ours(path, options.threads, context, kv) for kv in KINDS}
        for each in ours.values():
            stack.enter_context(closing(each.model))
        engines |= ours
        vocab_size = ours["f16"].engine.vocab_size
        if options.skip_prefill:
            prefill_round(ours, options.tokens, vocab_size, 0)
        else:
            for _ in range(options.rounds):
                seed = len(result["prefill"]) + 1
                turn = prefill_round(engines, options.tokens, vocab_size, seed)
                result["prefill"].append(turn)
        rounds: list[dict[str, Any]] = [{} for _ in range(options.decode_rounds)]
        for depth in sorted(options.depths, reverse=True):  # the context is cut, never filled again
            show_progress(f"decode at {depth}")
            for number, turn in enumerate(rounds):
                ids = token_ids(options.steps, number, vocab_size)
                turn[str(depth)] = {kv: each.decode(depth, ids) for kv, each in ours.items()}
        result["decode"] += rounds
    show_progress("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--depths", type=int, nargs="+", default=[512, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5, help="Of prefill.")
    parser.add_argument("--decode-rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--anew", action="store_true")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.models:
        path = resolve(name)
        file = RESULTS / f"long-context-{pathlib.Path(name).stem}-{options.threads}t.json"
        result: dict[str, Any] = {
            "model": path.name, "threads": options.threads, "tokens": options.tokens,
            "steps": options.steps, "depths": options.depths, "prefill": [], "decode": [],
        }  # fmt: skip
        if file.exists() and not options.anew:
            kept = json.loads(file.read_text())
            if all(kept[key] == result[key] for key in ("tokens", "steps", "depths")):
                result = kept
        measure(path, options, result)
        result["summary"], result["host"] = summary(result), describe_host()
        file.write_text(json.dumps(result, indent=2) + "\n")
        for told, spread in result["summary"].items():
            print(f"{told}: {spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})")


if __name__ == "__main__":
    main()
