"""A clocked run of a tiny model: what it stamps, what it books, and what becomes a profile."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from cyclewise.clock.account import keep_books
from cyclewise.clock.counter import open_counter
from cyclewise.clock.light import EVERY, LightClock
from cyclewise.clock.profile import make_profile
from cyclewise.clock.run import ClockedRun, Settings, _spans
from cyclewise.engine.engine import Engine
from cyclewise.errors import ClockError, InvalidParameterError
from cyclewise.machine.costs import BatchShape
from cyclewise.machine.profile import Level, Roofs
from cyclewise.models import load_model
from tests.engine.toy import ToyTokenizer
from tests.models.tiny import Tiny, write

ROOFS = Roofs(
    core_hertz=3e9,
    levels=(
        Level("L1", 32768, 1, ((1, 1e11), (2, 2e11))),
        Level("memory", 0, 2, ((1, 2e10), (2, 3e10))),
    ),
    operations={"dot": ((1, 3e11), (2, 6e11)), "fma": ((1, 1e11), (2, 2e11))},
    instructions={"dot": "VPDPBUSD", "fma": "VFMADD"},
    handover_seconds=1e-7,
)


@pytest.fixture(scope="module")
def counter():
    try:
        return open_counter()
    except ClockError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1, 2])
def model(tmp_path, request):
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=1024, format="Q8_0"))
    loaded = load_model(path, threads=request.param)
    yield loaded
    loaded.close()


def test_a_run_has_every_stage_and_adds_up(model, counter):
    settings = Settings(prompt_tokens=300, generate_tokens=6, batch=2, repeats=2)
    with ClockedRun(model, ToyTokenizer(), counter) as run:
        turns = run.turns(settings)
    assert len(turns) == 2
    for turn in turns:
        assert turn.prefill.shapes == (
            BatchShape(((300, 0), (212, 0)), 1),
            BatchShape(((88, 212),), 1),
        )
        assert turn.decode.shapes == tuple(
            BatchShape(((1, 300 + i), (1, 300 + i)), 2) for i in range(5)
        )
        prefill, decode = turn.prefill, turn.decode
        assert prefill.window[1] == decode.window[0]
        for phase in (prefill, decode):
            threads, moments = model.machine.num_threads, len(model.program.moments)
            assert phase.ticks.shape == (len(phase.shapes), threads, moments + 1, 2)
            starts = [span.start for span in phase.spans]
            assert starts == sorted(starts)
            books = keep_books(phase.ticks, phase.spans, phase.window)
            for account in books.accounts:
                whole = account.moments + account.waiting + account.python + account.unaccounted
                assert whole == account.wall > 0
        names = {span.name for span in prefill.spans}
        assert names == {"tokenizing", "scheduling", "sampling", "detokenizing", "writing"}
        assert {span.name for span in decode.spans} == names - {"tokenizing"}
    profile = make_profile(model, "tiny", turns, settings, ROOFS)
    check_profile(profile, model)


def check_profile(profile, model):
    """What a script may rely on."""
    json.dumps(profile, allow_nan=False)
    names = [moment.name for moment in model.program.moments]
    for phase in ("prefill", "decode"):
        rows = [row for row in profile["moments"] if row["phase"] == phase]
        assert [row["name"] for row in rows if row["class"] != "host"] == names
        spent = sum(row["cycles"] + row["waiting_cycles"] for row in rows)
        lost = sum(a["unaccounted"] for a in profile["accounts"] if a["phase"] == phase)
        threads = profile["settings"]["threads"]
        units = profile["settings"]["generate_tokens"] - 1 if phase == "decode" else 1
        # Helpers' time between steps is no moment's: it waits for Python and for what is lost.
        wall = profile[phase]["cycles"]
        assert spent <= wall * 1.0001
        if threads == 1:
            assert spent + lost / units == pytest.approx(wall, rel=1e-6)
        assert all(row["limit_cycles"] > 0 for row in rows if row["class"] != "host")
        assert all(len(row["samples"]) == profile["settings"]["repeats"] for row in rows)
    assert profile["cycles_per_token"] * profile["settings"]["batch"] == pytest.approx(
        profile["decode"]["cycles"]
    )
    steps = profile["settings"]["repeats"] * (profile["settings"]["generate_tokens"] - 1)
    assert len(profile["tokens"]) == steps
    assert len(profile["timeline"]["threads"]) == profile["settings"]["threads"]
    assert {len(moments) for moments in profile["timeline"]["threads"]} == {len(names)}


def test_what_does_not_fit_is_said_before_anything_runs(model, counter):
    with ClockedRun(model, ToyTokenizer(), counter) as run:
        for settings, what in (
            (Settings(prompt_tokens=0), "prompt_tokens must be at least 1"),
            (Settings(generate_tokens=1), "generate_tokens must be at least 2"),
            (Settings(batch=0), "batch must be at least 1"),
            (Settings(repeats=0), "repeats must be at least 1"),
            (Settings(prompt_tokens=1020), "do not fit"),
            (Settings(prompt_tokens=512, batch=2), "do not fit"),
        ):
            with pytest.raises(InvalidParameterError, match=what):
                run.turns(settings)


def test_a_run_leaves_the_plain_loop_behind(model, counter):
    engine = Engine(model)
    before = engine.evaluate(engine.new_sequence(), [1, 2, 3]).copy()
    with ClockedRun(model, ToyTokenizer(), counter) as run:
        run.turns(Settings(8, 3, 1, 1))
    assert model.machine._stamps is None
    np.testing.assert_array_equal(engine.evaluate(engine.new_sequence(), [1, 2, 3]), before)


def test_laps_without_the_calls_in_them():
    laps = [("tokenizing", 0, 10), ("scheduling", 10, 40), ("sampling", 40, 50)]
    spans = _spans(laps, np.array([[15, 35]]), lambda nanoseconds: 2 * nanoseconds)
    assert [(span.name, span.start, span.end) for span in spans] == [
        ("tokenizing", 0, 20), ("scheduling", 20, 30),
        ("scheduling", 70, 80), ("sampling", 80, 100),
    ]  # fmt: skip


def test_a_delay_between_steps_is_pythons(model, counter, monkeypatch):
    """A detokenizer that takes five milliseconds, and nothing else becomes slower by as much."""
    tokenizer = ToyTokenizer()
    stream = tokenizer.stream

    def slow(prompt_ids):
        detokenizer = stream(prompt_ids)
        push = detokenizer.push
        detokenizer.push = lambda token_id: (time.sleep(0.005), push(token_id))[1]
        return detokenizer

    monkeypatch.setattr(tokenizer, "stream", slow)
    settings = Settings(8, 5, 1, 1)
    with ClockedRun(model, tokenizer, counter) as run:
        profile = make_profile(model, "tiny", run.turns(settings), settings, ROOFS)
    rows = [row for row in profile["moments"] if row["phase"] == "decode"]
    spent = {row["name"]: row["cycles"] + row["waiting_cycles"] for row in rows}
    delay = 0.005 * profile["clock"]["core_hertz"]
    assert spent["detokenizing"] >= 0.9 * delay
    assert max(spent, key=spent.__getitem__) == "detokenizing"


def test_the_light_clock_counts_one_step_in_sixteen(model, counter):
    engine = Engine(model)
    clock = LightClock(model.machine, counter)
    sequence = engine.new_sequence()
    engine.evaluate(sequence, [1] * 20)
    for _ in range(2 * EVERY):
        engine.evaluate(sequence, [1])
    sums = clock.read()
    assert (sums["prefill"].steps, sums["prefill"].tokens) == (1, 20)
    assert (sums["decode"].steps, sums["decode"].tokens) == (2, 2)
    for reading in sums.values():
        assert set(reading.working) == set(reading.waiting)
        assert "layers.*.ffn.down" in reading.working
        spent = sum(reading.working.values()) + sum(reading.waiting.values())
        if model.machine.num_threads == 1:
            assert spent == pytest.approx(reading.seconds)
        assert spent > 0
    before = sums["decode"].seconds
    for _ in range(EVERY):
        engine.evaluate(sequence, [1])
    assert clock.read()["decode"].seconds > before
    assert clock.read()["decode"].steps == 3
    clock.close()
    assert model.machine._stamps is None
