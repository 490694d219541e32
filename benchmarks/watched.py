"""What it costs to say where the time of each token went.

    python benchmarks/watched.py MODEL.gguf [--rounds 11]

Answers with `timings_per_token` and without in turns, through the engine's thread and no HTTP; then
the thread time that a step takes of the engine's thread to be clocked, and of the server's to be
explained.
"""

from __future__ import annotations

import argparse
import threading
import time
from itertools import pairwise
from statistics import median

from cyclewise.clock.live import LiveClock
from cyclewise.engine.engine import Engine
from cyclewise.engine.job import Event, Job
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.runner import Runner
from cyclewise.models import load_model

TOKENS = 96
PROMPT = list(range(100, 140))


def answer(runner: Runner, watched: bool) -> tuple[float, list[int]]:
    """Seconds a token, and the tokens."""
    ended, times, tokens = threading.Event(), [], []

    def listen(event: Event) -> None:
        times.append(event.time)
        tokens.extend(event.token_ids)
        if event.is_last:
            ended.set()

    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    runner.submit(Job(PROMPT, params, watched=watched), listen)
    ended.wait()
    return median(after - before for before, after in pairwise(times)), tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    model = load_model(arguments.model, sequences=2)
    clock = LiveClock(model.machine)
    clock.prepare()
    runner = Runner(Engine(model), watch=clock)
    ratios = []
    for _ in range(arguments.rounds):
        (plain, tokens), (watched, same) = answer(runner, False), answer(runner, True)
        assert tokens == same
        ratios.append(watched / plain)
    low, high = min(ratios), max(ratios)
    print(f"watched over plain: median {median(ratios):.3f}, {low:.2f} to {high:.2f}")
    runner.close()
    engine, copying, explaining = Engine(model), [], []
    sequence = engine.new_sequence()
    engine.evaluate(sequence, PROMPT)
    for token in range(TOKENS):
        begin = time.thread_time()
        clock.turn(True)
        turned = time.thread_time() - begin
        engine.evaluate(sequence, [100 + token])
        begin = time.thread_time()
        clocked = clock.read()
        copying.append(turned + time.thread_time() - begin)
        if clocked is not None:
            begin = time.thread_time()
            clock.explain([clocked])
            explaining.append(time.thread_time() - begin)
    print(f"to clock a step {1e6 * median(copying):.0f} us, to explain it "
          f"{1e6 * median(explaining):.0f} us")  # fmt: skip
    model.close()


if __name__ == "__main__":
    main()
