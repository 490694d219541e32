"""What the clock costs, and what it leaves unaccounted.

    python benchmarks/clock.py smollm2 MODEL.gguf ...

Decode of the same tokens with the plain loop, the clocked one and the light clock, in turns within
one process; medians of the ratios of neighbouring turns with their quartiles. Then a profile of
each model, for the share of time that belongs nowhere. Writes `results/clock-NAME-Nt.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

from cyclewise.bench.bench import token_ids
from cyclewise.bench.host import describe_host
from cyclewise.bench.report import show_progress
from cyclewise.clock.counter import open_counter
from cyclewise.clock.light import EVERY, LightClock
from cyclewise.clock.profile import make_profile
from cyclewise.clock.roofs import machine_profile
from cyclewise.clock.run import ClockedRun, Settings
from cyclewise.engine.engine import Engine
from cyclewise.machine.stamps import Stamps
from cyclewise.models import Model, load_model
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.weights.sources import resolve

RESULTS = pathlib.Path(__file__).parent / "results"
TOKENS = 32


def decode_seconds(model: Model, engine: Engine, answer: list[int]) -> float:
    """Seconds of a decode from an empty context."""
    sequence = engine.new_sequence()
    start = time.perf_counter()
    for token_id in answer:
        engine.evaluate(sequence, [token_id])
    seconds = time.perf_counter() - start
    engine.free(sequence)
    return seconds


def overheads(model: Model, turns: int) -> dict[str, Any]:
    """What the clocked loop and the light clock add to decode, as shares."""
    engine, machine, counter = Engine(model), model.machine, open_counter()
    stamps = Stamps(len(machine.program.moments), machine.num_threads, TOKENS)
    ratios: dict[str, list[float]] = {"clocked": [], "light": []}
    for turn in range(turns):
        show_progress(f"turn {turn + 1} of {turns}")
        answer = token_ids(TOKENS, turn, model.config.vocab_size)
        for name in ("clocked", "light"):
            order = ("plain", name) if turn % 2 else (name, "plain")
            seconds = {}
            for which in order:
                light = None
                if which == "clocked":
                    machine.settle()
                    stamps.clear()
                    machine.clock(stamps)
                elif which == "light":
                    light = LightClock(machine, counter)
                else:
                    machine.clock(None)
                seconds[which] = decode_seconds(model, engine, answer)
                if light is not None:
                    light.read()
            ratios[name].append(seconds[name] / seconds["plain"] - 1)
    machine.clock(None)
    show_progress("")
    result: dict[str, Any] = {"turns": turns, "tokens": TOKENS, "light_every": EVERY}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        # Of independent turns, the median's standard error is 1.25 standard errors of the mean.
        error = 1.25 * (high - low) / 1.349 / len(values) ** 0.5
        result[name] = {"median": middle, "quartiles": [low, high], "standard_error": error}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=60)
    arguments = parser.parse_args()
    roofs = machine_profile().roofs
    for name in arguments.models:
        path = resolve(name)
        for threads in arguments.threads:
            model = load_model(path, threads=threads)
            try:
                result = {"model": path.name, "threads": threads, "host": describe_host()}
                result |= overheads(model, arguments.turns)
                tokenizer = Tokenizer.from_metadata(model.metadata)
                settings = Settings()
                with ClockedRun(model, tokenizer, open_counter()) as run:
                    profile = make_profile(
                        model, name, run.turns(settings, show_progress), settings, roofs
                    )
            finally:
                model.close()
            for key in ("overhead_fraction", "unaccounted_fraction", "clock_error_fraction"):
                result[key] = profile[key]
            file = RESULTS / f"clock-{pathlib.Path(name).stem}-{threads}t.json"
            file.write_text(json.dumps(result, indent=1) + "\n")
            clocked, light = result["clocked"], result["light"]
            print(
                f"{name} {threads}t: clocked {clocked['median']:+.2%} "
                f"(standard error {clocked['standard_error']:.2%}; by its stamps "
                f"{profile['overhead_fraction']:.2%}), light {light['median']:+.2%} "
                f"({light['standard_error']:.2%}), "
                f"unaccounted {profile['unaccounted_fraction']:.2%}"
            )


if __name__ == "__main__":
    main()
