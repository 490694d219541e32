"""What those who are being answered notice of others.

    python benchmarks/serving.py MODEL.gguf ...

- `long prompt`: answers are being decoded (1, 4 and 8) and a prompt of 4,096 tokens comes in. The
  time between two tokens of an answer meanwhile, over its median in the steps just before.
- `prefix`: the time to the first token of a prompt of 2,000 tokens and 16 more, and of another
  prompt that begins with the same 2,000, three times; the ratio of the two.
- `sampling`: 16 answers are decoded; the share of a step's time in which the machine does nothing,
  because tokens are chosen: greedily, by our defaults and by OpenAI's (temperature 1, no filter).
- `encoding`: one answer is decoded while prompts of about 4,096 tokens are encoded, one every 0.2
  seconds: nowhere, in a thread, or in a process of their own (`text/process.py`). The time between
  two tokens.

Writes `results/serving-NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from cyclewise.bench.bench import token_ids
from cyclewise.bench.host import describe_host
from cyclewise.engine.engine import Engine
from cyclewise.engine.job import Event, Job
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.runner import Runner
from cyclewise.engine.scheduler import Scheduler
from cyclewise.models import Model, load_model
from cyclewise.text.process import TextProcess
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.weights.sources import resolve

RESULTS = pathlib.Path(__file__).parent / "results"
DOCS = pathlib.Path(__file__).parents[1] / "docs"
CONTEXT = 8192
LONG = 4096
PREFIX, REST = 2000, 16
ENCODE_EVERY = 0.2  # seconds


def make_job(model: Model, size: int, seed: int, **values: Any) -> Job:
    """A prompt of random tokens, which nothing ends but `max_tokens`."""
    prompt = token_ids(size, seed, model.config.vocab_size)
    params = SamplingParams(**{"temperature": 0, "max_tokens": None, "seed": seed, **values})
    return Job(prompt, params, salt=b"%d" % seed)


def long_prompt(model: Model, num_answers: int) -> dict[str, float]:
    """Gaps between tokens while a long prompt comes in, over the median of those before."""
    scheduler = Scheduler(Engine(model))
    answers = [make_job(model, 16, seed) for seed in range(num_answers)]
    for job in answers:
        scheduler.submit(job)
    times: list[float] = []

    def step() -> None:
        if any(event.job is answers[0] for event in scheduler.step()):
            times.append(time.perf_counter())

    while len(times) < 64:
        step()
    plain = float(np.median(np.diff(times[-48:])))
    late = make_job(model, LONG, 99, max_tokens=1)
    scheduler.submit(late)
    del times[:-1]
    begin = times[0]
    while late.times.ended is None:
        step()
    for job in answers:
        scheduler.cancel(job)
    scheduler.step()
    ratios = np.diff(times) / plain
    return {
        "answers": num_answers, "plain_ms": 1e3 * plain, "median": float(np.median(ratios)),
        "p90": float(np.quantile(ratios, 0.9)), "p99": float(np.quantile(ratios, 0.99)),
        "max": float(ratios.max()), "steps": len(ratios), "seconds": times[-1] - begin,
    }  # fmt: skip


def prefix(model: Model) -> dict[str, float]:
    """Seconds to the first token of a prompt whose beginning is new, and of one whose is not."""
    scheduler = Scheduler(Engine(model))
    params = SamplingParams(temperature=0, max_tokens=1)

    def wait(prompt: list[int]) -> float:
        job = Job(prompt, params)
        scheduler.submit(job)
        while scheduler.has_work:
            scheduler.step()
        assert job.times.first_token is not None and job.times.queued is not None
        return job.times.first_token - job.times.queued

    rows = []
    for seed in range(3):
        begin, *ends = (
            token_ids(size, 10 * seed + i, model.config.vocab_size)
            for i, size in enumerate((PREFIX, REST, REST))
        )
        rows.append([wait([*begin, *end]) for end in ends])
    first, again = np.array(rows).T
    ratios = first / again
    return {
        "first_ms": 1e3 * float(np.median(first)), "again_ms": 1e3 * float(np.median(again)),
        "ratio": float(np.median(ratios)), "least": float(ratios.min()),
        "most": float(ratios.max()),
    }  # fmt: skip


def sampling(model: Model, num_answers: int, **values: Any) -> dict[str, float]:
    """Milliseconds of a step within the machine, and without it."""
    engine = Engine(model)
    scheduler = Scheduler(engine)
    inner = model.machine.step
    within = 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal within
        begin = time.perf_counter()
        found = inner(*arguments)
        within = time.perf_counter() - begin
        return found

    for seed in range(num_answers):
        scheduler.submit(make_job(model, 16, seed, max_tokens=48, **values))
    rows = []
    model.machine.step = timed
    try:
        while scheduler.has_work:
            begin = time.perf_counter()
            if len(scheduler.step()) == num_answers:
                rows.append((within, time.perf_counter() - begin - within))
    finally:
        del model.machine.step
    inside, outside = np.median(np.array(rows), axis=0)
    return {"machine_ms": 1e3 * inside, "rest_ms": 1e3 * outside, "share": outside / inside}


def some_text(num_words: int, seed: int) -> str:
    words = " ".join(path.read_text() for path in sorted(DOCS.glob("*.md"))).split(" ")
    return " ".join(random.Random(seed).choices(words, k=num_words))


def encoding(model: Model, where: str, seconds: float) -> dict[str, float]:
    """Gaps between the tokens of an answer while prompts are encoded."""
    tokenizer = Tokenizer.from_metadata(model.metadata)
    num_words = LONG * 100 // len(tokenizer.encode(some_text(100, 0)))
    times: list[float] = []
    process = TextProcess(model.path)
    runner = Runner(Engine(model))

    def listen(event: Event) -> None:
        times.append(time.perf_counter())

    try:
        process.encode("it is ready when it has answered").result()
        job = make_job(model, 16, 0)
        runner.submit(job, listen)
        end, seed = time.perf_counter() + seconds, 0
        while (now := time.perf_counter()) < end:
            seed += 1
            text = some_text(num_words, seed)
            if where == "thread":
                thread = threading.Thread(target=tokenizer.encode, args=(text,))
                thread.start()
                thread.join()
            elif where == "process":
                process.encode(text).result()
            time.sleep(max(0.0, now + ENCODE_EVERY - time.perf_counter()))
        runner.cancel(job)
    finally:
        runner.close()
        process.close()
    gaps = 1e3 * np.diff(times[8:])
    return {
        "median_ms": float(np.median(gaps)), "p90_ms": float(np.quantile(gaps, 0.9)),
        "p99_ms": float(np.quantile(gaps, 0.99)), "max_ms": float(gaps.max()), "gaps": len(gaps),
    }  # fmt: skip


def measurements(
    model: Model, answers: list[int], seconds: float
) -> Iterator[tuple[str, dict[str, float]]]:
    for num_answers in answers:
        yield f"long prompt beside {num_answers}", long_prompt(model, num_answers)
    yield "prefix", prefix(model)
    yield "sampling greedy", sampling(model, 16)
    temperature = SamplingParams().temperature
    yield "sampling by default", sampling(model, 16, temperature=temperature)
    openai = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
    yield "sampling by OpenAI's defaults", sampling(model, 16, **openai)
    for where in ("nowhere", "thread", "process"):
        yield f"encoding {where}", encoding(model, where, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--answers", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each way of encoding")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.models:
        path = resolve(name)
        model = load_model(path, context=CONTEXT, sequences=4)
        found: dict[str, dict[str, float]] = {}
        try:
            for what, measured in measurements(model, arguments.answers, arguments.seconds):
                shown = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
                print(f"{path.name}, {what}: {shown}", flush=True)
                found[what] = measured
        finally:
            model.close()
        result = {"model": path.name, "found": found, "host": describe_host()}
        file = RESULTS / f"serving-{path.stem}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
