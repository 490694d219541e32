"""The arithmetic around the probes; what they measure is no test."""

from __future__ import annotations

import os

import pytest

from cyclewise.clock import roofs as module
from cyclewise.clock.roofs import (
    DEFAULT_CACHES,
    Cache,
    implausible,
    machine_profile,
    measure_roofs,
    read_caches,
    suspects,
    thread_counts,
)
from cyclewise.errors import ClockError
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.rates import rates
from cyclewise.machine.kernels.target import host_target
from cyclewise.machine.profile import Tuning, load_profile

OPERATIONS = {"dot": 64, "fma": 16}
HERTZ = 1e9


def found(**changes):
    """Plausible roofs of a core of 1 GHz."""
    whole = {
        "L1": ((1, 64e9), (2, 128e9)),
        "L2": ((1, 32e9), (2, 64e9)),
        "memory": ((1, 8e9), (2, 12e9)),
        "dot": ((1, 128e9), (2, 256e9)),
        "fma": ((1, 32e9), (2, 64e9)),
    }
    return whole | changes


def folder(tmp_path, caches):
    """Caches as Linux describes them: level, type, size, CPUs."""
    for index, (level, kind, size, cpus) in enumerate(caches):
        at = tmp_path / f"index{index}"
        at.mkdir()
        names = {"level": level, "type": kind, "size": size, "shared_cpu_list": cpus}
        for name, value in names.items():
            (at / name).write_text(f"{value}\n")
    return tmp_path


def test_caches_as_linux_describes_them(tmp_path):
    path = folder(
        tmp_path,
        [
            (1, "Data", "32K", "0"), (1, "Instruction", "64K", "0"), (2, "Unified", "1M", "0,8"),
            (3, "Unified", "32768K", "0-3,8-11"),
        ],
    )  # fmt: skip
    caches = (Cache(1, 32 << 10, 1), Cache(2, 1 << 20, 2), Cache(3, 32 << 20, 8))
    assert read_caches(path) == caches


@pytest.mark.parametrize(
    "caches",
    [[], [(1, "Data", "much", "0")], [(1, "Data", "32K", "all")], [(1, "Data", "0K", "0")]],
)
def test_where_the_system_does_not_tell_defaults_serve(tmp_path, caches):
    assert read_caches(folder(tmp_path, caches)) == DEFAULT_CACHES
    assert read_caches(tmp_path / "nothing") == DEFAULT_CACHES


def test_a_thread_reads_half_of_what_the_level_has_for_it():
    alone, shared = Cache(1, 1 << 15, 1), Cache(3, 1 << 25, 4)
    assert [alone.share(n) for n in (1, 2, 7)] == [1 << 14] * 3
    assert [shared.share(n) for n in (1, 2, 4, 8)] == [1 << 24, 1 << 23, 1 << 22, 1 << 22]
    assert shared.share(5) == (1 << 25) // 5


def test_thread_counts():
    assert [thread_counts(n) for n in (1, 2, 3, 8, 12)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12],
    ]  # fmt: skip


def test_what_was_disturbed_is_measured_again():
    best = {
        ("L1", 1): 10.0, ("L1", 2): 14.0, ("L1", 4): 20.0,
        ("dot", 1): 5.0, ("dot", 2): 20.0, ("dot", 4): 39.0,
        ("memory", 1): 10.0, ("memory", 2): 10.0, ("memory", 4): 30.0,
    }  # fmt: skip
    alone = ["L1", "dot"]
    assert suspects(best, alone, 2) == [("L1", 2), ("dot", 1), ("memory", 2)]
    assert suspects(best, alone, 4) == [("L1", 2), ("L1", 4), ("dot", 1), ("memory", 2)]
    assert suspects({("memory", 1): 10.0, ("memory", 2): 10.0}, [], 4) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"dot": ((1, 300e9), (2, 600e9))}, "instructions"),
        ({"fma": ((1, 0.1e9), (2, 0.2e9))}, "instructions"),
        ({"L1": ((1, 300e9), (2, 600e9))}, "300 bytes a cycle from L1"),
        ({"memory": ((1, 4e9), (2, 20e9))}, "memory of 2 threads is 5.0 times that of 1 thread"),
        ({"memory": ((1, 36e9), (2, 40e9))}, "memory is faster than L2 for 1 thread"),
        ({"L2": ((1, 32e9), (2, 10e9))}, "memory is faster than L2 for 2 threads"),
    ],
)
def test_what_no_processor_does_is_not_believed(changes, fault):
    said = implausible(found(**changes), OPERATIONS, HERTZ)
    assert said is None if fault is None else fault in said


def test_without_cycles_no_rate_a_cycle_is_judged():
    assert implausible(found(dot=((1, 300e9), (2, 600e9))), OPERATIONS, None) is None


@pytest.fixture
def hasty(monkeypatch, tmp_path):
    """Measuring without taking time over it; what comes out may be anything."""
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path))
    for name in ("PROBE_SECONDS", "MEMORY_SECONDS"):
        monkeypatch.setattr(module, name, 0.002)
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "EXTRA_SECONDS", 0.01)
    monkeypatch.setattr(module, "MEMORY_BYTES", 1 << 24)
    monkeypatch.setattr(module, "MOST_MEMORY_BYTES", 1 << 24)
    monkeypatch.setattr(module, "implausible", lambda *_: None)


def test_every_level_and_unit_is_measured_for_each_number_of_threads(hasty):
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    told = []
    roofs = measure_roofs(told.append)
    counts = thread_counts(available_cpus())
    scalings = [level.bandwidth for level in roofs.levels] + list(roofs.operations.values())
    for scaling in scalings:
        assert [count for count, _ in scaling] == counts
        values = [value for _, value in scaling]
        assert values == sorted(values) and values[0] > 0
    assert [level.name for level in roofs.levels][-1] == "memory"
    assert roofs.levels[-1].num_bytes == 0
    expected = {unit: rate.instruction for unit, rate in rates(host_target()).items()}
    assert roofs.instructions == expected
    assert (roofs.handover_seconds > 0) == (counts[-1] > 1)
    assert told
    assert before is None or os.sched_getaffinity(0) == before


def test_a_profile_is_measured_once_and_again_when_asked(hasty, monkeypatch):
    asked = []

    def tune(progress):
        asked.append(progress)
        return Tuning(num_threads=1)

    monkeypatch.setattr(module, "measure_tuning", tune)
    first = machine_profile()
    assert first.tuning == Tuning(num_threads=1)
    assert first == load_profile() == machine_profile()
    assert len(asked) == 1
    again = machine_profile(recalibrate=True)
    assert len(asked) == 2
    assert load_profile() == again


def test_what_cannot_be_is_refused(hasty, monkeypatch):
    monkeypatch.setattr(module, "implausible", lambda *_: "L1 is slow")
    with pytest.raises(ClockError, match=r"cannot be right: L1 is slow\. Try again"):
        machine_profile()
    assert load_profile() is None
