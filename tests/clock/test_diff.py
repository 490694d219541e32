"""Two profiles compared: what changed, what may be chance, and what is no profile."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from cyclewise.clock.diff import compare, permutation_test, read_profile
from cyclewise.errors import InvalidParameterError


def profile(samples, **changes):
    """A profile of moments, {name: cycles of each turn}."""
    rows = [
        {"name": name, "phase": "decode", "samples": list(cycles)}
        for name, cycles in samples.items()
    ]
    return {
        "schema": "cyclewise.profile", "schema_version": 1, "moments": rows,
        "model": {"file": "m.gguf"}, "host": {"cpu": "a"}, "clock": {"core_hertz": 3e9},
        "settings": {"threads": 2, "prompt_tokens": 8, "generate_tokens": 8, "batch": 1},
        "roofs": {"memory_bytes_per_second_within_run": 2e10}, **changes,
    }  # fmt: skip


def noisy(middle, seed, count=5, spread=0.01):
    return middle * (1 + spread * np.random.default_rng(seed).standard_normal(count))


def test_what_changed_is_found_and_nothing_else():
    names = [f"layers.{i}.ffn.{part}" for i in range(4) for part in ("gate_up", "down")]
    before = {n: noisy(100, i) for i, n in enumerate(names)}
    after = {n: noisy(80 if "down" in n else 100, i + 50) for i, n in enumerate(names)}
    result = compare(profile(before), profile(after))
    changes = {c.name: c for c in result.changes}
    assert [c.name for c in result.changes][:2] == ["total", "layers.*.ffn.down"]
    assert changes["layers.*.ffn.down"].significant
    assert changes["layers.*.ffn.down"].ratio == pytest.approx(0.8, abs=0.01)
    assert changes["layers.*.ffn.down"].before == pytest.approx(400, rel=0.02)
    assert not changes["layers.*.ffn.gate_up"].significant
    assert not result.notes
    json.dumps(result.as_dict())


def test_the_permutation_test_is_exact():
    a, b = np.array([1.0, 2, 3, 7, 2.5]), np.array([4.0, 5, 6, 9, 8])
    both = np.concatenate([a, b])
    seen, count, extreme = abs(a.mean() - b.mean()), 0, 0
    for chosen in combinations(range(10), 5):
        rest = [i for i in range(10) if i not in chosen]
        count += 1
        extreme += abs(both[list(chosen)].mean() - both[rest].mean()) >= seen - 1e-12
    assert permutation_test(a, b) == pytest.approx(extreme / count)


def test_chance_is_called_chance():
    """Of profiles of the same thing, about one in a hundred moments is called changed."""
    probabilities = [permutation_test(noisy(1, i), noisy(1, 10_000 + i)) for i in range(1000)]
    assert sum(p <= 0.01 for p in probabilities) < 25


def test_too_few_turns_cannot_be_told():
    assert permutation_test(np.ones(4), np.zeros(4)) is None
    assert permutation_test(np.ones(5), np.zeros(5)) == pytest.approx(2 / 252)
    assert permutation_test(noisy(1, 0, 40), noisy(1.2, 1, 40)) == 0


def test_a_moment_that_is_new():
    result = compare(profile({"embed": [1] * 5}), profile({"embed": [1] * 5, "extra": [2] * 5}))
    extra = next(c for c in result.changes if c.name == "extra")
    assert (extra.before, extra.after, extra.significant) == (0, 2, False)


def test_what_else_differs_is_said():
    other = profile(
        {"embed": [1] * 5}, host={"cpu": "b"}, clock={"core_hertz": 2e9},
        roofs={"memory_bytes_per_second_within_run": 1e10},
    )  # fmt: skip
    notes = compare(profile({"embed": [1] * 5}), other).notes
    assert [note.split(":")[0] for note in notes] == [
        "not the same processor",
        "the memory's read bandwidth was -50%",
        "the core's frequency was -33%",
    ]


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"schema": "x", "schema_version": 1}', "nul",
    '{"schema": "cyclewise.profile", "schema_version": 1}',
    '{"schema": "cyclewise.profile", "schema_version": 1, "moments": [{"name": "a"}]}',
    '{"schema": "cyclewise.profile", "schema_version": 1, "moments": [3]}',
])  # fmt: skip
def test_what_is_no_profile(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InvalidParameterError, match="is no profile"):
        read_profile(file)


def test_a_later_version_and_a_missing_file(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(InvalidParameterError, match="cannot read"):
        read_profile(file)
    file.write_text(json.dumps(profile({}, schema_version=99)))
    with pytest.raises(InvalidParameterError, match="version 99"):
        read_profile(file)
