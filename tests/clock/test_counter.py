"""The counter: what it refuses, and what it makes of ticks. Fake clocks hold the arithmetic."""

from __future__ import annotations

import itertools
import re
import sys
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from cyclewise.clock import counter, pmu
from cyclewise.clock.counter import Anchor, Calibration, Counter, between, open_counter, to_ticks
from cyclewise.clock.pmu import Counts
from cyclewise.errors import ClockError, CyclewiseError
from cyclewise.machine.kernels.compiler import assembly
from cyclewise.machine.kernels.probes import BLOCK_ADDS, probes_unit
from cyclewise.machine.kernels.target import IS_X86, X86_SETS, make_target
from cyclewise.machine.threads import Threads

FLAGS = "flags\t\t: fpu tsc msr {} sse2 avx2 tsc_known_freq"
NO_PMU = "No cycle counts: the processor's counters are not there."


@pytest.fixture(scope="module")
def opened():
    try:
        return open_counter()
    except ClockError as error:
        pytest.skip(str(error))


class FakeTime:
    """Nanoseconds that pass by reading them; ticks are `rate` of them."""

    def __init__(self, rate, steps=(100,)):
        self.now, self.rate, self.steps = 10**9, rate, itertools.cycle(steps)

    def nanoseconds(self):
        self.now += next(self.steps)
        return self.now

    def ticks(self):
        return round(self.now * self.rate)

    def sleep(self, seconds):
        self.now += round(seconds * 1e9)


@pytest.fixture
def fake(monkeypatch):
    """A processor without counters of its own, at 2 GHz of ticks and 3 GHz of cycles."""
    clock = FakeTime(2.0)
    no_pmu(monkeypatch)
    monkeypatch.setattr(counter, "IS_X86", True)
    monkeypatch.setattr(counter, "tsc_refusal", lambda cpuinfo: None)
    monkeypatch.setattr(counter, "_raw_nanoseconds", clock.nanoseconds)
    monkeypatch.setattr(counter.time, "perf_counter_ns", clock.nanoseconds)
    monkeypatch.setattr(counter.time, "sleep", clock.sleep)
    monkeypatch.setattr(Counter, "read", lambda self: clock.ticks())
    monkeypatch.setattr(Counter, "_run_chains", lambda self, threads: chains(1, 3.0 / 2.0))
    return clock


def no_pmu(monkeypatch):
    def refuse(thread_ids):
        raise ClockError(NO_PMU)

    monkeypatch.setattr(pmu, "open_groups", refuse)


def chains(num_threads, cycles_per_tick):
    """Ticks as chains leave them: slow while the core wakes, and a few interrupted."""
    full = counter.CHAIN_BLOCKS * BLOCK_ADDS / cycles_per_tick
    ticks = np.zeros((num_threads, counter.CHAINS, 2))
    ticks[:, :, 0] = 50
    ticks[:, :, 1] = 50 + full
    ticks[:, :200, 1] = 50 + full / 0.8
    ticks[:, 310::20, 1] += 40_000
    ticks[:, 315, 0] += 9_000
    return ticks


# What is refused


def test_two_reads_that_do_not_differ(monkeypatch):
    monkeypatch.setattr(Counter, "read", lambda self: 0)
    with pytest.raises(ClockError, match=r"does not count: it read 0, and 20 microseconds later 0"):
        Counter()


@pytest.mark.skipif(not IS_X86 or sys.platform != "linux", reason="/proc/cpuinfo on x86")
def test_a_counter_that_is_not_invariant(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\n" + FLAGS.format("constant_tsc") + "\n")
    monkeypatch.setattr(counter, "_CPUINFO", cpuinfo)
    with pytest.raises(CyclewiseError, match=r"not invariant.* lacks nonstop_tsc\."):
        Counter()


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("constant_tsc rep_good nonstop_tsc", None),
        ("constant_tsc", "lacks nonstop_tsc."),
        ("nonstop_tsc", "lacks constant_tsc."),
        ("not_constant_tsc nonstop_tsc_s3", "lacks constant_tsc and nonstop_tsc."),
    ],
)
def test_what_an_invariant_counter_needs(flags, missing):
    reason = counter.tsc_refusal("vendor_id\t: X\n" + FLAGS.format(flags) + "\nbugs\t\t: none\n")
    assert reason is None if missing is None else missing in reason


def test_no_flags_at_all():
    assert "lacks constant_tsc and nonstop_tsc." in counter.tsc_refusal("")


# Ticks and seconds


def test_the_rate_of_ticks_at_opening_and_later(fake):
    found = Counter()
    assert found.ticks_per_second == pytest.approx(2e9, rel=1e-3)
    fake.sleep(0.5)
    assert found.calibrate().ticks_per_second == pytest.approx(2e9, rel=1e-6)
    kept = found.ticks_per_second
    fake.sleep(0.5)
    found.calibrate()
    assert found.ticks_per_second == kept


