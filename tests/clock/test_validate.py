from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import cyclewise.clock.run as run
import cyclewise.clock.validate as module
from cyclewise.clock.calibrate import COUNTS
from cyclewise.clock.roofs import thread_counts
from cyclewise.clock.validate import (
    GRID,
    LEAST_BAND,
    PHASES,
    Case,
    Errors,
    Validation,
    print_validation,
    validate_model,
)
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.profile import MachineProfile
from cyclewise.models import load_model
from tests.clock.forecasts import BANDWIDTH, kernel_costs
from tests.clock.test_run import ROOFS, counter
from tests.engine.toy import ToyTokenizer
from tests.models.tiny import Tiny, write

__all__ = ["counter"]  # a fixture: without a counter nothing is measured

SHORT_GRID = ((40, 1), (700, 1), (96, 2), (150, 4))
MACHINE = MachineProfile("test", "avx2", 2, ROOFS, predictor={"kernels": "k"})


def test_errors_keep_their_sign():
    errors = Errors.of([0.01, -0.02, 0.03, -0.04, 0.05, -0.06, 0.07, -0.08, 0.09, -0.5])
    assert errors.cases == 10
    assert errors.mean == pytest.approx(-0.045)
    assert (errors.p50, errors.p90, errors.p99) == (0.05, 0.09, -0.5)
    assert errors.median_absolute == pytest.approx(0.055)


def test_one_case_is_all_its_percentiles():
    errors = Errors.of([-0.1])
    assert (errors.p50, errors.p90, errors.p99, errors.median_absolute) == (-0.1, -0.1, -0.1, 0.1)


@given(st.lists(st.floats(-1, 10), min_size=1, max_size=60))
def test_so_many_errors_are_no_larger(errors):
    found = Errors.of(errors)
    for share, at in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert at in errors
        assert sum(abs(error) <= abs(at) for error in errors) >= share * len(errors)


def test_nothing_of_the_grid_was_calibrated():
    """Neither its prompts nor its batches are sizes that the kernels were measured at."""
    assert not {prompt for prompt, _ in GRID} & set(COUNTS)
    assert len({prompt for prompt, _ in GRID}) == len(GRID)
    assert 2 * len(GRID) >= 10


@pytest.fixture
def model(tmp_path, monkeypatch, counter):
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(module, "GRID", SHORT_GRID)
    monkeypatch.setattr(run, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(
        module, "calibrated",
        lambda machine, formats, threads, progress: (machine, kernel_costs(*formats)),
    )  # fmt: skip
    monkeypatch.setattr(module, "usual_bandwidth", lambda machine, num_bytes: BANDWIDTH)
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=512, format="Q8_0"))
    loaded = load_model(path)
    yield loaded
    loaded.close()


def test_what_fits_is_measured_in_both_phases(model, monkeypatch):
    kept = []
    monkeypatch.setattr(module, "save_profile", kept.append)
    validation = validate_model(model, ToyTokenizer(), MACHINE)
    fitting = [(40, 1), (96, 2)]
    expected = [
        (phase, prompt, batch, threads)
        for phase in PHASES
        for threads in thread_counts(model.machine.num_threads)
        for prompt, batch in fitting
    ]
    found = [(c.phase, c.prompt_tokens, c.batch, c.threads) for c in validation.cases]
    assert sorted(found) == sorted(expected)
    assert all(case.measured > 0 and case.predicted > 0 for case in validation.cases)
    # The bands of later predictions.
    [machine] = kept
    assert machine.predictor["kernels"] == "k"
    errors = [max(LEAST_BAND, abs(validation.errors(phase).p90)) for phase in PHASES]
    assert machine.predictor["bands"] == errors


def test_a_context_that_is_too_short_is_refused(tmp_path, counter):
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=48, format="Q8_0"))
    model = load_model(path, threads=1)
    try:
        with pytest.raises(InvalidParameterError, match="a context of 48 is too short"):
            validate_model(model, ToyTokenizer(), MACHINE)
    finally:
        model.close()


def test_it_is_printed_in_eighty_columns_and_as_json():
    cases = tuple(
        Case(phase, 700, 2, 2, 1.5, 1.6, error) for phase in PHASES for error in (0.05, -0.1, 0.02)
    )
    validation = Validation("a-model-with-quite-a-long-name.gguf", cases)
    out = io.StringIO()
    print_validation(validation, Console(file=out, width=80, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "decode" in lines[-1] and "-1.0%" in lines[-1] and "+5.0%" in lines[-1]
    values = validation.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["decode"]["median_absolute"] == 0.05
    assert len(values["cases"]) == 6
