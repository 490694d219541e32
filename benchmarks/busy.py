"""Decode speed on a machine that is not ours alone, beside llama.cpp's.

    python benchmarks/busy.py MODEL.gguf

Conditions: quiet with 1, 2 and 4 threads; then, with 2 threads, a process that never rests pinned
to one core, and one pinned to each of two. Every round goes through all conditions, ours and the
peer's in turn, and each share is of the quiet speed with 2 threads in the same round. Linux only.
Writes `results/busy-NAME.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cyclewise.bench.bench import HANDOVER_SECONDS, OurEngine, token_ids
from cyclewise.bench.host import describe_host
from cyclewise.bench.peers import Peer
from cyclewise.bench.report import show_progress
from cyclewise.models import load_model

RESULTS = pathlib.Path(__file__).parent / "results"
THREADS = (1, 2, 4)
# It ends by itself, lest it should outlive this program.
BUSY = "import os, sys, time; os.sched_setaffinity(0, {int(sys.argv[1])}); end = time.time() + 60"
BUSY += "\nwhile time.time() < end: pass"


@dataclass(frozen=True, slots=True)
class Condition:
    """How many threads run, beside how many busy processes."""

    threads: int
    busy: int

    def __str__(self) -> str:
        beside = "quiet" if not self.busy else f"{self.busy} busy"
        return f"{beside}, {self.threads} threads" if self.threads > 1 else f"{beside}, 1 thread"


QUIET = Condition(2, 0)
CONDITIONS = (Condition(1, 0), QUIET, Condition(4, 0), Condition(2, 1), Condition(2, 2))


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep that many cores busy, one process pinned to each."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    started = [subprocess.Popen([sys.executable, "-c", BUSY, str(core)]) for core in cores]
    try:
        if started:
            time.sleep(0.3)  # until they spin
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    """Measures every condition and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--generate-tokens", type=int, default=64)
    arguments = parser.parse_args()
    path, count = arguments.model, arguments.generate_tokens

    speeds: dict[str, dict[str, list[float]]] = {
        name: {str(condition): [] for condition in CONDITIONS}
        for name in ("llama.cpp", "cyclewise")
    }
    with contextlib.ExitStack() as stack:
        engines: dict[str, dict[int, OurEngine | Peer]] = {"llama.cpp": {}, "cyclewise": {}}
        vocab_size = 0
        for threads in THREADS:
            show_progress(f"loading with {threads} threads")
            peer = Peer("llama.cpp", path, num_threads=threads, context=count)
            engines["llama.cpp"][threads] = stack.enter_context(peer)
            model = load_model(path, context=max(count, 64), threads=threads)
            stack.callback(model.close)
            engines["cyclewise"][threads] = OurEngine(model)
            vocab_size = model.config.vocab_size
        for index in range(arguments.rounds + 1):
            tokens = token_ids(count, index, vocab_size)
            for condition in CONDITIONS:
                show_progress(f"round {index} of {arguments.rounds}: {condition}")
                with busy(condition.busy):
                    for name, by_threads in engines.items():
                        time.sleep(HANDOVER_SECONDS)
                        seconds = by_threads[condition.threads].decode([], tokens)
                        if index:  # round 0 warms up
                            speeds[name][str(condition)].append(count / seconds)
    show_progress("")
    shares = {
        name: {condition: share(values, found[str(QUIET)]) for condition, values in found.items()}
        for name, found in speeds.items()
    }
    result = {
        "model": path.name,
        "rounds": arguments.rounds,
        "decode_tokens_per_second": speeds,
        "share_of_quiet": shares,
        "host": describe_host(),
    }
    output = RESULTS / f"busy-{path.stem}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print("| decode, tokens/s | cyclewise | of quiet | llama.cpp | of quiet |")
    print("|---|---|---|---|---|")
    for condition in map(str, CONDITIONS):
        cells = [
            f"{statistics.median(speeds[name][condition]):.1f} | {shares[name][condition]:.0%}"
            for name in ("cyclewise", "llama.cpp")
        ]
        print(f"| {condition} | {' | '.join(cells)} |")


def share(values: list[float], quiet: list[float]) -> float:
    """The median over rounds of a speed over the quiet speed in the same round."""
    return statistics.median(v / q for v, q in zip(values, quiet, strict=True))


if __name__ == "__main__":
    main()