def test_the_tightest_of_the_brackets_counts(fake):
    found = Counter()
    # Of each pair of readings, one bracket in seven is tight; in the others ticks come late.
    fake.steps = itertools.cycle([5_000, 90_000] * 6 + [100, 100])
    at = found.anchor()
    assert at.ticks == pytest.approx(2 * at.nanoseconds, abs=2 * 60)


def test_nanoseconds_to_ticks():
    start, end = Anchor(1_000, 70_000), Anchor(3_000, 75_000)
    assert [to_ticks(n, start, end) for n in (1_000, 3_000, 2_000, 5_000, 0)] == [
        70_000, 75_000, 72_500, 80_000, 67_500,
    ]  # fmt: skip
    far = Anchor(10**18, 10**18), Anchor(10**18 + 10**9, 10**18 + 3 * 10**9)
    assert to_ticks(10**18 + 1, *far) == 10**18 + 3


def test_a_mapping_spans_from_its_anchor_to_now(fake):
    found = Counter()
    start = found.anchor()
    fake.sleep(1.0)
    mapped = found.mapping(start)
    middle = start.nanoseconds + 5 * 10**8
    assert mapped(middle) == pytest.approx(2 * middle, abs=500)
    assert mapped(start.nanoseconds) == start.ticks


# Ticks and cycles


def test_cycles_come_from_the_chain(fake):
    found = Counter()
    calibration = found.calibrate()
    assert calibration.source == "tsc+chain" and calibration.counts_cycles
    assert calibration.cycles_per_tick == pytest.approx(1.5)
    assert calibration.core_hertz == pytest.approx(3e9, rel=1e-3)
    assert calibration.error_fraction == pytest.approx(0, abs=1e-9)
    assert calibration.notes[-1] == NO_PMU


def test_threads_of_unlike_speed_are_an_error(fake, monkeypatch):
    found = Counter()
    both = np.concatenate([chains(1, 1.5), chains(1, 1.2)])
    monkeypatch.setattr(Counter, "_run_chains", lambda self, threads: both)
    calibration = found.calibrate()
    assert calibration.cycles_per_tick == pytest.approx(1.35, abs=0.02)
    assert calibration.error_fraction == pytest.approx(0.3 / 1.35, abs=0.02)


def test_without_cycles_there_is_time(fake, monkeypatch):
    monkeypatch.setattr(counter, "IS_X86", False)
    calibration = Counter().calibrate()
    assert calibration.source == "cntvct" and not calibration.counts_cycles
    assert calibration.core_hertz == calibration.ticks_per_second
    assert calibration.cycles_per_tick == 1 and calibration.error_fraction == 0
    assert "time only" in calibration.notes[0]


class FakeGroup:
    """Counts 1.25 cycles for each add that `_run_chains` has run."""

    def __init__(self, clock, per_add=1.25, user_only=False):
        self.clock, self.per_add, self.user_only, self.ran = clock, per_add, user_only, 0

    def __iter__(self):
        return iter([self])

    def cycles(self):
        return round(self.ran * counter.CHAINS * counter.CHAIN_BLOCKS * BLOCK_ADDS * self.per_add)

    def run(self, threads):
        self.ran += 1
        ticks = chains(1, 1.5)
        ticks[:, :, 0], ticks[:, :, 1] = 0, counter.CHAIN_BLOCKS * BLOCK_ADDS / 1.5
        self.clock.now += ticks.sum() / 2.0
        return ticks

    def close(self):
        pass


@pytest.mark.parametrize(("user_only", "notes"), [(False, ()), (True, (pmu.USER_ONLY,))])
def test_the_processors_own_count_goes_first(fake, monkeypatch, user_only, notes):
    group = FakeGroup(fake, user_only=user_only)
    monkeypatch.setattr(pmu, "open_groups", lambda thread_ids: group)
    monkeypatch.setattr(Counter, "_run_chains", lambda self, threads: group.run(threads))
    calibration = Counter().calibrate()
    assert calibration.source == "pmu" and calibration.notes == notes
    assert calibration.cycles_per_tick == pytest.approx(1.5 * 1.25, rel=1e-3)


def test_a_count_that_stands_still_is_not_believed(fake, monkeypatch):
    group = FakeGroup(fake, per_add=0)
    monkeypatch.setattr(pmu, "open_groups", lambda thread_ids: group)
    monkeypatch.setattr(Counter, "_run_chains", lambda self, threads: group.run(threads))
    calibration = Counter().calibrate()
    assert calibration.source == "tsc+chain"
    assert "0.00 cycles for an add" in calibration.notes[-1]


