"""How long a process takes from its start to the first token of a ten-token prompt.

    python benchmarks/start.py qwen.gguf

Whole processes of `cyclewise run`, in turns with an empty cache (kernels are compiled, weights
packed), with compiled kernels alone, and with both; the clock stops at the first byte on standard
output. The model's file itself is in the page cache. Then the stages of a second start, marked in
processes of their own. Writes `results/start-NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

PROMPT = "The quick brown fox jumps over the lazy dog and"
CACHES = ("empty", "kernels", "full")
RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--stages", type=float, metavar="START", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages is not None:
        print(json.dumps(stages(options.model, options.stages)))
        return
    from cyclewise.bench.host import describe_host

    seconds: dict[str, list[float]] = {name: [] for name in options.caches}
    marks: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        full = pathlib.Path(folder, "full")
        first_token_seconds(options.model, full)
        for _ in range(options.rounds):
            for name in options.caches:
                cache = pathlib.Path(folder, "empty") if name == "empty" else full
                if name == "kernels":
                    shutil.rmtree(full / "packed", ignore_errors=True)
                seconds[name].append(first_token_seconds(options.model, cache))
                shutil.rmtree(pathlib.Path(folder, "empty"), ignore_errors=True)
            marks.append(stage_seconds(options.model, full))
        result = checked(options.model, full)
    found = {
        "model": pathlib.Path(options.model).name,
        "prompt_tokens": result["prompt_tokens"],
        "rounds": options.rounds,
        "seconds_to_first_token": {name: spread(values) for name, values in seconds.items()},
        "stages_of_a_full_cache": {name: spread([m[name] for m in marks]) for name in marks[0]},
        "host": describe_host(),
    }
    for title in ("seconds_to_first_token", "stages_of_a_full_cache"):
        for name, value in found[title].items():
            print(f"{name:12} {value['median']:7.3f} s ({value['min']:.3f} to {value['max']:.3f})")
        print()
    path = RESULTS / f"start-{pathlib.Path(options.model).stem}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def command(model: str, *more: str) -> list[str]:
    options = ["--raw", "--temperature", "0", "--max-tokens", "1", *more, PROMPT]
    return [sys.executable, "-m", "cyclewise", "run", model, *options]


def environment(cache: pathlib.Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"CYCLEWISE_CACHE": str(cache)}


def first_token_seconds(model: str, cache: pathlib.Path) -> float:
    """From before the process is there to the first byte that it writes."""
    start = time.perf_counter()
    with subprocess.Popen(
        command(model), env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not byte:
        raise SystemExit(f"{' '.join(command(model))} ended with {process.returncode}")
    return seconds


def checked(model: str, cache: pathlib.Path) -> dict[str, Any]:
    """The result of the same command, in JSON."""
    told = subprocess.run(
        command(model, "--json"), env=environment(cache), stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def stage_seconds(model: str, cache: pathlib.Path) -> dict[str, float]:
    start = time.monotonic()
    told = subprocess.run(
        [sys.executable, __file__, model, "--stages", str(start)],
        env=environment(cache),
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(told.stdout)
    return found


def stages(model: str, start: float) -> dict[str, float]:
    """Seconds of each stage of a process that began at `start` of the monotonic clock."""
    began = time.monotonic() - start
    import cyclewise.cli
    import cyclewise.engine.generation
    import cyclewise.engine.speculation
    import cyclewise.machine.builder
    import cyclewise.machine.machine
    import cyclewise.text.answer
    import cyclewise.text.tokenizer
    from cyclewise import LLM, SamplingParams, models
    from cyclewise.machine import packed, packing
    from cyclewise.weights import source

    imported = time.monotonic() - start
    spent: dict[str, float] = {}

    def clocked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            begin = time.monotonic()
            try:
                return work(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.monotonic() - begin

        return run

    tokenizer = cyclewise.text.tokenizer.Tokenizer
    for name, owner, attribute in (
        ("header", source, "open_source"),
        ("kernels", cyclewise.machine.builder, "load_kernels"),
        ("weights", packing, "open_arena"),
        ("load", models, "load_model"),
        ("tokenizer", tokenizer, "from_metadata"),
    ):
        setattr(owner, attribute, clocked(name, getattr(owner, attribute)))
    assert packed.open_arena is not packing.open_arena
    with LLM(model) as llm:
        loaded = time.monotonic() - start
        next(llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=1)))
        spoken = time.monotonic() - start
    inside = spent["header"] + spent["kernels"] + spent["weights"]
    return {
        "interpreter": began,
        "imports": imported - began,
        "header": spent["header"],
        "kernels": spent["kernels"],
        "weights": spent["weights"],
        "program": spent["load"] - inside,
        "tokenizer": spent["tokenizer"],
        "rest": loaded - imported - spent["load"] - spent["tokenizer"],
        "first token": spoken - loaded,
    }


if __name__ == "__main__":
    main()
