from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from cyclewise.machine import profile as module
from cyclewise.machine.host import available_cpus, cpu_name
from cyclewise.machine.kernels.target import host_target
from cyclewise.machine.profile import (
    Level,
    MachineProfile,
    Roofs,
    Tuning,
    at_threads,
    load_profile,
    load_tuning,
    save_profile,
)

ROOFS = Roofs(
    core_hertz=3.5e9,
    levels=(
        Level("L1", 32768, 1, ((1, 2e11), (2, 4e11))),
        Level("memory", 0, 2, ((1, 2e10), (2, 3.5e10))),
    ),
    operations={"dot": ((1, 4e11), (2, 8e11)), "fma": ((1, 1e11), (2, 2e11))},
    instructions={"dot": "VPMADDUBSW", "fma": "VFMADD231PS"},
    handover_seconds=6e-8,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path))
    return tmp_path


def profile(**changes):
    whole = MachineProfile(
        cpu_name(), host_target().name, available_cpus(), ROOFS,
        Tuning(1, 256, {"Q8_0": (4, 2, 1)}), {"overhead": [1, 2.5]}, "2026-01-01",
    )  # fmt: skip
    return replace(whole, **changes)


def stored(cache):
    """The one file that is kept."""
    (path,) = (cache / "machine").iterdir()
    return path


def test_what_is_saved_is_loaded(cache):
    assert load_profile() is None and load_tuning() == Tuning()
    save_profile(profile())
    assert load_profile() == profile()
    assert load_tuning() == Tuning(1, 256, {"Q8_0": (4, 2, 1)})
    save_profile(profile(tuning=Tuning()))
    assert load_profile() == profile(tuning=Tuning())
    assert [path.suffix for path in (cache / "machine").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "other", [{"cpu": "another"}, {"target": "sse9"}, {"num_cpus": available_cpus() + 1}]
)
def test_another_computers_profile_is_not_believed(cache, other):
    save_profile(profile(**other))
    assert load_profile() is None
    # Nor when it lies where ours should.
    foreign = stored(cache).read_bytes()
    save_profile(profile())
    for path in (cache / "machine").iterdir():
        path.write_bytes(foreign)
    assert load_profile() is None


def with_field(path, value):
    """The profile as JSON with one thing changed: `path` is its keys."""
    whole = json.loads(json.dumps(asdict(profile())))
    at = whole
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return whole


BAD = [
    (["version"], module.VERSION + 1),
    (["version"], None),
    (["cpu"], 5),
    (["date"], 2026),
    (["predictor"], []),
    (["unknown"], 1),
    (["num_cpus"], 2.0),
    (["num_cpus"], 0),
    (["roofs"], None),
    (["roofs", "core_hertz"], float("nan")),
    (["roofs", "core_hertz"], float("inf")),
    (["roofs", "core_hertz"], "3e9"),
    (["roofs", "core_hertz"], 0.0),
    (["roofs", "levels"], []),
    (["roofs", "levels"], {"L1": 5}),
    (["roofs", "levels", 1, "num_bytes"], 4096),
    (["roofs", "levels", 0, "cores"], True),
    (["roofs", "levels", 0, "bandwidth"], []),
    (["roofs", "levels", 0, "bandwidth"], [[1]]),
    (["roofs", "levels", 0, "bandwidth"], [[1, 0.0]]),
    (["roofs", "levels", 0, "bandwidth"], [[0, 1e10]]),
    (["roofs", "levels", 0, "bandwidth"], [[1, -1e10]]),
    (["roofs", "operations"], {}),
    (["roofs", "operations", "dot"], [[1, "fast"]]),
    (["roofs", "instructions"], {"dot": "VPMADDUBSW"}),
    (["roofs", "handover_seconds"], -1e-9),
    (["tuning", "num_threads"], 0),
    (["tuning", "num_threads"], available_cpus() + 1),
    (["tuning", "num_threads"], True),
    (["tuning", "prefill_chunk"], 0),
    (["tuning", "prefill_chunk"], 256.0),
    (["tuning", "token_tiles"], [4, 2, 1]),
    (["tuning", "token_tiles"], {"Q8_0": []}),
    (["tuning", "token_tiles"], {"Q8_0": [4, 2]}),
    (["tuning", "token_tiles"], {"Q8_0": [2, 4, 1]}),
    (["tuning", "token_tiles"], {"Q8_0": [4, 4, 1]}),
    (["tuning", "token_tiles"], {"Q8_0": [6, 1]}),
    (["tuning", "token_tiles"], {"Q8_0": [3, 1]}),
    (["tuning", "token_tiles"], {"Q8_0": [1 << 20, 1]}),
    (["tuning", "token_tiles"], {"Q8_0": "421"}),
]


@pytest.mark.parametrize(("path", "value"), BAD)
def test_what_is_out_of_range_is_not_believed(cache, path, value):
    save_profile(profile())
    stored(cache).write_text(json.dumps(with_field(path, value)))
    assert load_profile() is None
    assert load_tuning() == Tuning()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 21)]
)
def test_a_damaged_file_is_as_good_as_none(cache, content):
    save_profile(profile())
    path = stored(cache)
    path.write_bytes(content)
    assert load_profile() is None
    save_profile(profile())
    assert load_profile() == profile()


def test_every_part_of_a_file_is_needed(cache):
    save_profile(profile())
    path = stored(cache)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        assert load_profile() is None


def test_a_cache_that_cannot_be_written_costs_only_that(cache, monkeypatch):
    file = cache / "file"
    file.write_bytes(b"")
    monkeypatch.setenv("CYCLEWISE_CACHE", str(file))
    save_profile(profile())
    assert load_profile() is None


def test_nothing_is_left_of_a_write_that_failed(cache, monkeypatch):
    def refuse(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    save_profile(profile())
    assert list((cache / "machine").iterdir()) == []


def test_between_measured_thread_counts_lies_a_line():
    scaling = ((1, 10.0), (4, 25.0), (2, 20.0))
    assert [at_threads(scaling, n) for n in (1, 2, 3, 4, 9)] == [10.0, 20.0, 22.5, 25.0, 25.0]
    assert at_threads(((2, 5.0),), 1) == 5.0
