"""The clocked loop: what it stamps, where, and that the plain one holds nothing of it."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest

from cyclewise.machine.kernels.compiler import assembly
from cyclewise.machine.kernels.layout import STEP, STEP_BYTES, STEPS_AT, THREAD
from cyclewise.machine.kernels.loop import clocked_loop_unit, loop_unit
from cyclewise.machine.kernels.probes import probes_unit
from cyclewise.machine.kernels.target import INSTRUCTION_SETS, IS_X86, X86_SETS, make_target
from cyclewise.machine.machine import Chunk
from cyclewise.machine.stamps import Stamps
from cyclewise.models import load_model
from tests.machine.kernel_calls import kernel
from tests.machine.test_loop import SECONDS, Loop
from tests.models import tiny
from tests.models.tiny import Tiny

COUNTER = re.compile(r"\b(?:rdtscp?|rdpmc|cntvct_el0|cntvctss_el0|cntpct_el0)\b", re.IGNORECASE)
SITES = 1 + 1 + 2
"""Where the loop stamps: the start, a replicated moment's end, and a shared moment's two."""

x86_only = pytest.mark.skipif(not IS_X86, reason="looks for x86 instructions")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_only_the_clocked_loop_reads_a_counter(name):
    target = make_target(name)
    plain = assembly(loop_unit(), target)
    assert "execute:" in plain and "step:" in plain
    assert COUNTER.findall(plain) == []
    assert len(COUNTER.findall(assembly(clocked_loop_unit(), target))) == SITES


@x86_only
@pytest.mark.parametrize("name", [*X86_SETS, "plain"])
def test_the_reads_are_where_they_were_written(name):
    """The first comes before any kernel is called, the next right after the replicated one."""
    text = assembly(clocked_loop_unit(), make_target(name))
    found = re.findall(r"\t(rdtsc|call|j[a-z]+)", text)
    first = found.index("call")
    assert found[:first].count("rdtsc") == 1
    assert found[first + 1] == "rdtsc"
    assert found[first + 2 :].count("rdtsc") == 2


class Clocked(Loop):
    """The same with the clocked loop: `calls` carry the ticks at which they began and ended."""

    def __init__(self, num_threads, moments, capacity=4):
        self.inside = {}
        """What else a moment's kernel does, by the moment's index; it is told the thread."""
        self.stamps = Stamps(len(moments), num_threads, capacity)
        self._read = kernel(probes_unit(), "read_ticks", 1)
        super().__init__(num_threads, moments)
        self._execute = kernel(clocked_loop_unit(), "execute_clocked", 3)
        self._slots = {}

    def ticks(self):
        now = np.zeros(1, np.int64)
        self._read(now)
        return int(now[0])

    def _noting(self, index):
        def note(moment, batch, context, first, last):
            begun = self.ticks()
            thread = (context - self.threads.ctypes.data) // (8 * len(THREAD))
            self.inside.get(index, lambda _: None)(thread)
            with self._lock:
                self.calls.append((index, thread, begun, self.ticks()))

        return note

    def shared(self, epoch):
        shared = super().shared(epoch)
        if epoch not in self._slots:
            self._slots[epoch] = self.stamps.take()
        at = (STEPS_AT + (epoch & 1) * STEP_BYTES) // 8
        shared[at + STEP.index("stamps")] = self._slots[epoch]
        return shared

    def check_order(self, calls, step):
        """Each kernel ran between the stamps of its moment on its thread."""
        ticks = self.stamps.ticks[step]
        for index, thread, begun, ended in calls:
            row = ticks[thread]
            assert row[index, 1] <= begun <= ended <= row[index + 1, 0] <= row[index + 1, 1]
        for thread in {call[1] for call in calls}:
            assert (np.diff(ticks[thread].reshape(-1)) >= 0).all()


MOMENTS = [(7, 1, 0), (40, 3, 0), (2, 5, 1), (1, 1, 0), (0, 1, 1), (13, 100, 0), (3, 1, 1)]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_one_thread_stamps_every_moment_and_the_others_none(num_threads):
    loop = Clocked(num_threads, MOMENTS)
    for step, epoch in enumerate(range(1, 4)):
        before = loop.ticks()
        loop.check_order(loop.execute(epoch), step)
        after = loop.ticks()
        mine = loop.stamps.ticks[step, 0]
        assert (mine >= before).all() and (mine <= after).all()
        assert mine[0, 0] == mine[0, 1] and mine.shape == (len(MOMENTS) + 1, 2)
        replicated = [i + 1 for i, (_, _, whole) in enumerate(MOMENTS) if whole]
        assert (mine[replicated, 0] == mine[replicated, 1]).all()
        assert (loop.stamps.ticks[step, 1:] == 0).all()
    assert loop.stamps.count == 3


def test_a_delay_in_one_moment_comes_out_there():
    loop = Clocked(1, MOMENTS)
    loop.inside[3] = lambda thread: time.sleep(0.1)
    calls = loop.execute(1)
    loop.check_order(calls, 0)
    work, waiting = loop.stamps.spent()[0, 0].T
    ((begun, ended),) = [call[2:] for call in calls if call[0] == 3]
    assert work[3] >= ended - begun
    assert work.argmax() == 3 and waiting.max() < work[3] / 2


def test_a_delay_on_one_thread_is_the_others_waiting():
    loop = Clocked(2, [(2, 1, 0), (2, 1, 0), (2, 1, 0)])
    meeting = threading.Barrier(2, timeout=SECONDS)

    def meet(thread):
        meeting.wait()

    def meet_and_sleep(thread):
        meeting.wait()
        if thread == 1:
            time.sleep(0.1)

    loop.inside = {0: meet, 1: meet_and_sleep}
    calls = loop.execute(1, threads=(0, 1))
    loop.check_order(calls, 0)
    ((begun, ended),) = [call[2:] for call in calls if call[:2] == (1, 1)]
    work, waiting = np.moveaxis(loop.stamps.spent()[0], -1, 0)
    assert work[1, 1] >= ended - begun
    assert loop.stamps.ticks[0, 0, 2, 1] >= ended
    assert waiting.argmax() == 1 and waiting[0, 1] > work[1, 1] / 3


def test_a_thread_that_comes_after_its_step_stamps_only_that_it_came():
    loop = Clocked(2, [(7, 1, 0), (40, 3, 0)])
    loop.execute(1)
    loop.execute(2)
    assert loop.execute(1, threads=(1,)) == []
    late = loop.stamps.ticks[0, 1]
    assert late[0, 0] == late[0, 1] > 0
    assert (late[1:] == 0).all()
    assert (loop.stamps.ticks[1, 1] == 0).all()
    assert (loop.stamps.spent()[0, 1] == 0).all()


def test_a_step_written_over_is_not_stamped():
    loop = Clocked(2, [(7, 1, 0)])
    loop.execute(1)
    assert loop.execute(1, threads=(1,), current=2) == []
    assert (loop.stamps.ticks[0, 1] == 0).all()


# Stamps


def test_slots_do_not_overlap_and_are_whole_cache_lines():
    stamps = Stamps(5, 3, capacity=4)
    taken = [stamps.take() for _ in range(6)]
    assert taken[4:] == [0, 0] and stamps.count == 4
    steps = np.diff(taken[:4])
    assert (steps == steps[0]).all() and steps[0] == 3 * 128 and taken[0] % 64 == 0
    assert stamps.ticks.shape == (4, 3, 6, 2)
    stamps.ticks[:] = np.arange(stamps.ticks.size).reshape(stamps.ticks.shape)
    assert stamps.ticks.max() == stamps.ticks.size - 1


def test_one_of_so_many_steps_is_stamped():
    stamps = Stamps(2, 1, capacity=3, every=4)
    taken = [bool(stamps.take()) for _ in range(20)]
    assert [i for i, wanted in enumerate(taken) if wanted] == [0, 4, 8]


def test_cleared_stamps_are_zeros_again():
    stamps = Stamps(2, 2, capacity=3)
    first = stamps.take()
    stamps.take()
    stamps.ticks[:] = 7
    stamps.clear()
    assert stamps.count == 0 and stamps.ticks.shape == (0, 2, 3, 2) and stamps.shapes == ()
    assert stamps.take() == first
    stamps.take()
    assert (stamps.ticks == 0).all()


# On a machine

MODEL = Tiny(layers=3)
PAGES = np.arange(8, dtype=np.int32)
IDS = np.random.default_rng(0).integers(0, MODEL.vocab, 30).tolist()


@pytest.fixture
def machine(tmp_path):
    tiny.write(tmp_path / "model.gguf", MODEL)
    model = load_model(tmp_path / "model.gguf", threads=2)
    yield model.machine
    model.close()


def logits(machine):
    """Of 20 tokens at once, then 10 one by one: 11 steps."""
    found = [machine.step(IDS[:20], [Chunk(0, 20, 0, PAGES)], range(20)).copy()]
    for at in range(20, 30):
        found.append(machine.step(IDS[at : at + 1], [Chunk(0, 1, at, PAGES)], [0]).copy())
    return np.concatenate(found)


def stamps_for(machine, capacity, every=1):
    return Stamps(len(machine.program.moments), machine.num_threads, capacity, every)


def test_the_clock_changes_no_logit(machine):
    plain = logits(machine)
    stamps = stamps_for(machine, 12)
    machine.clock(stamps)
    clocked = logits(machine)
    machine.clock(None)
    assert stamps.count == 11
    kept = stamps.ticks.copy()
    again = logits(machine)
    machine.settle()
    np.testing.assert_array_equal(clocked, plain)
    np.testing.assert_array_equal(again, plain)
    np.testing.assert_array_equal(stamps.ticks, kept)
    # The caller is always there, and time goes forward from step to step.
    assert (np.diff(kept[:, 0].reshape(-1)) >= 0).all() and kept[0, 0, 0, 0] > 0
    assert [shape.num_tokens for shape in stamps.shapes] == [20] + [1] * 10
    assert (np.diff(stamps.calls.reshape(-1)) >= 0).all()


def test_full_stamps_leave_the_steps_alone(machine):
    plain = logits(machine)
    stamps = stamps_for(machine, 3)
    machine.clock(stamps)
    np.testing.assert_array_equal(logits(machine), plain)
    machine.settle()
    assert stamps.count == 3 and (stamps.ticks[:, 0] > 0).all()
    stamps.clear()
    np.testing.assert_array_equal(logits(machine), plain)
    assert stamps.count == 3 and (stamps.ticks[:, 0] > 0).all()


def test_time_between_steps_is_outside_of_them(machine):
    stamps = stamps_for(machine, 2)
    machine.clock(stamps)
    now, read = np.zeros(3, np.int64), kernel(probes_unit(), "read_ticks", 1)
    read(now)
    machine.step(IDS[:4], [Chunk(0, 4, 0, PAGES)], [3])
    read(now[1:])
    time.sleep(0.01)
    machine.step(IDS[4:5], [Chunk(0, 1, 4, PAGES)], [0])
    read(now[2:])
    first, second = stamps.ticks[:, 0].reshape(2, -1)
    assert now[0] <= first[0] <= first[-1] <= now[1] <= second[0] <= second[-1] <= now[2]
    inside = stamps.spent()[:, 0].sum(axis=(1, 2))
    assert (inside == [first[-1] - first[0], second[-1] - second[0]]).all()


def test_threads_that_come_late_stamp_their_own_step_alone(tmp_path, monkeypatch):
    """Six threads, whatever cores there are: some sleep through steps, some leave in the middle."""
    tiny.write(tmp_path / "model.gguf", MODEL)
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 6)
    monkeypatch.setattr("cyclewise.machine.host.available_cpus", lambda: 6)
    machine = load_model(tmp_path / "model.gguf", threads=6).machine
    assert machine.num_threads == 6
    stamps = stamps_for(machine, 220)
    machine.clock(stamps)
    want = logits(machine)
    for _ in range(19):
        np.testing.assert_array_equal(logits(machine), want)
    machine.settle()
    ticks = stamps.ticks.reshape(stamps.count, 6, -1)
    assert len(ticks) == 20 * 11
    holes = np.diff((ticks > 0).astype(int), axis=2) > 0
    assert not holes.any()
    entries, exits = ticks[:, :, 0], ticks.max(axis=2)
    assert (np.diff(np.maximum.accumulate(ticks, axis=2), axis=2) >= 0).all()
    for thread in range(6):
        (steps,) = np.nonzero(entries[:, thread])
        assert (entries[steps[1:], thread] >= exits[steps[:-1], thread]).all()
        later = steps[steps > 0]
        assert (entries[later, thread] >= exits[later - 1, 0]).all()
    stamps.clear()
    machine.clock(None)
    logits(machine)
    machine.close()
    assert not stamps._ticks.any()


def test_an_interrupted_step_leaves_the_machine_sound(machine):
    """Ctrl-C right before the call into compiled code: nobody waits, and nothing is lost."""
    want = logits(machine)
    stamps = stamps_for(machine, 12)
    machine.clock(stamps)
    threads, step = machine.threads, machine.threads._step

    def interrupt(*arguments):
        threads._step = step
        raise KeyboardInterrupt

    for _ in range(2):
        threads._step = interrupt
        with pytest.raises(KeyboardInterrupt):
            machine.step(IDS[:4], [Chunk(0, 4, 0, PAGES)], [])
        machine.settle()
    np.testing.assert_array_equal(logits(machine), want)
    machine.settle()
    assert [shape.num_tokens for shape in stamps.shapes] == [0, 0, 20] + [1] * 9
    assert (stamps.ticks[:2] == 0).all() and (stamps.ticks[2:, 0] > 0).all()


def test_what_the_next_step_runs_does_not_depend_on_an_interrupted_one(machine):
    """The record of the step was written, stamps and all, when the interruption came."""
    stamps = stamps_for(machine, 12)
    machine.clock(stamps)
    threads, step = machine.threads, machine.threads._step

    def interrupt(*arguments):
        raise KeyboardInterrupt

    threads._step = interrupt
    with pytest.raises(KeyboardInterrupt):
        machine.step(IDS[:4], [Chunk(0, 4, 0, PAGES)], [])
    threads._step = step
    machine.clock(None)
    kept = stamps.ticks.copy()
    for _ in range(3):
        machine.step(IDS[:4], [Chunk(0, 4, 0, PAGES)], [])
    machine.settle()
    np.testing.assert_array_equal(stamps.ticks, kept)


def test_closed_threads_have_settled(machine):
    """A helper that was still on its way when its threads were closed leaves no epoch behind."""
    machine.clock(stamps_for(machine, 4))
    machine.step(IDS[:4], [Chunk(0, 4, 0, PAGES)], [])
    machine.close()
    machine.threads._finished[:] = 0
    machine.clock(None)
