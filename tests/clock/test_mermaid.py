"""The diagrams hold the profile's numbers; the slow test hands them to Mermaid itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cyclewise.clock.mermaid import flowchart, layer_gantt, mermaid, token_gantt, write_mermaid
from tests.clock.chromium import chromium, find_chromium
from tests.clock.profiles import make_profile, without_optional

HOSTILE = 'a"]; end\n%% --> <b>`:x, "\n```\n'
MERMAID = "12.3.0"


def _program(profile: dict[str, Any]) -> list[str]:
    return [
        m["name"]
        for m in profile["moments"]
        if m["phase"] == "decode" and m["class"] != "host"
    ]  # fmt: skip


def test_the_flowchart_has_each_moment_once() -> None:
    profile = make_profile()
    text = flowchart(profile)
    nodes = re.findall(r'\["<b>(.*?)</b><br>(.*?)"\]', text)
    names = [name for name, _ in nodes]
    assert names[:4] == ["scheduling", "embed", "attention.norm", "attention.qkv.quantize"]
    assert names[-4:] == ["output", "sampling", "detokenizing", "writing"]
    assert len(names) == len(set(names)) == 20
    assert 'subgraph layer["a layer, x30"]' in text
    members = [
        m
        for m in profile["moments"]
        if m["phase"] == "decode" and m["name"].endswith("ffn.gate_up")
    ]
    cycles = sum(m["cycles"] + m["waiting_cycles"] for m in members)
    share = sum(m["limit_cycles"] for m in members) / cycles
    assert dict(nodes)["ffn.gate_up"] == (
        f"{cycles / 30e3:.3g} k cycles x30<br>"
        f"{cycles / profile['decode']['cycles']:.1%} of the step<br>{share:.0%} of limit"
    )


def test_the_token_in_time() -> None:
    profile = make_profile()
    lanes, names = profile["timeline"]["threads"], _program(profile)
    tasks = re.findall(r"  (.+) :active, (\d+), (\d+)", token_gantt(names, lanes))
    assert [name for name, _, _ in tasks] == [
        "embed", *(f"layer {n}" for n in range(30)), "output"
    ]  # fmt: skip
    # A thousandth of a second stands for a thousand cycles: a second for a million.
    end = max(sum(lane[-1]) for lane in lanes)
    assert int(tasks[-1][2]) == round(end / 1000)
    for (_, _, before), (_, after, _) in pairwise(tasks):
        assert int(after) == int(before)


def test_a_layer_in_time() -> None:
    profile = make_profile()
    lanes, names = profile["timeline"]["threads"], _program(profile)
    text = layer_gantt(names, lanes)
    assert "title Layer 14 " in text and "axisFormat %s k" in text
    rows = [i for i, name in enumerate(names) if name.startswith("layers.14.")]
    start = min(lane[rows[0]][0] for lane in lanes)
    found = [
        (name, int(a), int(b))
        for name, a, b in re.findall(r"  (\S+) :active, (\d+), (\d+)", text)
    ]  # fmt: skip
    expected = [
        (names[row].removeprefix("layers.14."), round(begun - start), round(begun - start + work))
        for lane in lanes
        for row in rows
        for begun, work, _ in [lane[row]]
    ]
    assert found == expected
    assert text.count("  waiting :crit,") >= 1


def test_markdown_has_all_and_a_diagram_file_one(tmp_path: Path) -> None:
    profile = make_profile()
    assert write_mermaid(profile, tmp_path / "a.md") == (tmp_path / "a.md",)
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert re.findall(r"```mermaid\n(---\n.*\n---\n)?(\w+)", text) == [
        (re.match(r"```mermaid\n(---\n.*\n---\n)", text)[1], "flowchart"),  # type: ignore[index]
        ("", "gantt"),
        ("", "gantt"),
    ]
    files = write_mermaid(profile, tmp_path / "a.mmd")
    assert [file.name for file in files] == ["a.mmd", "a.token.mmd", "a.layer.mmd"]
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert texts[0] == flowchart(profile) + (
        "  %% Gantt charts of one token: a.token.mmd, a.layer.mmd\n"
    )
    assert all(text.startswith("gantt\n") for text in texts[1:])


def test_without_a_timeline_the_program_is_left() -> None:
    assert mermaid(without_optional(make_profile())).count("```mermaid") == 1


def test_a_hostile_name_is_no_syntax() -> None:
    profile = make_profile(num_layers=2, name=HOSTILE)
    for moment in profile["moments"]:
        if moment["name"].endswith("ffn.norm"):
            moment["name"] = moment["name"].replace("ffn.norm", HOSTILE)
    profile["model"]["name"] = HOSTILE
    text = mermaid(profile)
    assert text.count("```") == 6
    assert HOSTILE not in text and "%%" not in text
    assert len(text.splitlines()) == len(mermaid(make_profile(num_layers=2)).splitlines())


@pytest.mark.slow
def test_mermaid_draws_them(tmp_path: Path) -> None:
    browser, npm = find_chromium(), shutil.which("npm")
    if browser is None or npm is None:
        pytest.skip("no Chromium or no npm here")
    packed = subprocess.run(
        [npm, "pack", "--silent", f"mermaid@{MERMAID}"], cwd=tmp_path, capture_output=True
    )
    if packed.returncode:
        pytest.skip("Mermaid could not be fetched")
    with tarfile.open(tmp_path / f"mermaid-{MERMAID}.tgz") as archive:
        script = archive.extractfile("package/dist/mermaid.min.js")
        assert script is not None
        (tmp_path / "mermaid.min.js").write_bytes(script.read())
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><meta charset="utf-8"><script src="mermaid.min.js"></script>')
    hostile = make_profile(num_layers=1, name=HOSTILE)
    hostile["moments"][1]["name"] = f"layers.0.{HOSTILE}"
    with chromium(browser) as opened:
        opened.open(page)
        opened.run("mermaid.initialize({ startOnLoad: false })")
        for number, profile in enumerate((make_profile(), hostile)):
            diagrams = re.findall(r"```mermaid\n(.*?)```\n", mermaid(profile), re.DOTALL)
            assert len(diagrams) == 3
            for part, diagram in enumerate(diagrams):
                name = f"d{number}{part}"
                drawn = opened.run(
                    f"mermaid.render('{name}', {json.dumps(diagram)}).then((e) => e.svg)"
                )
                assert drawn.startswith("<svg") and "Syntax error" not in drawn
        write_mermaid(hostile, tmp_path / "a.mmd")
        program = (tmp_path / "a.mmd").read_text(encoding="utf-8")
        assert opened.run(f"mermaid.parse({json.dumps(program)}).then((e) => e.diagramType)")
        assert opened.problems == []
