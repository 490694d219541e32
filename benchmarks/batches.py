"""How much faster sequences decode together than one by one.

    python benchmarks/batches.py MODEL.gguf ...

In every round batches of 1, 2, 4 and 8 sequences (`--sizes`) decode in turns from a short context,
one token each a step, and a size's gain is its tokens a second over those of one sequence in the
same round. Ids are fed, none is sampled. Writes `results/batches-NAME-Nt.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from cyclewise.bench.bench import HANDOVER_SECONDS, Spread, token_ids
from cyclewise.bench.host import describe_host
from cyclewise.bench.report import show_progress
from cyclewise.engine.engine import Engine, Request
from cyclewise.models import Model, load_model
from cyclewise.weights.sources import resolve

RESULTS = pathlib.Path(__file__).parent / "results"
PROMPT_TOKENS = 16


def decode_seconds(engine: Engine, size: int, steps: int, seed: int) -> float:
    """Of so many steps of `size` sequences, each behind PROMPT_TOKENS tokens of its own."""
    sequences = [engine.new_sequence() for _ in range(size)]
    ids = np.array(token_ids(size * (PROMPT_TOKENS + steps), seed, engine.vocab_size), np.int32)
    ids = ids.reshape(size, -1)
    for sequence, row in zip(sequences, ids, strict=True):
        sequence.reserve(PROMPT_TOKENS + steps)
        engine.step([Request(sequence, row[:PROMPT_TOKENS], "none")])
    time.sleep(HANDOVER_SECONDS)
    start = time.perf_counter()
    for at in range(PROMPT_TOKENS, PROMPT_TOKENS + steps):
        engine.step(
            [
                Request(sequence, row[at : at + 1], "last")
                for sequence, row in zip(sequences, ids, strict=True)
            ]
        )
    seconds = time.perf_counter() - start
    for sequence in sequences:
        engine.free(sequence)
    return seconds


def measure(model: Model, sizes: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Tokens a second of each size, and its gain over one sequence."""
    engine = Engine(model)
    decode_seconds(engine, max(sizes), 4, 0)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds):
        show_progress(f"round {number + 1} of {rounds}")
        for size in sizes:
            seconds = decode_seconds(engine, size, steps, number + 1)
            found[size].append(size * steps / seconds)
    show_progress("")
    gains = {
        size: Spread.of([rate / one for rate, one in zip(rates, found[1], strict=True)])
        for size, rates in found.items()
    }
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "steps": steps,
        "rounds": rounds,
        "tokens_per_second": {size: asdict(Spread.of(rates)) for size, rates in found.items()},
        "gain": {size: asdict(gain) for size, gain in gains.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.models:
        path = resolve(name)
        for threads in arguments.threads:
            context = max(1024, 2 * max(arguments.sizes) * (PROMPT_TOKENS + arguments.steps))
            model = load_model(path, context=context, threads=threads)
            try:
                sizes = sorted({1, *arguments.sizes})
                found = measure(model, sizes, arguments.rounds, arguments.steps)
            finally:
                model.close()
            result = {"model": path.name, "threads": threads, **found, "host": describe_host()}
            file = RESULTS / f"batches-{pathlib.Path(name).stem}-{threads}t.json"
            file.write_text(json.dumps(result, indent=2) + "\n")
            for size in sizes:
                rate, gain = found["tokens_per_second"][size], found["gain"][size]
                print(
                    f"{name} {threads}t, {size} together: {rate['median']:.1f} tokens/s, "
                    f"{gain['median']:.2f} x one ({gain['min']:.2f} to {gain['max']:.2f})"
                )


if __name__ == "__main__":
    main()
