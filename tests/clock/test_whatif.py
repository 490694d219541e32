from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from cyclewise.clock import ledger
from cyclewise.clock import whatif as module
from cyclewise.clock.changes import ACCEPTED, DRAFTED, parse_change
from cyclewise.clock.predict import Times
from cyclewise.clock.run import Settings
from cyclewise.clock.whatif import (
    BAND,
    ELSEWHERE_BAND,
    Estimate,
    Outcome,
    WhatIf,
    WhatIfs,
    advice,
    bands,
    expected_tokens,
    print_whatif,
    usual_questions,
)
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.host import available_cpus
from cyclewise.machine.profile import MachineProfile
from cyclewise.models import load_model
from tests.clock.forecasts import BANDWIDTH, kernel_costs
from tests.clock.test_run import ROOFS, counter
from tests.engine.toy import ToyTokenizer
from tests.models.tiny import Tiny, write

__all__ = ["counter"]  # a fixture: without a counter nothing is measured

MACHINE = MachineProfile(cpu="test", target="avx2", num_cpus=2, roofs=ROOFS)
SETTINGS = Settings(prompt_tokens=60, generate_tokens=5, batch=1, repeats=1)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A loaded model, on a computer whose kernels' costs are known."""
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "cache"))

    def calibrated(machine, formats, num_threads, progress):
        costs = kernel_costs(*formats)
        if "Q4_0" in formats:
            costs["Q4_0"] = {**costs["Q4_0"], "group": [g / 2 for g in costs["Q4_0"]["group"]]}
        return machine, costs

    monkeypatch.setattr(module, "calibrated", calibrated)
    monkeypatch.setattr(module, "usual_bandwidth", lambda machine, num_bytes: BANDWIDTH)
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=512, layers=3, format="Q8_0"))
    loaded = load_model(path, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture
def asked(model):
    return WhatIfs(model, SETTINGS, MACHINE, lambda _: None)


def ask(asked, text):
    return asked.ask(parse_change(text))


def test_what_changes_nothing_gains_nothing(asked):
    answer = ask(asked, "q8_0")
    assert answer.gain == 0.0
    assert answer.after.time_per_token.value == answer.before.per_token
    assert answer.after.time_to_first_token.value == answer.before.first_token


def test_values_lie_in_their_bands(asked):
    for text in ("q4_0", "kv=int8", "threads=1", "batch=3", "prune-heads=0.5", "prune-layers=1",
                 "speculate", "bandwidth=0.5x", "bandwidth=80", "machine=gpu"):  # fmt: skip
        answer = ask(asked, text)
        for estimate in (
            answer.after.time_to_first_token,
            answer.after.time_per_token,
            answer.after.tokens_per_second,
        ):
            assert 0 < estimate.low < estimate.value < estimate.high < math.inf, text
        token, speed = answer.after.time_per_token, answer.after.tokens_per_second
        assert speed.value == pytest.approx(answer.batch / token.value)
        assert answer.gain == pytest.approx(speed.value / answer.usual_speed - 1)


def test_less_work_is_faster(asked):
    for text in ("q4_0", "prune-layers=1", "prune-heads=0.5", "bandwidth=2x"):
        answer = ask(asked, text)
        assert answer.gain > 0, text
        assert answer.after.time_per_token.value < answer.before.per_token, text
    assert ask(asked, "bandwidth=0.5x").gain < 0
    assert ask(asked, "prune-layers=2").gain > ask(asked, "prune-layers=1").gain


def test_a_bandwidth_is_a_factor_or_a_number(asked):
    twice = ask(asked, "bandwidth=2x").after.time_per_token.value
    same = ask(asked, f"bandwidth={2 * BANDWIDTH / 1e9}").after.time_per_token.value
    assert twice == pytest.approx(same)


def test_a_batch_is_slower_for_each_and_faster_for_all(asked):
    answer = ask(asked, "batch=4")
    assert answer.after.time_per_token.value > answer.before.per_token
    assert answer.gain > 0 and answer.batch == 4


def test_speculation_is_a_step_of_more_tokens_that_yields_several(asked):
    answer = ask(asked, "speculate")
    token = answer.after.time_per_token
    per_step = token.value * expected_tokens(DRAFTED, ACCEPTED[1])
    assert per_step > answer.before.per_token
    assert token.low == pytest.approx(per_step / expected_tokens(DRAFTED, ACCEPTED[2]) / (1 + BAND))
    assert token.high == pytest.approx(
        per_step / expected_tokens(DRAFTED, ACCEPTED[0]) * (1 + BAND)
    )


def test_expected_tokens_count_those_before_the_first_refusal():
    assert expected_tokens(4, 0.5) == 1 + 0.5 + 0.25 + 0.125 + 0.0625
    assert expected_tokens(1, 0.8) == pytest.approx(1.8)


def test_another_machine_has_wider_bands_and_a_price(asked):
    answer = ask(asked, "machine=server")
    token = answer.after.time_per_token
    assert token.high == pytest.approx(token.value * (1 + ELSEWHERE_BAND))
    values = answer.as_dict(price_per_hour=3.6)
    speed = values["tokens_per_second"]["value"]
    assert values["cost_per_million_tokens"] == pytest.approx(1e6 * 0.001 / speed)
    assert values["tokens_per_joule"] == pytest.approx(speed / answer.watts)
    assert answer.as_dict()["cost_per_million_tokens"] is None


def test_here_nothing_is_said_of_power(asked):
    assert ask(asked, "batch=2").as_dict()["tokens_per_joule"] is None


def test_bands_are_those_that_validate_found():
    assert bands(MACHINE) == (BAND, BAND)
    for kept, found in (([0.04, 0.09], (0.04, 0.09)), ([0.1], None), (["x", 0.1], None),
                        ([2.0, 0.1], None), ("bands", None)):  # fmt: skip
        machine = MachineProfile("c", "avx2", 2, ROOFS, predictor={"bands": kept})
        assert bands(machine) == (found or (BAND, BAND))


@pytest.mark.parametrize("text", ["batch=2", "prune-layers=2", "threads=1", "kv=int8"])
def test_what_can_be_made_is_measured_and_kept(asked, model, counter, text):
    change = parse_change(text)
    answer = asked.measure(change, asked.ask(change), ToyTokenizer())
    assert answer.measured.first_token > 0 and answer.measured.per_token > 0
    first, each = ledger.read()
    assert (first["quantity"], each["quantity"]) == ("time_to_first_token", "time_per_token")
    assert each["predicted"] == answer.after.time_per_token.value
    assert each["measured"] == answer.measured.per_token
    assert each["error"] == pytest.approx(each["predicted"] / each["measured"] - 1)
    assert (each["change"], each["model"], each["cpu"]) == (text, "tiny.gguf", "test")
    assert each["batch"] == (2 if text == "batch=2" else 1)
    assert answer.as_dict()["measured"]["time_per_token"] == answer.measured.per_token
    # The model is as it was.
    assert model.program.num_layers == 3 and model.machine.num_threads == 1


@pytest.mark.skipif(available_cpus() < 2, reason="one CPU")
def test_more_threads_than_were_loaded(asked, model, counter):
    change = parse_change("threads=2")
    answer = asked.ask(change)
    assert answer.gain > 0
    assert asked.measure(change, answer, ToyTokenizer()).measured.per_token > 0
    assert model.machine.num_threads == 1
    assert f"threads={available_cpus()}" in [q.text for q in usual_questions(model, SETTINGS)]


def test_what_does_not_fit_into_the_context_is_not_measured(asked, counter):
    change = parse_change("batch=50")
    with pytest.raises(InvalidParameterError, match="do not fit"):
        asked.measure(change, asked.ask(change), ToyTokenizer())
    assert ledger.read() == []


def test_the_usual_questions_can_be_asked(asked, model):
    for change in usual_questions(model, SETTINGS):
        values = asked.ask(change).as_dict()
        assert values["change"] == change.text and values["provenance"] == "modelled"
        assert json.loads(json.dumps(values)) == values


def answer_of(change, gain, slower=1.0):
    token = Estimate(0.01 * slower, 0.009 * slower, 0.011 * slower)
    speed = 100 * (1 + gain)
    return WhatIf(
        change, "meaning", Times(0.5, 0.01),
        Outcome(Estimate(0.5, 0.4, 0.6), token, Estimate(speed, 0.9 * speed, 1.1 * speed)),
        gain, None, None, 1, 100.0,
    )  # fmt: skip


def test_advice_is_what_the_project_can_make_and_what_is_worth_it():
    answers = [
        answer_of("q4_0", 0.5),
        answer_of("threads=2", 0.3),
        answer_of("threads=1", -0.4),
        answer_of("bandwidth=2x", 0.8),
        answer_of("batch=4", 1.2, slower=1.8),
        answer_of("batch=2", 0.029),
    ]
    told = advice(answers)
    assert [each["change"] for each in told] == ["batch=4", "threads=2"]
    assert told[0]["gain_fraction"] == 1.2
    assert "decode 4 sequences" in told[0]["sentence"] and "+120%" in told[0]["sentence"]
    assert told[1]["sentence"].startswith("run with --threads 2")
    assert told[1]["low"] < told[1]["gain_fraction"] < told[1]["high"]
    assert advice([]) == []


def test_at_most_three_pieces_of_advice():
    assert len(advice([answer_of(f"threads={n}", 0.1 * n) for n in range(1, 9)])) == 3


def test_it_is_printed_in_eighty_columns(asked, counter):
    change = parse_change("batch=2")
    answers = [
        asked.measure(change, asked.ask(change), ToyTokenizer()),
        ask(asked, "prune-layers=1"),
        ask(asked, "machine=server"),
    ]
    out = io.StringIO()
    print_whatif(answers, 2.5, Console(file=out, width=80, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for expected in ("as it is", "batch=2", "measured", "% off", "machine=server", "a joule",
                     "for a million tokens", "the last 1 layers are left out"):  # fmt: skip
        assert expected in text
