from __future__ import annotations

from functools import partial

import pytest

import cyclewise.clock.calibrate as module
from cyclewise.clock.calibrate import (
    COUNTS,
    MATRIX_COSTS,
    OTHERS,
    Bench,
    Step,
    batch_of,
    calibrated,
    kind_of,
    usual_bandwidth,
)
from cyclewise.clock.predict import Predictor
from cyclewise.clock.synthetic import SHAPE, synthetic_program
from cyclewise.machine.costs import BatchShape
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.profile import MachineProfile, load_profile
from tests.clock.forecasts import kernel_costs, view
from tests.clock.test_run import ROOFS, counter

__all__ = ["counter"]  # a fixture: without a counter nothing is measured


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What was measured, in order; a computer of its own to keep it on."""
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path))
    done = []

    def matrix_costs(format_name, num_threads):
        done.append(f"{num_threads}/{format_name}")
        return kernel_costs(format_name)[format_name]

    def other_costs(num_threads):
        done.append(f"{num_threads}/others")
        return kernel_costs()["others"]

    monkeypatch.setattr(module, "matrix_costs", matrix_costs)
    monkeypatch.setattr(module, "other_costs", other_costs)
    return done


def machine(predictor=None):
    from cyclewise.machine.host import available_cpus, cpu_name
    from cyclewise.machine.kernels.target import host_target

    return MachineProfile(
        cpu_name(), host_target().name, available_cpus(), ROOFS, predictor=predictor or {}
    )


def quiet(_):
    pass


def test_only_what_is_missing_is_measured(measured):
    first, costs = calibrated(machine(), ["Q8_0", "Q4_1"], 1, quiet)
    assert measured == ["1/others", "1/Q8_0", "1/Q4_1"]
    assert list(costs) == ["others", "Q8_0", "Q4_1"]
    again, costs = calibrated(first, ["Q4_1", "Q6_K"], 1, quiet)
    assert measured[3:] == ["1/Q6_K"]
    calibrated(again, ["Q6_K"], 2, quiet)
    assert measured[4:] == ["2/others", "2/Q6_K"]


def test_costs_are_kept_in_the_machine_profile(measured):
    _, costs = calibrated(machine(), ["Q8_0"], 1, quiet)
    kept = load_profile()
    assert kept is not None
    _, same = calibrated(kept, ["Q8_0"], 1, quiet)
    assert len(measured) == 2 and same == costs


def test_other_kernels_are_measured_again(measured):
    found, _ = calibrated(machine({"kernels": "older", "1/Q8_0": {}}), ["Q8_0"], 1, quiet)
    assert measured == ["1/others", "1/Q8_0"]
    assert found.predictor["kernels"] == host_compiler().key


@pytest.mark.parametrize(
    "damage",
    [
        lambda costs: costs.pop("tile"),
        lambda costs: costs["group"].pop(),
        lambda costs: costs.update(group=["a"] * len(COUNTS)),
        lambda costs: costs.update(group=[-1.0] * len(COUNTS)),
        lambda costs: costs.update(group=[float("nan")] * len(COUNTS)),
        lambda costs: costs.update(group=[float("inf")] * len(COUNTS)),
        lambda costs: costs.update(fixed=3),
    ],
)
def test_costs_that_cannot_be_are_measured_again(measured, damage):
    first, _ = calibrated(machine(), ["Q8_0"], 1, quiet)
    damage(first.predictor["1/Q8_0"])
    _, costs = calibrated(first, ["Q8_0"], 1, quiet)
    assert measured == ["1/others", "1/Q8_0", "1/Q8_0"]
    assert costs["Q8_0"] == kernel_costs("Q8_0")["Q8_0"]


def test_the_lengths_are_those_that_are_checked():
    costs = kernel_costs("Q8_0")
    assert {name: len(values) for name, values in costs["others"].items()} == OTHERS
    assert set(costs["Q8_0"]) == set(MATRIX_COSTS)


def test_kinds():
    names = ["embed", "layers.3.attention.norm", "layers.3.ffn.norm", "layers.0.attention.qkv",
             "layers.12.ffn.down.quantize", "layers.1.ffn.down", "output.norm", "output",
             "output.quantize", "layers.0.attention.output"]  # fmt: skip
    assert [kind_of(name) for name in names] == [
        "embed", "norm", "norm", "qkv", "down.quantize", "down", "norm", "head",
        "output.quantize", "output",
    ]  # fmt: skip


def test_few_tokens_are_sequences_and_many_a_prompt():
    assert batch_of(3) == ([(1, 64)] * 3, 3)
    assert batch_of(64) == ([(64, 0)], 1)


def test_one_slow_round_of_three_does_not_count():
    steps = [Step({"qkv": t}, {"qkv": 2 * t}, 10 * t) for t in (1.0, 9.0, 1.5)]
    assert module._middle(steps) == Step({"qkv": 1.5}, {"qkv": 3.0}, 15.0)


@pytest.fixture(scope="module")
def program():
    return synthetic_program(2, "Q8_0", num_layers=1, context=64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cold", [False, True])
def test_a_bench_times_every_kind(program, counter, threads, cold):
    bench = Bench(program, threads)
    try:
        step = bench.step([(1, 40), (5, 3)], 2, 2, cold)
        kinds = {kind_of(moment.name) for moment in program.moments}
        assert set(step.moments) == set(step.work) == kinds
        assert all(seconds > 0 for seconds in step.moments.values())
        assert (step.bandwidth > 0) == cold
        bench.clear()
        bench.step([(1, 0)], 1, 3, False)
        assert bench.outside() > 0
        assert usual_bandwidth(bench.machine, 1 << 24) > 0
    finally:
        bench.close()


def test_what_is_measured_can_be_predicted_with(monkeypatch, counter):
    """The whole way, with as little as can be measured."""
    monkeypatch.setattr(module, "NUM_LAYERS", 1)
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "COUNTS", (1, 16, 64))
    monkeypatch.setattr(module, "HOST_STEPS", 8)
    monkeypatch.setattr(module, "CONTEXTS", (32, 160))
    small = partial(synthetic_program, num_layers=1)
    monkeypatch.setattr(module, "synthetic_program", small)
    costs = {"Q8_0": module.matrix_costs("Q8_0", 1), "others": module.other_costs(1)}
    for name, values in costs["Q8_0"].items():
        assert len(values) == 3 and all(value >= 0 for value in values), name
    assert costs["Q8_0"]["bandwidth"][0] > 0
    assert len(costs["others"]["attend"]) == 4 and len(costs["others"]["host"]) == 3
    monkeypatch.setattr("cyclewise.clock.predict.COUNTS", (1, 16, 64))
    told = Predictor(costs, 1, 1e10).step(view(), BatchShape(((1, 5),), 1))
    assert 0 < told < 1


def test_super_blocks_are_measured_where_they_fit(monkeypatch, counter):
    monkeypatch.setattr(module, "NUM_LAYERS", 1)
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "COUNTS", (1, 64))
    costs = module.matrix_costs("Q6_K", 1)
    assert costs["fixed"] == costs["tile"] == [0.0, 0.0]
    assert all(value > 0 for value in costs["group"])


def test_synthetic_programs_are_shaped_like_smollm2():
    program = synthetic_program(1, "Q4_0", num_layers=2, context=32, ffn_down="Q4_K")
    assert program.num_layers == 2 and program.vocab_size == SHAPE.vocab_size
    formats = {
        kind_of(moment.name): {matrix.format for matrix in moment.form.matrices}
        for moment in program.moments
        if moment.form.matrices
    }
    assert formats == {
        "qkv": {"Q4_0"}, "output": {"Q4_0"}, "gate_up": {"Q4_0"}, "down": {"Q4_K"},
        "head": {"Q4_0"},
    }  # fmt: skip
