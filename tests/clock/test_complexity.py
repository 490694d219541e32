from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from cyclewise.clock import steps
from cyclewise.clock.complexity import VARIABLES, measure_growth, measure_growth_quickly
from cyclewise.clock.counter import Calibration
from cyclewise.clock.fit import CONSTANT, LINEAR, QUADRATIC
from cyclewise.clock.growth import TOTAL, print_complexity
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.machine import Machine
from cyclewise.machine.names import collapsed, layer_of
from cyclewise.machine.stamps import Stamps
from cyclewise.models import load_model
from tests.models import tiny
from tests.models.tiny import Tiny

MODEL = Tiny(layers=12, context=2048)
TICKS_PER_SECOND, CYCLES_PER_TICK = 1e9, 1.5
MATMULS = {"qkv", "output", "gate_up", "down"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("complexity") / "model.gguf"
    tiny.write(path, MODEL)
    return path


@pytest.fixture
def model(path):
    model = load_model(path, threads=2)
    yield model
    model.close()


def cost(name: str, shape, threads: int) -> int:
    """Ticks that a made-up processor needs for a moment."""
    last = name.rpartition(".")[2]
    if last in MATMULS:
        rows = shape.num_logits if layer_of(name) is None else shape.num_tokens
        return 0 if not rows else (40_000 + 2_000 * rows) // threads + 3_000
    if last == "attend":
        return (700 * shape.num_tokens + 12 * shape.num_pairs()) // threads
    return 500 + 10 * shape.num_tokens


class FakeStamps(Stamps):
    """Stamps whose ticks are those of the made-up processor, whatever the real one did."""

    names: tuple[str, ...] = ()

    @property
    def ticks(self):
        ticks = np.zeros((self.count, self.num_threads, self.num_moments + 1, 2), np.int64)
        for step, shape in enumerate(self.shapes):
            costs = [cost(name, shape, self.num_threads) for name in self.names]
            ticks[step] = 10**6 + np.concatenate([[0], np.cumsum(costs)])[None, :, None]
        if self.num_threads > 1:
            ticks[-1, 1] = 0  # it slept through the last step
        return ticks


class FakeCounter:
    ticks_per_second = TICKS_PER_SECOND

    def calibrate(self, threads=None):
        hertz = TICKS_PER_SECOND * CYCLES_PER_TICK
        return Calibration("tsc+chain", TICKS_PER_SECOND, hertz, True, 1e-8, 0.0, ())


@pytest.fixture
def made_up(monkeypatch):
    """The machine runs; its ticks are made up."""
    clock = Machine.clock

    def clocked(self, stamps):
        if stamps is not None:
            stamps.names = tuple(moment.name for moment in self.program.moments)
        clock(self, stamps)

    monkeypatch.setattr(Machine, "clock", clocked)
    monkeypatch.setattr(steps, "Stamps", FakeStamps)
    monkeypatch.setattr("cyclewise.clock.counter.open_counter", FakeCounter)


def laws_of(growth, variable, phase):
    return {law.name: law for law in growth.laws if (law.variable, law.phase) == (variable, phase)}


def test_the_laws_of_a_made_up_processor_are_found(model, made_up):
    growth = measure_growth(model, rounds=1)
    assert growth.core_hertz == TICKS_PER_SECOND * CYCLES_PER_TICK
    assert growth.counts_cycles and growth.left_out == ()
    prefill = laws_of(growth, "prompt_tokens", "prefill")
    for name in ("attention.qkv", "attention.output", "ffn.gate_up", "ffn.down"):
        law = prefill[f"layers.*.{name}"].law
        assert law.dominant(2048) == LINEAR and law.coefficient(QUADRATIC) == 0
        assert law.coefficient(LINEAR) == pytest.approx(12 * 1000 * CYCLES_PER_TICK, rel=0.05)
    attend = prefill["layers.*.attention.attend"].law
    assert attend.terms == (LINEAR, QUADRATIC)
    assert attend.coefficient(QUADRATIC) == pytest.approx(12 * 3 * CYCLES_PER_TICK, rel=0.02)
    decode = laws_of(growth, "context", "decode")
    assert decode["layers.*.ffn.down"].law.terms == (CONSTANT,)
    assert decode["layers.*.attention.attend"].law.coefficient(LINEAR) == pytest.approx(
        12 * 6 * CYCLES_PER_TICK, rel=0.01
    )
    assert laws_of(growth, "batch", "decode")[TOTAL].law.terms == (CONSTANT, LINEAR)
    for phase in ("prefill", "decode"):
        assert laws_of(growth, "layers", phase)[TOTAL].law.terms[-1] == LINEAR
        threads = laws_of(growth, "threads", phase)[TOTAL]
        assert threads.median_error is None
        assert threads.law.at([1.0, 2.0]) == pytest.approx([p.cycles for p in threads.points])
    for law in growth.laws:
        if law.name == TOTAL and law.variable != "threads":
            assert law.median_error < 0.02


def test_each_moment_has_a_law_and_held_out_points_lie_between_the_others(model, made_up):
    growth = measure_growth(model, ["prompt_tokens"], rounds=1)
    names = list(dict.fromkeys(collapsed(m.name) for m in model.program.moments))
    assert [law.name for law in growth.laws] == [*names, TOTAL]
    for law in growth.laws:
        held_out = [point.held_out for point in law.points]
        assert held_out == [i % 2 == 1 for i in range(15)]
        assert [p.x for p in law.points] == sorted({p.x for p in law.points})
    total = growth.total("prompt_tokens", "prefill")
    sums = np.sum([[p.cycles for p in law.points] for law in growth.laws[:-1]], axis=0)
    assert [p.cycles for p in total.points] == pytest.approx(sums)
    assert growth.total("batch", "decode") is None


def test_the_json_has_the_profile_s_form(model, made_up):
    growth = measure_growth(model, ["context"], rounds=1)
    rows = json.loads(json.dumps(growth.as_list()))
    assert len(rows) == len(growth.laws)
    total = rows[-1]
    assert total.keys() == {
        "name", "class", "phase", "variable", "law", "terms", "points", "median_error",
        "provenance",
    }  # fmt: skip
    assert (total["name"], total["phase"], total["variable"]) == ("total", "decode", "context")
    assert [term["form"] for term in total["terms"]] == ["1", "context"]
    assert rows[0]["class"] == "memory" and total["provenance"] == "measured"
    point = total["points"][1]
    assert point.keys() == {"x", "cycles", "fitted", "held_out"} and point["held_out"]
    assert point["fitted"] == pytest.approx(point["cycles"], rel=0.02)


def test_the_quick_variant_has_prompts_and_context(model, made_up):
    growth = measure_growth_quickly(model)
    assert {law.variable for law in growth.laws} == {"prompt_tokens", "context"}
    total = growth.total("prompt_tokens", "prefill")
    assert total.law.terms[-2:] == (LINEAR, QUADRATIC)
    assert total.median_error < 0.02
    assert growth.total("context", "decode").law.terms == (CONSTANT, LINEAR)


def test_a_little_model_is_measured_on_the_real_clock_and_then_free_again(model):
    said = []
    growth = measure_growth(model, rounds=1, progress=said.append)
    assert {law.variable for law in growth.laws} >= {*VARIABLES} - {"threads"}
    assert min(point.cycles for law in growth.laws for point in law.points) > 0
    assert said[0] == "prompt tokens: round 1 of 1" and said[-1] == ""
    assert model.machine._stamps is None
    batch = steps.decode_step(model.program, 0, 1)
    model.machine.step(batch.token_ids, batch.chunks, batch.logit_rows)


def test_what_cannot_grow_is_left_out_and_said(path, made_up):
    model = load_model(path, threads=1, context=48)
    growth = measure_growth(model, rounds=1)
    quick = measure_growth_quickly(model)
    model.close()
    assert growth.left_out == (
        "The prompt tokens cannot grow here.", "The context cannot grow here.",
        "The batch cannot grow here.", "The threads cannot grow here.",
    )  # fmt: skip
    assert {law.variable for law in growth.laws} == {"layers"}
    assert quick.left_out == ("The context cannot grow here.",)


def test_rounds_are_at_least_one(model):
    with pytest.raises(InvalidParameterError, match="rounds must be at least 1"):
        measure_growth(model, rounds=0)


def test_steps_are_what_the_engine_would_run(model):
    program = model.program
    batches = steps.prefill_steps(program, 700, 512)
    assert [len(batch.token_ids) for batch in batches] == [512, 188]
    assert [batch.logit_rows for batch in batches] == [[], [187]]
    assert [batch.chunks[0].position for batch in batches] == [0, 512]
    batch = steps.decode_step(program, 100, 3)
    assert [(c.start, c.count, c.position) for c in batch.chunks] == [(i, 1, 100) for i in range(3)]
    assert len({int(page) for chunk in batch.chunks for page in chunk.pages}) == 3 * 4
    assert batch.logit_rows == [0, 1, 2]


def test_a_thread_that_slept_does_not_count(model, made_up):
    names = [collapsed(moment.name) for moment in model.program.moments]
    groups = list(dict.fromkeys(names))
    clocked = steps.ClockedMachine(model.machine, groups, 2)
    ticks = clocked.run([steps.decode_step(model.program, 10, 1)] * 2)
    assert ticks.shape == (2, len(groups) + 1)
    np.testing.assert_allclose(ticks[0], ticks[1])
    np.testing.assert_allclose(ticks[:, -1], ticks[:, :-1].sum(1))
    model.machine.clock(None)


def test_the_report_fits_its_width(model, made_up):
    growth = measure_growth(model, rounds=1)
    console = Console(width=80, record=True, file=io.StringIO())
    print_complexity(growth, console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "prefill = " in text and "decode  = " in text and "seconds at 1.50 GHz" in text
    for variable in VARIABLES:
        assert variable.replace("_", " ") in text
