"""What the clock costs, and what it leaves unaccounted.

    python benchmarks/clock.py smollm2 MODEL.gguf ...

Of every three steps of decode one is stamped; the median of its time over that of its neighbours,
less one, is what the clock costs. The light clock stamps one step in sixteen, so its cost is
derived from that. Then a profile of each model, for the share of time that belongs nowhere. Writes
`results/clock-NAME-Nt.json`.
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
TOKENS = 48
EVERY_THIRD = 3


def overheads(model: Model, turns: int) -> dict[str, Any]:
    """What stamping adds to a step of decode, as a share.

    Of three neighbouring steps the first is stamped: they see the same machine, and every third
    step is an odd one as often as an even one.
    """
    engine, machine, counter = Engine(model), model.machine, open_counter()
    stamps = Stamps(
        len(machine.program.moments), machine.num_threads, TOKENS // EVERY_THIRD, EVERY_THIRD
    )
    machine.clock(stamps)
    ratios = []
    for turn in range(turns + 1):
        show_progress(f"turn {turn} of {turns}")
        sequence, seconds = engine.new_sequence(), []
        for token_id in token_ids(TOKENS, turn, model.config.vocab_size):
            start = time.perf_counter()
            engine.evaluate(sequence, [token_id])
            seconds.append(time.perf_counter() - start)
        engine.free(sequence)
        machine.settle()
        assert stamps.count == TOKENS // EVERY_THIRD
        stamps.clear()
        if turn:  # the first one warms up
            thirds = zip(*(seconds[i::EVERY_THIRD] for i in range(EVERY_THIRD)), strict=True)
            ratios += [clocked / ((a + b) / 2) - 1 for clocked, a, b in thirds]
    show_progress("")
    light = LightClock(machine, counter)
    calls = 100_000
    start = time.perf_counter()
    for _ in range(calls):
        light._stamps.take()
    python = (time.perf_counter() - start) / calls
    light.close()
    low, middle, high = statistics.quantiles(ratios, n=4)
    # Of independent values, the median's standard error is 1.25 times that of the mean.
    error = 1.25 * (high - low) / 1.349 / len(ratios) ** 0.5
    clocked = {"median": middle, "quartiles": [low, high], "standard_error": error}
    share = python / statistics.median(seconds)
    return {
        "steps": len(ratios),
        "clocked": clocked,
        "light_every": EVERY,
        "light": {"derived": middle / EVERY + share, "standard_error": error / EVERY},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=40)
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
                f"{profile['overhead_fraction']:.2%}), light {light['derived']:+.3%}, "
                f"unaccounted {profile['unaccounted_fraction']:.2%}"
            )


if __name__ == "__main__":
    main()
