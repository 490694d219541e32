"""The processor's counters: structures and sentences everywhere, counts where there are any."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import threading

import numpy as np
import pytest

from cyclewise.clock import pmu
from cyclewise.clock.pmu import CACHE_MISSES, CYCLES, EVENTS, INSTRUCTIONS, SOFTWARE, Counts, Group
from cyclewise.errors import ClockError
from cyclewise.machine.kernels.compiler import Compiler, _compile, assembly, callable_at
from cyclewise.machine.kernels.lang import I64
from cyclewise.machine.kernels.probes import pmc_unit
from cyclewise.machine.kernels.target import IS_X86, make_target

TASK_CLOCK, PAGE_FAULTS, UNKNOWN = (SOFTWARE, 1), (SOFTWARE, 2), (SOFTWARE, 12345)
"""Events that the kernel counts itself, and one that nobody does."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="perf_event_open is Linux's")


# Structures


def test_the_attributes_of_an_event():
    data = pmu.attribute((4, 0x01C2), user_only=True, leads=True)
    assert len(data) == 64
    assert struct.unpack_from("=II", data) == (4, 64)
    config, period, sample_type, read_format, flags = struct.unpack_from("=5Q", data, 8)
    assert (config, period, sample_type) == (0x01C2, 0, 0)
    assert read_format == 0b1011  # enabled, running, no ids, all of the group
    assert flags == 1 << 0 | 1 << 5 | 1 << 6  # disabled, without kernel and hypervisor
    assert data[48:] == bytes(16)
    member = pmu.attribute((4, 0x01C2), user_only=False, leads=False)
    assert struct.unpack_from("=Q", member, 40) == (1 << 6,)


def group_data(enabled, running, *counts):
    return struct.pack(f"={3 + len(counts)}Q", len(counts), enabled, running, *counts)


def test_counts_of_a_group():
    counts = pmu.scaled(group_data(2_000_000, 2_000_000, 7_000, 9_000, 11), EVENTS, False)
    assert counts == Counts(7_000, 9_000, 11, 0.002, 0.002, False)
    assert counts.hertz == pytest.approx(3.5e6)


def test_a_group_that_shared_the_hardware_is_scaled():
    counts = pmu.scaled(group_data(3_000, 1_000, 7, 9, 2), EVENTS, True)
    assert (counts.cycles, counts.instructions, counts.cache_misses) == (21, 27, 6)
    assert (counts.seconds_enabled, counts.seconds_running) == (3e-6, 1e-6)
    assert counts.user_only


def test_a_group_that_never_had_the_hardware():
    with pytest.raises(ClockError, match="others held the processor's counters"):
        pmu.scaled(group_data(3_000, 0, 0, 0, 0), EVENTS, False)
    assert pmu.scaled(group_data(0, 0, 0, 0, 0), EVENTS, False).cycles == 0


def test_events_that_are_not_there_are_none():
    counts = pmu.scaled(group_data(5, 5, 7, 11), (CYCLES, CACHE_MISSES), False)
    assert counts == Counts(7, None, 11, 5e-9, 5e-9, False)
    only = pmu.scaled(group_data(5, 5, 7), (CYCLES,), False)
    assert (only.instructions, only.cache_misses) == (None, None)


def test_what_came_after_an_earlier_read():
    earlier, later = Counts(10, 20, None, 1.0, 0.5, True), Counts(15, 32, None, 1.75, 1.0, True)
    assert later.since(earlier) == Counts(5, 12, None, 0.75, 0.5, True)


# Why not, and what would allow it