# Before and after


AT_3_GHZ = Calibration("tsc+chain", 2e9, 3e9, True, 1e-8, 0.002, ("estimated",))


def test_two_calibrations_that_agree():
    both = between(AT_3_GHZ, replace(AT_3_GHZ, core_hertz=3.03e9))
    assert both.core_hertz == pytest.approx(3.015e9)
    assert both.error_fraction == pytest.approx(0.015 / 3.015)
    assert both.notes == ("estimated",)
    assert between(AT_3_GHZ, AT_3_GHZ).error_fraction == 0.002


def test_two_calibrations_that_disagree_say_so():
    both = between(AT_3_GHZ, replace(AT_3_GHZ, core_hertz=2.7e9))
    assert both.notes[-1].endswith("changed by 10.5% while it was measured: 2.70 to 3.00 GHz.")
    assert both.error_fraction == pytest.approx(0.3 / 2.85 / 2)


def test_counts_of_the_window_are_preferred_if_they_are_whole():
    counts = [Counts(6_000, None, None, 2e-6, 2e-6, False), Counts(2_000, 1, 1, 1e-6, 1e-6, False)]
    assert between(AT_3_GHZ, AT_3_GHZ, counts).core_hertz == pytest.approx(8_000 / 3e-6)
    partly = [counts[0], replace(counts[1], user_only=True)]
    assert between(AT_3_GHZ, AT_3_GHZ, partly).core_hertz == 3e9


# On this machine


def test_this_machines_counter(opened):
    assert open_counter() is opened
    first, start = opened.read(), time.perf_counter()
    calibration = opened.calibrate()
    seconds = time.perf_counter() - start
    assert calibration.source in ("pmu", "tsc+chain", "cntvct")
    assert opened.read() > first
    assert calibration.ticks_per_second == pytest.approx(opened.ticks_per_second)
    assert 0 < calibration.read_cost_seconds < seconds
    assert 0 <= calibration.error_fraction < 1
    assert calibration.counts_cycles == (calibration.source != "cntvct")
    assert all(note.endswith(".") for note in calibration.notes)


def test_all_threads_run_the_chain(opened):
    threads = Threads(2, 1)
    ticks = opened._run_chains(threads)
    threads.close()
    assert ticks.shape == (2, counter.CHAINS, 2)
    assert (ticks > 0).all()
    # One by one, they may be interrupted.
    reads, full = np.median(ticks, axis=1).T
    assert (full > reads).all()


@pytest.mark.skipif(not IS_X86, reason="looks for x86 instructions")
@pytest.mark.parametrize("target", [*X86_SETS, "plain"])
def test_the_chain_is_a_chain(target):
    """Adds of two registers that need each other in turn, and between the reads nothing else."""
    text = assembly(probes_unit(), make_target(target))
    chain = text[text.index("\nchain:") : text.index("-chain")]
    lines = re.findall(r"^\t([a-z]\w*)[ \t]*(.*)$", chain, re.MULTILINE)
    (start, *_) = (i for i, (name, _) in enumerate(lines) if name == "addq")
    adds = list(itertools.takewhile(lambda line: line[0] == "addq", lines[start:]))
    first, second = adds[0][1].split(", ")
    assert first != second and all(x.startswith("%r") for x in (first, second))
    pair = [f"{first}, {second}", f"{second}, {first}"]
    assert [operands for _, operands in adds] == pair * (BLOCK_ADDS // 2)
    names = [name for name, _ in lines]
    # The empty chain's two reads, then the full one's, each behind a fence.
    reads = [i for i, name in enumerate(names) if name == "rdtsc"]
    assert len(reads) == 4 and [names[i - 1] for i in reads].count("lfence") == 4
    assert reads[2] < start < start + BLOCK_ADDS < reads[3]
    # What was added goes to memory before the second read, or it would be added after it.
    between_them = lines[start + BLOCK_ADDS : reads[3]]
    assert any(name == "movq" and operands.endswith(")") for name, operands in between_them)


def test_what_helpers_read_outlives_their_last_step(opened, monkeypatch):
    """The caller may be done before a helper that comes late has looked at the schedule."""
    threads = Threads(2, 1)
    run, settle = Threads.run, Threads.settle
    lent = []

    def watch(self, schedule, contexts):
        lent.extend([weakref.ref(schedule), weakref.ref(contexts)])
        run(self, schedule, contexts)

    def still_there(self):
        assert all(each() is not None for each in lent)
        settle(self)

    monkeypatch.setattr(Threads, "run", watch)
    monkeypatch.setattr(Threads, "settle", still_there)
    opened.calibrate(threads)
    assert len(lent) == 2
    threads.close()
