"""How far the engine's own choice of threads, tiles and prefill chunk is from the best there is.

    python benchmarks/search.py MODEL

Every combination of thread count, register tiles and prefill chunk runs, in turns, a prompt of 512
tokens through the first quarter of the model's layers, and decode behind it through all; a
combination's time is that of the whole prompt and an answer of 64 tokens. Tiles and chunk do not
come into decode: of that, a turn's median for the thread count is taken. The engine's choice is
what the machine profile says, or the defaults where there is none (`cyclewise profile` makes it).
Ratios are within a turn, and their median counts. Writes `results/search-NAME.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from cyclewise.bench.host import describe_host
from cyclewise.bench.report import show_progress
from cyclewise.clock.tuning import (
    ANSWER_TOKENS,
    CHUNKS,
    PROMPT_TOKENS,
    TILES,
    Tiles,
    decode_seconds,
    prefill_seconds,
)
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.blocks import BLOCK_FORMATS
from cyclewise.machine.kernels.compiler import Compiler, host_compiler
from cyclewise.machine.kernels.matmul import matmul_unit
from cyclewise.machine.machine import Machine, resolve_threads
from cyclewise.machine.profile import load_tuning
from cyclewise.machine.program import Program
from cyclewise.models import load_model
from cyclewise.weights.sources import resolve

RESULTS = pathlib.Path(__file__).parent / "results"
DECODE_STEPS = 32
AS_CHOSEN = "as chosen"


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to run the engine."""

    threads: int
    tiles: str  # of every format; AS_CHOSEN: each format's own
    chunk: int


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one choice in one turn."""

    prefill: float  # of the prompt
    decode: float  # of a token

    @property
    def request(self) -> float:
        return self.prefill + ANSWER_TOKENS * self.decode


MEASURES: dict[str, Callable[[Time], float]] = {
    "request": lambda time: time.request,
    "prefill": lambda time: time.prefill,
    "decode": lambda time: time.decode,
}


def main() -> None:
    """Measures every combination and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file, or a name that `cyclewise run` knows")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    path, most = resolve(arguments.model), available_cpus()

    turns: list[dict[Choice, Time]] = []
    with contextlib.closing(load_model(path, context=2 * PROMPT_TOKENS, threads=most)) as model:
        chosen = Choice(resolve_threads(None), AS_CHOSEN, model.machine.max_batch_tokens)
        programs = {AS_CHOSEN: model.program} | {
            ", ".join(map(str, tiles)): retiled(model.program, tiles)
            for tiles in TILES[host_compiler().target.name]
            if any(tiles != own for own in chosen_tiles(model.program))
        }
        layers = max(1, model.program.num_layers // 4)
        share = layers / model.program.num_layers
        machines = {
            (threads, tiles): (Machine(program, threads), Machine(program.prefix(layers), threads))
            for threads in range(1, most + 1)
            for tiles, program in programs.items()
        }
        for turn in range(arguments.turns + 1):
            prefill: dict[Choice, float] = {}
            decode: dict[int, list[float]] = defaultdict(list)
            for (threads, tiles), (whole, part) in machines.items():
                show_progress(f"turn {turn} of {arguments.turns}: {threads} threads, {tiles}")
                for chunk in CHUNKS if turn else CHUNKS[:1]:
                    choice = Choice(threads, tiles, chunk)
                    prefill[choice] = prefill_seconds(part, PROMPT_TOKENS, chunk) / share
                    decode[threads].append(decode_seconds(whole, DECODE_STEPS, PROMPT_TOKENS))
            medians = {threads: statistics.median(times) for threads, times in decode.items()}
            turns.append({c: Time(time, medians[c.threads]) for c, time in prefill.items()})
        for pair in machines.values():
            for machine in pair:
                machine.close()
    show_progress("")
    report(pathlib.Path(arguments.model).stem, chosen, turns[1:])  # the first warmed up


def block_formats(program: Program) -> list[str]:
    """The quantized formats of a program's matrices."""
    found = {matrix.format for moment in program.moments for matrix in moment.form.matrices}
    return [name for name in BLOCK_FORMATS if name in found]


def chosen_tiles(program: Program) -> list[Tiles]:
    """Of each of its quantized formats, as the engine chose them."""
    tuned, default = load_tuning().token_tiles, host_compiler().target.token_tiles
    return [tuned.get(name, default) for name in block_formats(program)]


def retiled(program: Program, tiles: Tiles) -> Program:
    """The program with matrix kernels of other tiles, in the same memory: its records hold the
    addresses of kernels, and another compiler's take their place.
    """
    ours, theirs = host_compiler(), Compiler(host_compiler().target)
    formats = block_formats(program)
    theirs.load(matmul_unit(name, tiles) for name in formats)
    names = [f"tile_{name}" for name in formats]
    swaps = {ours.address(name): theirs.address(name) for name in names}
    moments = tuple(
        replace(
            moment, record=np.array([swaps.get(x, x) for x in moment.record.tolist()], np.int64)
        )
        for moment in program.moments
    )
    return replace(program, moments=moments, memory=(*program.memory, theirs))


def distance(
    turns: list[dict[Choice, Time]], chosen: Choice, seconds: Callable[[Time], float]
) -> tuple[float, Choice]:
    """The choice's time over that of the best combination, and which that is."""
    ratios = {
        choice: statistics.median(seconds(t[chosen]) / seconds(t[choice]) for t in turns)
        for choice in turns[0]
    }
    best = max(ratios, key=lambda choice: ratios[choice])
    return ratios[best], best


def report(name: str, chosen: Choice, turns: list[dict[Choice, Time]]) -> None:
    """Prints the result and writes it."""
    found = {key: distance(turns, chosen, seconds) for key, seconds in MEASURES.items()}
    rows = {
        choice: [statistics.median(f(turn[choice]) for turn in turns) for f in MEASURES.values()]
        for choice in turns[0]
    }
    result = {
        "model": name,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "turns": len(turns),
        "chosen": asdict(chosen),
        "tuning": asdict(load_tuning()),
        "over_the_best": {
            key: {"ratio": round(ratio, 4), "best": asdict(best)}
            for key, (ratio, best) in found.items()
        },
        "seconds": [
            asdict(choice)
            | {key: round(value, 5) for key, value in zip(MEASURES, medians, strict=True)}
            for choice, medians in rows.items()
        ],
        "host": describe_host(),
    }
    output = RESULTS / f"search-{name}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print("| threads | tiles | chunk | prefill, s | decode, ms a token | request, s |")
    print("|---|---|---|---|---|---|")
    for choice, (request, prefill, decode) in sorted(rows.items(), key=lambda row: row[1]):
        mark = " (chosen)" if choice == chosen else ""
        print(
            f"| {choice.threads}{mark} | {choice.tiles} | {choice.chunk} | {prefill:.3f} | "
            f"{decode * 1e3:.2f} | {request:.3f} |"
        )
    for key, (ratio, _) in found.items():
        print(f"{key}: the engine's choice takes {ratio:.3f} times the best")


if __name__ == "__main__":
    main()
