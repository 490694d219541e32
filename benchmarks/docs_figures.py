"""Draws the figures of `docs/clock.md` again, on this machine: `make docs-figures`.

Runs the project's own commands and puts what they print between the document's marks,
`<!-- figure: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from cyclewise.machine.names import collapsed

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "clock.md"
CLASSES = ("matmul", "activation", "memory", "host")


def cyclewise(*arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "cyclewise", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def drawn(what: str, command: str) -> str:
    return f"{what}\n\n`{command}`"


def report(profile: dict[str, Any]) -> str:
    """The terminal's report of the profile, as plain text."""
    import io

    from rich.console import Console

    from cyclewise.clock.report import WIDTH, print_profile

    out = io.StringIO()
    print_profile(profile, Console(file=out, width=WIDTH, highlight=False))
    return f"```\n{out.getvalue().rstrip()}\n```"


def accounts(profile: dict[str, Any]) -> str:
    """The books of decode: shares of each thread's wall time."""
    parts = ("moments", "waiting", "python", "unaccounted")
    rows = [
        [f"{account['phase']}, thread {account['thread']}"]
        + [f"{account[part] / account['wall']:.2%}" for part in parts]
        + [f"{account['wall'] / 1e6:.1f} M"]
        for account in profile["accounts"]
    ]
    return table(["", *parts, "cycles"], rows)


def roofs(profile: dict[str, Any]) -> str:
    """What the hardware can do."""
    found = profile["roofs"]
    threads = [point[0] for point in found["levels"][-1]["bytes_per_second"]]
    rows = [
        [f"read from {level['name']}"]
        + [f"{dict(level['bytes_per_second'])[t] / 1e9:.1f} GB/s" for t in threads]
        for level in found["levels"]
    ] + [
        [f"{found['instructions'][unit]} ({unit})"]
        + [f"{dict(points)[t] / 1e9:.0f} Gop/s" for t in threads]
        for unit, points in found["operations_per_second"].items()
    ]
    return table(["", *(f"{t} thread{'s' * (t > 1)}" for t in threads)], rows)


def balance(profile: dict[str, Any]) -> str:
    """Operations and bytes of both phases beside what the machine needs of them."""
    rows = []
    for phase, unit in (("decode", "a token"), ("prefill", "the prompt")):
        matrices = [m for m in profile["moments"] if m["phase"] == phase and m["class"] == "matmul"]
        operations = sum(m["operations"] for m in matrices)
        weights = sum(m["weight_bytes"] for m in matrices)
        bound = {m["bound"] for m in matrices if m["limit_cycles"]}
        rows.append(
            [
                f"{phase}, {unit}", f"{operations / 1e9:.2f} G", f"{weights / 1e6:.1f} MB",
                f"{operations / weights:.1f}", " and ".join(sorted(bound)),
            ]
        )  # fmt: skip
    found, threads = profile["roofs"], profile["settings"]["threads"]
    dot = dict(map(tuple, found["operations_per_second"]["dot"]))[threads]
    bandwidth = found["memory_bytes_per_second_within_run"]
    machine = ["this machine, in the same time", "", "", f"{dot / bandwidth:.1f}", ""]
    head = ["matrix moments of", "operations", "weights", "operations a byte", "limited by"]
    return table(head, [*rows, machine])


def classes(profile: dict[str, Any]) -> str:
    """Cycles by class in both phases."""
    rows = []
    for kind in CLASSES:
        row = [kind]
        for phase in ("decode", "prefill"):
            chosen = [m for m in profile["moments"] if m["phase"] == phase and m["class"] == kind]
            cycles = sum(m["cycles"] for m in chosen)
            limit = sum(m["limit_cycles"] or 0 for m in chosen)
            spent = cycles + sum(m["waiting_cycles"] for m in chosen)
            row += [
                f"{cycles / 1e6:.2f} M", f"{spent / profile[phase]['cycles']:.1%}",
                f"{limit / spent:.0%}" if limit else "",
            ]  # fmt: skip
        rows.append(row)
    row = ["waiting, in all of these"]
    for phase in ("decode", "prefill"):
        waiting = sum(m["waiting_cycles"] for m in profile["moments"] if m["phase"] == phase)
        row += [f"{waiting / 1e6:.2f} M", f"{waiting / profile[phase]['cycles']:.1%}", ""]
    head = ["class", "decode, cycles a token", "share", "of limit"]
    return table([*head, "prefill, cycles", "share", "of limit"], [*rows, row])


def growth(profile: dict[str, Any]) -> str:
    """The laws, the largest first; each with its error on points held out."""
    names = {collapsed(m["name"]) for m in profile["moments"]} | {"total"}
    rows = [
        [law["name"], law["phase"], law["variable"], law["law"], f"{law['median_error']:.1%}"]
        for law in profile["growth"]
        if law["name"] in names
    ]
    head = ["moment", "phase", "n is", "cycles", "error on held-out points"]
    return table(head, rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        diagrams = pathlib.Path(folder) / "diagrams.md"
        printed = cyclewise("profile", "smollm2", "--json", "--mermaid", str(diagrams))
        blocks = re.findall(r"```mermaid\n.*?```", diagrams.read_text(), re.DOTALL)
    program, token, layer = blocks
    profile = json.loads(printed)
    command = "cyclewise profile smollm2"
    figures = {
        "program": drawn(program, f"{command} --mermaid diagrams.md"),
        "token": drawn(token, f"{command} --mermaid diagrams.md"),
        "layer": drawn(layer, f"{command} --mermaid diagrams.md"),
        "report": drawn(report(profile), command),
        "accounts": drawn(accounts(profile), f"{command} --json"),
        "roofs": drawn(roofs(profile), f"{command} --json"),
        "balance": drawn(balance(profile), f"{command} --json"),
        "classes": drawn(classes(profile), f"{command} --json"),
        "growth": drawn(growth(profile), f"{command} --json"),
    }
    text = DOCUMENT.read_text()
    for name, figure in figures.items():
        mark = f"<!-- figure: {name} -->"
        before, rest = text.split(mark)
        text = f"{before}{mark}\n\n{figure}\n\n{rest[rest.index('<!-- end -->') :]}"
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