@pytest.mark.parametrize(
    ("code", "paranoid", "sentence"),
    [
        (errno.EACCES, 3, "kernel.perf_event_paranoid is 3; `sysctl kernel.perf_event_paranoid=2`"),
        (errno.EPERM, 4, "CAP_PERFMON, would allow them"),
        (errno.EPERM, 2, "seccomp profile that lets the call through"),
        (errno.EACCES, None, "CAP_PERFMON would allow it"),
        (errno.ENOENT, 2, "as in most virtual machines; a host that passes them on"),
        (errno.EOPNOTSUPP, 2, "the processor's counters are not there"),
        (errno.ENOSYS, None, "a Linux kernel with CONFIG_PERF_EVENTS"),
        (errno.EMFILE, 2, "`ulimit -n`"),
        (errno.EINVAL, 2, os.strerror(errno.EINVAL)),
    ],
)
def test_refusals_say_what_would_allow_it(code, paranoid, sentence):
    text = pmu.refusal(code, paranoid)
    assert text.startswith("No cycle counts: ") and text.endswith(".") and sentence in text


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EPERM])
def test_a_refusal_is_a_clock_error(monkeypatch, code):
    asked = []

    def refuse(event, thread_id, group, user_only):
        asked.append(user_only)
        raise OSError(code, "no")

    monkeypatch.setattr(pmu, "_open", refuse)
    monkeypatch.setattr(pmu, "_paranoid", lambda: 2)
    with pytest.raises(ClockError, match="No cycle counts"):
        pmu.open_groups([1, 2])
    # Without permission for the kernel's cycles, the user's alone are asked for.
    assert asked == ([False, True] if code == errno.EPERM else [False])


def test_groups_opened_before_a_refusal_are_closed(monkeypatch):
    closed = []

    class One:
        def __init__(self, thread_id):
            if thread_id == 3:
                raise ClockError("no third.")
            self.thread_id = thread_id

        def close(self):
            closed.append(self.thread_id)

    monkeypatch.setattr(pmu, "Group", One)
    with pytest.raises(ClockError, match="no third"):
        pmu.open_groups([1, 2, 3, 4])
    assert closed == [1, 2]


# Reads from user space, with a page and registers of our own


class FakePage:
    """A `perf_event_mmap_page` whose registers are ours; `changes` happen during a read."""

    def __init__(self):
        self.page = np.zeros(4096, np.uint8)
        self.registers, self.read, self.changes = np.zeros(8, np.int64), [], []

        def read_register(number):
            self.read.append(number)
            if self.changes:
                self.changes.pop(0)()

        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int64)(read_register)
        called = ctypes.cast(self._callback, ctypes.c_void_p).value

        def emit(emitter, number):
            number = emitter.cast(number, I64, "sext")
            emitter.call_address(emitter.constant(called), number)
            return emitter.load(number * 8 + self.registers.ctypes.data)

        unit, self._compiler = pmc_unit(emit), Compiler()
        self._compiler._link(unit, _compile(unit, self._compiler.target))

    def set(self, *, index=1, offset=0, capabilities=0b100, width=48, register=0):
        """As the kernel writes it: the lock is another number afterwards."""
        lock = struct.unpack_from("=I", self.page, 8)[0] + 2
        struct.pack_into("=IIqQQQH", self.page, 8, lock, index, offset, 0, 0, capabilities, width)
        if index:
            self.registers[index - 1] = register

    def count(self):
        out = np.zeros(2, np.int64)
        read = callable_at(self._compiler.address("read_pmc"), 2)
        read(self.page.ctypes.data, out.ctypes.data)
        return int(out[0]) if out[1] else None


@pytest.fixture(scope="module")
def fake_page():
    return FakePage()


@pytest.mark.parametrize(
    ("width", "register", "offset", "count"),
    [
        (48, 5, 0, 5),
        (48, 5, 1 << 40, (1 << 40) + 5),
        (48, 5 | 0x2BCD << 48, 100, 105),  # what lies above the counter's width is not its own
        (48, (1 << 48) - 3, 100, 97),  # it starts below zero, to overflow where it is due
        (48, 1 << 47, 1 << 47, 0),
        (40, (1 << 40) - 1, 7, 6),
        (64, -9, 10, 1),
    ],
)
def test_a_count_is_the_register_and_the_offset(fake_page, width, register, offset, count):
    fake_page.set(index=3, width=width, register=register, offset=offset)
    fake_page.read.clear()
    assert fake_page.count() == count
    assert fake_page.read == [2]


