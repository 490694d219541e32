"""Diagrams that Markdown can hold: the program as a flowchart, and one token as Gantt charts.

`cyclewise profile --mermaid` hands over the profile. Three diagrams come out: the program of decode
with its layers as one, cycles and share of limit in each node; the token in time, layer by
layer; and one layer, thread by thread. Names may be hostile: of them only what cannot be taken for
syntax gets into a diagram.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclewise.machine.names import collapsed, layer_of

Profile = Mapping[str, Any]

DIAGRAM_SUFFIXES = (".mmd", ".mermaid")
"""Files of one diagram and nothing else; all others are Markdown."""
MAX_THREADS = 4
"""Threads of the last diagram."""
MAX_NAME = 60
"""Characters of a name."""
LEAST_WAIT = 0.004
"""Shorter waits, as a share of the layer, are not drawn."""
_BEFORE = ("template", "tokenizing", "scheduling")
"""Stages that come before the program; the others come after it."""
# Fills are light and texts dark, so that they can be read on any background.
_STYLES = {
    "matmul": "fill:#d5e3fb,stroke:#2c5fb8,color:#14233f",
    "activation": "fill:#d0f0e5,stroke:#0c8468,color:#0d3328",
    "memory": "fill:#fae6c4,stroke:#b0700f,color:#3d2705",
    "host": "fill:#ecdcf5,stroke:#8b56a6,color:#321a3f",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """A moment, its layers together."""

    name: str
    kind: str
    count: int
    cycles: float
    """Working and waiting, of all layers."""
    limit_fraction: float | None


def write_mermaid(profile: Profile, path: str | Path) -> tuple[Path, ...]:
    """Writes the diagrams; the files that were written.

    Markdown holds all of them. A file for Mermaid alone (`.mmd`, `.mermaid`) can hold but one
    diagram, so it gets the flowchart, and the Gantt charts go beside it: for `a.mmd`,
    `a.token.mmd` and `a.layer.mmd`.

    Raises OSError if a file cannot be written.
    """
    path = Path(path)
    if path.suffix not in DIAGRAM_SUFFIXES:
        path.write_text(mermaid(profile), encoding="utf-8")
        return (path,)
    diagrams = _diagrams(profile)
    files = {
        part: path if part == "program" else path.with_suffix(f".{part}{path.suffix}")
        for part in diagrams
    }
    beside = [_plain(file.name) for part, file in files.items() if part != "program"]
    if beside:
        diagrams["program"] += f"  %% Gantt charts of one token: {', '.join(beside)}\n"
    for part, file in files.items():
        file.write_text(diagrams[part], encoding="utf-8")
    return tuple(files.values())


def mermaid(profile: Profile) -> str:
    """Markdown with all diagrams."""
    return "\n".join(f"```mermaid\n{text}```\n" for text in _diagrams(profile).values())


def _diagrams(profile: Profile) -> dict[str, str]:
    found = {"program": flowchart(profile)}
    names = [m["name"] for m in _decode(profile) if m["class"] != "host"]
    lanes = (profile.get("timeline") or {}).get("threads") or []
    if lanes and all(len(lane) == len(names) for lane in lanes):
        found["token"] = token_gantt(names, lanes)
        if any(layer_of(name) is not None for name in names):
            found["layer"] = layer_gantt(names, lanes)
    return found


def flowchart(profile: Profile) -> str:
    """The program of decode as a Mermaid flowchart."""
    moments = _decode(profile)
    total = profile["decode"]["cycles"]
    kinds = _kinds(moments)
    layers = max(kind.count for kind in kinds)
    stages = [kind for kind in kinds if kind.kind == "host"]
    program = [kind for kind in kinds if kind.kind != "host"]
    first = [stage for stage in stages if stage.name in _BEFORE]
    last = [stage for stage in stages if stage.name not in _BEFORE]
    share = profile["limit_fraction"]
    title = f"{_plain(profile['model']['name'])}: {_cycles(total)} a step of decode" + (
        "" if share is None else f", {share:.0%} of the limit"
    )
    ids = {kind.name: f"m{index}" for index, kind in enumerate([*first, *program, *last])}
    lines = ["---", f'title: "{title}"', "---", "flowchart TB"]
    inside = False
    for kind in [*first, *program, *last]:
        in_layer = kind.name.startswith("layers.*.")
        if in_layer and not inside:
            lines.append(f'  subgraph layer["a layer, x{layers}"]')
        if inside and not in_layer:
            lines.append("  end")
        inside = in_layer
        lines.append(f"  {'  ' if inside else ''}{ids[kind.name]}{_node(kind, total)}")
    if inside:
        lines.append("  end")
    lines.append("  " + " --> ".join(ids.values()))
    lines += [f"  classDef {name} {style}" for name, style in _STYLES.items()]
    return "\n".join(lines) + "\n"


def token_gantt(names: Sequence[str], lanes: Sequence[Sequence[Sequence[float]]]) -> str:
    """One token in time: what comes before the layers, each layer, and what comes after them.

    Args:
        names: of the program's moments.
        lanes: (threads, moments, 3), the profile's timeline: start, work and waiting in cycles.
    """
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        layer = layer_of(name)
        group = name.split(".")[0] if layer is None else f"layer {layer}"
        groups.setdefault(group, []).append(index)
    spans = {}
    for group, indices in groups.items():
        pieces = [lane[index] for lane in lanes for index in indices if any(lane[index])]
        if pieces:
            spans[group] = (min(p[0] for p in pieces), max(sum(p) for p in pieces))
    axis = _Axis(max(end for _, end in spans.values()))
    lines = axis.head("One token of decode, in cycles")
    lines.append("  section token")
    lines += [axis.task(group, "active", *span) for group, span in spans.items()]
    return "\n".join(lines) + "\n"


def layer_gantt(names: Sequence[str], lanes: Sequence[Sequence[Sequence[float]]]) -> str:
    """The middle layer of one token in time, thread by thread; arguments as of `token_gantt`."""
    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    middle = max(layers) // 2
    rows = [index for index, name in enumerate(names) if layer_of(name) == middle]
    shown = lanes[:MAX_THREADS]
    pieces = [lane[row] for lane in shown for row in rows if any(lane[row])]
    start = min(piece[0] for piece in pieces)
    axis = _Axis(max(sum(piece) for piece in pieces) - start)
    lines = axis.head(f"Layer {middle} of that token, in cycles from its start")
    for thread, lane in enumerate(shown):
        lines.append(f"  section thread {thread}")
        for row in rows:
            begun, work, wait = lane[row]
            if not (work or wait):
                continue
            begun -= start
            name = names[row].split(".", 2)[2]
            lines.append(axis.task(name, "active", begun, begun + work))
            if wait > LEAST_WAIT * axis.span:
                lines.append(axis.task("waiting", "crit", begun + work, begun + work + wait))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class _Axis:
    """A Gantt chart's axis of cycles. Mermaid knows only dates: a *second* stands for a thousand
    cycles, a million or more, so that the ticks are whole numbers with a letter.
    """

    span: float

    @property
    def _power(self) -> int:
        return max(0, int(math.log10(max(1.0, self.span / 3)) // 3))

    @property
    def _second(self) -> float:
        return float(1000**self._power)

    def head(self, title: str) -> list[str]:
        seconds = self.span / self._second
        rough = max(1.0, seconds / 8)
        decade = 10 ** int(math.log10(rough))
        step = next(each * decade for each in (1, 2, 5, 10) if each * decade >= rough)
        unit = ("", " k", " M", " G", " T")[self._power]
        return [
            "gantt", f"  title {title}", "  dateFormat x", f"  axisFormat %s{unit}",
            f"  tickInterval {1000 * step}millisecond",
        ]  # fmt: skip

    def task(self, name: str, tag: str, start: float, end: float) -> str:
        first, last = (round(1000 * cycles / self._second) for cycles in (start, end))
        return f"  {_plain(name)} :{tag}, {first}, {max(first + 1, last)}"


def _decode(profile: Profile) -> list[Mapping[str, Any]]:
    return [moment for moment in profile["moments"] if moment["phase"] == "decode"]


def _kinds(moments: Sequence[Mapping[str, Any]]) -> list[_Kind]:
    """Moments in program order, summed over the layers."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for moment in moments:
        groups.setdefault(collapsed(moment["name"]), []).append(moment)
    kinds = []
    for name, members in groups.items():
        cycles = sum(m["cycles"] + m["waiting_cycles"] for m in members)
        limit = sum(m["limit_cycles"] or 0.0 for m in members)
        share = limit / cycles if limit and cycles else None
        kinds.append(_Kind(name, members[0]["class"], len(members), cycles, share))
    return kinds


def _node(kind: _Kind, total: float) -> str:
    name = kind.name.removeprefix("layers.*.")
    times = f" x{kind.count}" if kind.count > 1 else ""
    lines = [f"<b>{_plain(name)}</b>", f"{_cycles(kind.cycles / kind.count)}{times}"]
    lines.append(f"{kind.cycles / total:.1%} of the step")
    if kind.limit_fraction is not None:
        lines.append(f"{kind.limit_fraction:.0%} of limit")
    shape = ('(["', '"])') if kind.kind == "host" else ('["', '"]')
    style = f":::{kind.kind}" if kind.kind in _STYLES else ""
    return f"{shape[0]}{'<br>'.join(lines)}{shape[1]}{style}"


def _cycles(cycles: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if cycles >= scale:
            return f"{cycles / scale:.3g} {letter} cycles"
    return f"{cycles:.0f} cycles"


def _plain(name: str) -> str:
    """A name without what a diagram might take for syntax."""
    return re.sub(r"[^\w .()+-]", "_", name)[:MAX_NAME]
