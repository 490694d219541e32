"""The clock's commands on a tiny model: what they write, and what they refuse."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from typer.testing import CliRunner

import cyclewise.clock_commands
from cyclewise.cli import app
from cyclewise.machine.profile import MachineProfile
from cyclewise.models import load_model
from cyclewise.text.tokenizer import Tokenizer
from tests.clock.forecasts import BANDWIDTH, kernel_costs
from tests.clock.test_run import ROOFS, check_profile, counter
from tests.engine.toy import ToyTokenizer
from tests.models.tiny import Tiny, write

__all__ = ["counter"]  # a fixture: without a counter there is no clock

SMALL = ("--prompt-tokens", "40", "--generate-tokens", "4", "--repeats", "2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path, monkeypatch, counter):
    """A file, on a machine whose roofs are known."""
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=512, format="Q8_0"))
    machine = MachineProfile(cpu="test", target="avx2", num_cpus=2, roofs=ROOFS)
    monkeypatch.setattr(cyclewise.clock_commands, "_machine_profile", lambda _: machine)
    monkeypatch.setattr(Tokenizer, "from_metadata", lambda _: ToyTokenizer())
    return str(path)


def call(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def short(monkeypatch):
    """What would take a profile seconds is left out: it has tests of its own."""
    from cyclewise.clock import complexity, whatif
    from cyclewise.clock.growth import Growth

    monkeypatch.setattr(complexity, "measure_growth_quickly", lambda *_: Growth((), 1.0, True))
    monkeypatch.setattr(whatif, "usual_questions", lambda *_: [])


def test_profile_writes_json_and_pictures(tiny, short, tmp_path):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "trace", "md")}
    result = call(
        "profile", tiny, "--json", *SMALL, "--html", str(files["html"]),
        "--trace", str(files["trace"]), "--mermaid", str(files["md"]), "--threads", "1",
    )  # fmt: skip
    assert result.exit_code == 0
    profile = json.loads(result.stdout)
    model = load_model(tiny, threads=1)
    check_profile(profile, model)
    model.close()
    for key in (
        "clock_source", "overhead_fraction", "unaccounted_fraction", "cycles_per_token",
        "tokens_per_second", "limit_fraction", "schema_version",
    ):  # fmt: skip
        assert key in profile
    assert all(file.stat().st_size > 100 for file in files.values())
    assert "```mermaid" in files["md"].read_text()


def test_profile_prints_a_report_and_diff_reads_two(tiny, short, tmp_path):
    assert "per token" in call("profile", tiny, *SMALL).stdout
    before = tmp_path / "a.json"
    before.write_text(call("profile", tiny, "--json", *SMALL).stdout)
    compared = call("diff", str(before), str(before), "--json")
    assert json.loads(compared.stdout)["schema"] == "cyclewise.diff"
    assert "cannot be told" in call("diff", str(before), str(before)).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("profile", "--prompt-tokens", "0"), "prompt_tokens must be at least 1"),
        (("profile", "--html", "/nonexistent/x.html"), "nonexistent"),
        (("profile", "--batch", "9000"), "this model can take"),
        (("whatif", "--change", "q8"), "did you mean"),
        (("whatif",), "give --change, or --streams"),
        (("whatif", "--streams", "--change", "batch=2"), "give --change, or --streams"),
        (("whatif", "--change", "threads=0"), "whole one from 1"),
        (("whatif", "--change", "machine=nowhere"), "there is no machine description"),
        (("whatif", "--change", "prune-heads=2"), "between 0 and 1"),
        (("complexity", "--rounds", "0"), "rounds must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(tiny, arguments, said):
    command, *options = arguments
    result = call(command, tiny, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_streams(tiny, monkeypatch):
    monkeypatch.setattr("cyclewise.clock.streams.CONTEXTS", (64, 512, 4096))
    monkeypatch.setattr("cyclewise.clock.streams.usual_bandwidth", lambda *_: BANDWIDTH)
    monkeypatch.setattr(
        "cyclewise.clock.streams.calibrated",
        lambda machine, formats, *_: (machine, kernel_costs(*formats)),
    )
    found = json.loads(call("whatif", tiny, "--streams", "--json").stdout)["streams"]
    assert [(each["context"], each["streams"]) for each in found] == [
        (context, streams) for context in (64, 512) for streams in (1, 4, 8, 16)
    ]
    for few, many in pairwise(found):
        if few["context"] == many["context"]:  # slower for each, faster for all
            speeds = [each["tokens_per_second_each"]["value"] for each in (few, many)]
            assert speeds[0] > speeds[1]
            assert few["tokens_per_second"] < many["tokens_per_second"]
            assert few["cache_bytes"] / few["streams"] == many["cache_bytes"] / many["streams"]
    lines = call("whatif", tiny, "--streams").stdout.splitlines()
    assert lines[0].startswith("CONTEXT  STREAMS  TOKENS/S EACH")
    assert len(lines) == 10 and lines[-1].startswith("predicted for")


def test_a_mistake_leaves_no_file_behind(tiny, tmp_path):
    file = tmp_path / "report.html"
    assert call("profile", tiny, "--repeats", "0", "--html", str(file)).exit_code == 2
    assert not file.exists()