@pytest.mark.parametrize("why", [{"index": 0}, {"capabilities": 0b11011}])
def test_a_count_that_cannot_be_read_here(fake_page, why):
    fake_page.set(register=5, **why)
    fake_page.read.clear()
    assert fake_page.count() is None
    assert fake_page.read == []


def test_a_page_that_changes_meanwhile_is_read_again(fake_page):
    """The thread went to another core in the middle: another register, and another offset."""
    fake_page.set(index=1, register=5, offset=1000)
    fake_page.changes = [
        lambda: fake_page.set(index=4, register=6, offset=2000),
        lambda: fake_page.set(index=2, register=7, offset=3000),
    ]
    fake_page.read.clear()
    assert fake_page.count() == 3007
    assert fake_page.read == [0, 3, 1]


def test_a_count_that_goes_away_meanwhile(fake_page):
    fake_page.set(index=1, register=5)
    fake_page.changes = [lambda: fake_page.set(index=0)]
    assert fake_page.count() is None


@pytest.mark.skipif(not IS_X86, reason="looks for x86 instructions")
def test_the_register_is_read_without_a_system_call():
    text = assembly(pmc_unit(), make_target("plain"))
    assert text.count("rdpmc") == 1 and "call" not in text


# The system call, on events that need no hardware


def group_or_skip(thread_id, events):
    try:
        return Group(thread_id, events)
    except ClockError as error:
        pytest.skip(str(error))


def open_files():
    return sorted(os.listdir("/proc/self/fd"))


@linux_only
def test_a_group_counts_its_own_thread():
    before = open_files()
    group = group_or_skip(threading.get_native_id(), (TASK_CLOCK, PAGE_FAULTS))
    first = group.read()
    fresh = np.zeros(1 << 22, np.uint8)
    fresh[::4096] = 1
    later = group.read()
    # Nanoseconds that the thread ran, here.
    assert later.cycles > first.cycles > 0
    assert later.since(first).seconds_enabled > 0
    assert later.seconds_running == later.seconds_enabled
    assert (later.instructions, later.cache_misses) == (None, None)
    assert group.cycles() > later.cycles
    group.close()
    group.close()
    assert open_files() == before


@linux_only
def test_a_group_counts_another_thread_from_outside():
    work, end = threading.Event(), threading.Event()

    def run():
        work.wait()
        for _ in range(1000):
            sum(range(100))
        work.clear()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        group = group_or_skip(thread.native_id, (TASK_CLOCK,))
        asleep = group.read()
        work.set()
        while work.is_set():
            pass
        assert group.read().cycles > asleep.cycles
        assert group.cycles() > asleep.cycles
        group.close()
    finally:
        work.set()
        end.set()
        thread.join()


@linux_only
def test_an_event_that_is_not_there_is_left_out():
    before = open_files()
    group = group_or_skip(threading.get_native_id(), (TASK_CLOCK, UNKNOWN, PAGE_FAULTS))
    assert group._events == [TASK_CLOCK, PAGE_FAULTS]
    assert group.read().cycles > 0
    group.close()
    with pytest.raises(ClockError, match="No cycle counts"):
        Group(threading.get_native_id(), (UNKNOWN, TASK_CLOCK))
    assert open_files() == before


# The hardware's own, where there is any


def test_the_processors_counts():
    try:
        (group,) = pmu.open_groups([threading.get_native_id()])
    except ClockError as error:
        pytest.skip(str(error))
    first, cycles = group.read(), group.cycles()
    sum(range(100_000))
    later = group.read()
    assert later.cycles > first.cycles > 0
    assert group.cycles() > cycles > 0
    if INSTRUCTIONS in group._events:
        assert later.since(first).instructions > 100_000
    pmu.close_groups([group])
