"""The clock of a server, on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from cyclewise.clock.counter import open_counter
from cyclewise.clock.limits import Limits
from cyclewise.clock.live import CAPACITY, MOST_LIMITS, LiveClock
from cyclewise.engine.engine import Engine
from cyclewise.errors import ClockError
from cyclewise.machine.costs import BatchShape
from cyclewise.machine.profile import MachineProfile
from cyclewise.models import load_model
from tests.clock.test_run import ROOFS
from tests.models.tiny import Tiny, write


@pytest.fixture(params=[1, 2])
def model(tmp_path, request):
    try:
        open_counter()
    except ClockError as error:
        pytest.skip(str(error))
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=1024, format="Q8_0"))
    loaded = load_model(path, threads=request.param)
    yield loaded
    loaded.close()


def test_single_steps(model, monkeypatch):
    profile = MachineProfile("cpu", "target", 2, ROOFS)
    monkeypatch.setattr("cyclewise.clock.live.load_profile", lambda: profile)
    engine, clock = Engine(model), LiveClock(model.machine)
    sequence = engine.new_sequence()
    plain = engine.evaluate(sequence, [1, 2, 3])
    clock.turn(True)  # nothing is ready: the plain loop runs
    engine.evaluate(sequence, [4])
    assert clock.read() is None and model.machine._stamps is None
    clock.prepare()
    engine.free(sequence)
    clock.turn(True)
    assert np.array_equal(engine.evaluate(sequence, [1, 2, 3]), plain)
    first = clock.read()
    assert first.shape == BatchShape(((3, 0),), 1)
    assert first.over.shape == (model.machine.num_threads, len(model.machine.program.moments) + 1)
    clock.turn(False)
    engine.evaluate(sequence, [4])
    assert clock.read() is None
    steps = []
    for _ in range(2 * CAPACITY):
        clock.turn(True)
        engine.evaluate(sequence, [1])
        steps.append(clock.read())
    steps = [step for step in steps if step is not None]  # a helper may have slept through some
    assert steps and steps[-1].shape.num_tokens == 1
    found = clock.explain([first, steps[0]])
    assert list(found.seconds) == clock.names and "attention.qkv" in clock.names
    limits = Limits(ROOFS, model.machine.program, model.machine.num_threads)
    least = sum(limits.program_seconds(step.shape) for step in (first, steps[0]))
    assert sum(found.limits.values()) == pytest.approx(least)
    assert found.cycles is None or found.cycles > 0
    assert clock.explain([first] * (MOST_LIMITS + 1)).limits is None


def test_a_machine_that_nobody_has_measured(model, monkeypatch):
    monkeypatch.setattr("cyclewise.clock.live.load_profile", lambda: None)
    engine, clock = Engine(model), LiveClock(model.machine)
    clock.prepare()
    clock.turn(True)
    engine.evaluate(engine.new_sequence(), [1])
    assert clock.explain([clock.read()]).limits is None


def test_whoever_sees_the_end_of_a_moment_first(model):
    """A thread that sleeps finds the moments done by another."""
    if model.machine.num_threads == 1:
        return
    clock = LiveClock(model.machine)
    clock.prepare()
    clock.turn(True)
    Engine(model).evaluate(Engine(model).new_sequence(), [1])
    ticks = clock._stamps.ticks[-1]
    num = ticks.shape[1]
    ticks[0, :, 1] = [100, *[900] * (num - 1)]  # slept in the first moment
    ticks[1, :, 1] = 100 + 10 * np.arange(num)
    ticks[1, -1, 1] = 0  # and the other has not written its last
    rate = clock._calibration.ticks_per_second
    seconds = clock.explain([clock.read()]).seconds
    assert sum(seconds.values()) * rate == pytest.approx(800)
    assert seconds["embed"] * rate == pytest.approx(10)
