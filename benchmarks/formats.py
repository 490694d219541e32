"""The table of formats and threads against llama.cpp, `docs/benchmarks.md`: one command.

    python benchmarks/formats.py [FOLDER] [--formats Q4_K_M ...] [--threads 1 2] [--again]
    python benchmarks/formats.py --only-write

FOLDER keeps the wide random Llama of `make_files.py`, which is made there where it is missing.
Each format and number of threads takes under a minute and is one file,
`results/wide-FORMAT-Nt.json`; one that is there is not measured again unless `--again` is given, so
that a run which was stopped goes on where it was. The document is written from those files alone.
Without llama-cpp-python nothing is measured against it, and a sentence says how to install it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from make_files import FORMATS, make_wide
from table import measure

from cyclewise.bench.peers import PEERS, find_interpreter
from cyclewise.bench.report import NOISY
from cyclewise.errors import PeerError
from cyclewise.paths import cache_dir

ROOT = pathlib.Path(__file__).parent
RESULTS, DOCUMENT = ROOT / "results", ROOT.parent / "docs" / "benchmarks.md"
HEAD = """# Formats and threads against llama.cpp

Written by `make bench` from `benchmarks/results/wide-*.json`, which hold every figure, spread,
version and commit. A Llama of random weights, 2,048 wide with 8 layers and a vocabulary of 32,000,
quantized to each format by llama.cpp itself. Prefill of 512 tokens and decode of 64 from an empty
context, tokens/s; a ratio is the median over pairs of neighbouring turns, its least and most in
brackets. The share is of the memory's read bandwidth, read within the pair. llama.cpp was compiled
for the processor it ran on: where that has AVX2, FMA, F16C and BMI2 and no wider vectors, the
comparison is the one of AVX2 alone.
"""


def rows() -> list[str]:
    """The document's table, of all results that lie there."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("wide-*.json"))]
    known = [name.lower() for name in FORMATS]
    results.sort(key=lambda r: (known.index(pathlib.Path(r["model"]).stem), r["threads"]))
    lines = [
        "| format | threads | prefill | x llama.cpp | decode | x llama.cpp | share | processor | commit |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        name = pathlib.Path(result["model"]).stem.upper()
        noisy = " (noisy)" if (result["others_cpu_share"] or 0) > NOISY else ""
        host = result["host"]
        lines.append(
            f"| {name}{noisy} | {result['threads']} | {cells(result, 'prefill')} "
            f"| {cells(result, 'decode')} | {result['decode_fraction_of_bandwidth']:.0%} "
            f"| {host['cpu']}, {host['target']} | {host['commit']} |"
        )
    return lines


def cells(result: dict[str, Any], phase: str) -> str:
    """Our speed, and its ratio to the peer's."""
    ours = f"{result[f'{phase}_tokens_per_second']['median']:.0f}"
    if not result["peers"]:
        return f"{ours} | "
    spread = result["peers"][0][f"{phase}_ratio_spread"]
    return f"{ours} | {spread['median']:.2f} [{spread['min']:.2f}, {spread['max']:.2f}]"


def main() -> None:
    """Measures what is missing, then writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=cache_dir() / "wide")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only-write", action="store_true")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    cases = [(name, count) for name in arguments.formats for count in arguments.threads]
    for name, threads in () if arguments.only_write else cases:
        output = RESULTS / f"wide-{name.lower()}-{threads}t.json"
        if output.exists() and not arguments.again:
            continue
        try:
            find_interpreter(PEERS["llama.cpp"])
        except PeerError as error:
            sys.exit(
                f"{error} Its quantizer makes the files, too; `cyclewise bench smollm2` measures "
                "Cyclewise alone."
            )
        path = arguments.folder / f"{name.lower()}.gguf"
        if not path.exists():
            arguments.folder.mkdir(parents=True, exist_ok=True)
            make_wide(arguments.folder, [name])
        result = measure(path, threads, ["llama.cpp"], arguments.repeats)
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name} {threads}t: {cells(result, 'prefill')} | {cells(result, 'decode')}")
    _, mark, behind = DOCUMENT.read_text().partition("\n## ")  # sections written by hand
    DOCUMENT.write_text(HEAD + "\n" + "\n".join(rows()) + "\n" + mark + behind)


if __name__ == "__main__":
    main()
