"""The README's table: every model, with 1 and 2 threads, in turns with every peer.

    python benchmarks/table.py MODEL.gguf ... --against llama.cpp openvino

Writes `results/bench-NAME-Nt.json` for each run, and prints the table of all such results that lie
there, so that models can be measured at different hours. A peer that refuses a file is left out of
its row. Without models, it only prints.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from cyclewise.bench.bench import run_bench
from cyclewise.bench.peers import PEERS, Peer, find_interpreter
from cyclewise.bench.report import NOISY, show_progress
from cyclewise.errors import PeerError
from cyclewise.models import load_model

RESULTS = pathlib.Path(__file__).parent / "results"


def willing(peers: list[str], path: pathlib.Path) -> list[str]:
    """Those of the peers that load the file; a peer that is not installed is an error."""
    found = []
    for name in peers:
        find_interpreter(PEERS[name])
        try:
            Peer(name, path, num_threads=1, context=64).close()
        except PeerError as error:
            print(error, file=sys.stderr)
        else:
            found.append(name)
    return found


def measure(path: pathlib.Path, threads: int, peers: list[str], repeats: int) -> dict[str, Any]:
    """One run; its JSON."""
    model = load_model(path, context=1024, threads=threads)
    try:
        return run_bench(model, repeats=repeats, against=peers, progress=show_progress).as_dict()
    finally:
        model.close()


def row(result: dict[str, Any]) -> str:
    """One line of the table."""

    def cell(phase: str) -> str:
        ours = f"**{result[f'{phase}_tokens_per_second']['median']:.0f}**"
        ratios = [
            f"{peer[f'{phase}_ratio']:.2f}x {peer['name']}'s "
            f"{peer[f'{phase}_tokens_per_second']['median']:.0f}"
            for peer in result["peers"]
        ]
        return ", ".join([ours, *ratios])

    share = f"{result['decode_fraction_of_bandwidth']:.0%}"
    name = result["model"].removesuffix(".gguf")
    if (result["others_cpu_share"] or 0) > NOISY:
        name += " (noisy)"
    return f"| {name} | {result['threads']} | {cell('prefill')} | {cell('decode')} | {share} |"


def main() -> None:
    """Measures what is asked for, then prints the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=pathlib.Path, nargs="*")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--against", nargs="*", choices=PEERS, default=["llama.cpp"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for path in arguments.models:
        peers = willing(arguments.against, path)
        for threads in arguments.threads:
            result = measure(path, threads, peers, arguments.repeats)
            output = RESULTS / f"bench-{path.stem}-{threads}t.json"
            output.write_text(json.dumps(result, indent=2) + "\n")
    print("| model | threads | prefill 512, tokens/s | decode 64, tokens/s | of read bandwidth |")
    print("|---|---|---|---|---|")
    for output in sorted(RESULTS.glob("bench-*.json")):
        print(row(json.loads(output.read_text())))


if __name__ == "__main__":
    main()
