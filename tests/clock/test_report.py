"""The terminal's report: what it says, and that it fits."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cyclewise.clock.diff import Change, Difference
from cyclewise.clock.report import print_diff, print_profile
from tests.clock.profiles import make_profile, without_optional


def shown(show, value):
    out = io.StringIO()
    show(value, Console(file=out, width=80, highlight=False))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("layers", [1, 30, 126])
@pytest.mark.parametrize("bare", [False, True])
def test_it_fits_a_terminal(layers, bare):
    profile = make_profile(num_layers=layers, name="a very long name " * 10)
    if bare:
        profile = without_optional(profile)
    lines = shown(print_profile, profile)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_it_says_what_was_measured():
    profile = make_profile()
    text = "\n".join(shown(print_profile, profile))
    assert f"{profile['tokens_per_second']:.0f} tokens/s" in text
    assert f"{profile['limit_fraction']:.0%} of the limit" in text
    assert "tsc+chain" in text and f"{profile['unaccounted_fraction']:.2%}" in text
    decode = [m for m in profile["moments"] if m["phase"] == "decode"]
    down = [m for m in decode if m["name"].endswith("ffn.down")]
    share = sum(m["cycles"] + m["waiting_cycles"] for m in down) / profile["decode"]["cycles"]
    line = next(line for line in text.splitlines() if line.startswith("layers.*.ffn.down "))
    assert f"{share:.1%}" in line
    for advice in profile["advice"][:3]:
        assert advice["sentence"][:60] in text


def test_waiting_is_drawn_apart():
    profile = make_profile()
    for moment in profile["moments"]:
        if moment["name"] == "output":
            total = moment["cycles"] + moment["waiting_cycles"]
            moment["cycles"], moment["waiting_cycles"] = total / 2, total / 2
    lines = shown(print_profile, profile)
    line = next(line for line in lines if line.startswith("output "))
    assert abs(line.count("█") - line.count("░")) <= 1


def test_without_advice_it_says_so():
    lines = shown(print_profile, without_optional(make_profile()))
    assert any(line.startswith("next: nothing") for line in lines)


def test_a_difference():
    faster = Change("layers.*.ffn.down", "decode", 2e6, 1e6, 0.008)
    chance = Change("embed", "decode", 1e3, 1.1e3, 0.5)
    unknown = Change("new", "decode", 0, 5.0, None)
    lines = shown(print_diff, Difference((faster, chance, unknown), ("not the same machine",)))
    text = "\n".join(lines)
    assert "-50.0%" in text and "embed" not in text
    assert "not the same machine" in text
    assert "1 others did not change" in text and "1 cannot be told" in text
    assert max(map(len, lines)) <= 80
