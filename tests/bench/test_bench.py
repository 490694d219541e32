"""The arithmetic and the order of a benchmark. No speed is tested: a timing is not a test."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cyclewise.bench import bench, host, report
from cyclewise.errors import InvalidParameterError
from tests.bench.fakes import fake_model


def test_alone() -> None:
    model = fake_model()
    result = bench.run_bench(model, prompt_tokens=100, generate_tokens=3, depth=7, repeats=2)
    # warm-up: one prefill and four tokens; then 64 + 36 tokens of a prompt, the depth, the answer
    assert model.machine.steps == [64, 1, 1, 1, 1] + 2 * [64, 36, 7, 1, 1, 1]
    assert model.machine.num_probes == 1 + 2 * 2
    assert result.bytes_per_decode_token == 1000 + 10 * (8 + 9 + 10) / 3
    assert result.read_bandwidth_bytes_per_second == 1e9
    expected = result.bytes_per_decode_token * result.decode_tokens_per_second.max / 1e9
    assert result.decode_fraction_of_bandwidth_spread.max == pytest.approx(expected)
    assert result.peers == ()


def test_the_json_has_what_was_promised(fake_peer: str) -> None:
    result = bench.run_bench(
        fake_model(), prompt_tokens=10, generate_tokens=4, repeats=3, against=[fake_peer]
    )
    found = json.loads(json.dumps(result.as_dict()))
    assert found["model"] == "fake.gguf"
    assert found["threads"] == 2
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert found[name].keys() == {"median", "min", "max"}
    peer = found["peers"][0]
    assert (peer["name"], peer["version"]) == ("fake", "1.2")
    assert peer["prefill_tokens_per_second"] == {"median": 20.0, "min": 20.0, "max": 20.0}
    assert peer["decode_tokens_per_second"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    for phase, speed in (("prefill", 20.0), ("decode", 4.0)):
        ours = found[f"{phase}_tokens_per_second"]
        assert peer[f"{phase}_ratio"] == pytest.approx(ours["median"] / speed)
        assert peer[f"{phase}_ratio_spread"]["max"] == pytest.approx(ours["max"] / speed)
    assert found["others_cpu_share"] is None or 0 <= found["others_cpu_share"] <= 1
    assert found["host"]["packages"].keys() == {"cyclewise", "llvmlite", "numpy"}


def test_every_repeat_has_its_own_tokens() -> None:
    assert bench.token_ids(5, 1, 1000) == bench.token_ids(5, 1, 1000)
    assert bench.token_ids(5, 1, 1000) != bench.token_ids(5, 2, 1000)


@pytest.mark.parametrize(
    "counts",
    [
        {"prompt_tokens": 0},
        {"generate_tokens": 0},
        {"depth": -1},
        {"repeats": 0},
        {"prompt_tokens": 513},
        {"depth": 500, "generate_tokens": 13},
    ],
)
def test_counts_out_of_range(counts: dict[str, int]) -> None:
    model = fake_model()
    with pytest.raises(InvalidParameterError):
        bench.run_bench(model, **counts)
    assert model.machine.steps == []


def test_the_table_names_the_peer_and_the_ratio(fake_peer: str) -> None:
    result = bench.run_bench(
        fake_model(), prompt_tokens=10, generate_tokens=4, repeats=1, against=[fake_peer]
    )
    out = io.StringIO()
    report.print_bench(result, Console(file=out, width=80))
    text = out.getvalue()
    assert "fake 1.2" in text
    assert "20.0" in text
    assert "2 threads" in text


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_progress("something")
    assert capsys.readouterr().err == ""


def test_host_is_described() -> None:
    found = host.describe_host()
    assert found["cpu"]
    assert found["target"] in ("avx512", "avx2", "plain")
