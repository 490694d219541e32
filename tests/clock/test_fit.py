from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclewise.clock.fit import (
    CONSTANT,
    INVERSE,
    LINEAR,
    QUADRATIC,
    Law,
    Term,
    combined,
    fit,
    fit_terms,
    median_error,
)
from cyclewise.errors import InvalidParameterError

LOG, LINEAR_LOG = Term(0, 1), Term(1, 1)
X = np.geomspace(64, 2048, 15).round()
LAWS = {
    "constant": Law((CONSTANT,), (5e6,)),
    "logarithmic": Law((LOG,), (1e4,)),
    "linear": Law((LINEAR,), (1e6,)),
    "linear from a constant": Law((CONSTANT, LINEAR), (1e7, 2e4)),
    "linearithmic": Law((LINEAR_LOG,), (1e4,)),
    "quadratic": Law((QUADRATIC,), (300.0,)),
    "prefill": Law((LINEAR, QUADRATIC), (2e6, 900.0)),
    "all three": Law((CONSTANT, LINEAR, QUADRATIC), (3e8, 1e6, 500.0)),
}


def noisy(law: Law, x: np.ndarray, noise: float, seed: int) -> np.ndarray:
    return law.at(x) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x)))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_law_without_noise_is_found_exactly(law):
    found = fit(X, law.at(X))
    assert found.terms == law.terms
    np.testing.assert_allclose(found.coefficients, law.coefficients, rtol=1e-9)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("noise", [0.03, 0.05])
def test_a_law_is_found_through_noise(law, noise):
    found = [fit(X, noisy(law, X, noise, seed)) for seed in range(20)]
    right = [each for each in found if each.terms == law.terms]
    assert len(right) >= 16
    coefficients = np.median([each.coefficients for each in right], axis=0)
    np.testing.assert_allclose(coefficients, law.coefficients, rtol=2 * noise)
    wrong = [median_error(each, X, law.at(X)) for each in found]
    assert max(wrong) < noise, "a law with other terms still predicts"


@given(st.sampled_from([*LAWS]), st.floats(1e-3, 1e9), st.floats(0.1, 10), st.integers(8, 20))
def test_a_law_is_found_in_any_unit_and_range(name, unit, stretch, count):
    law = LAWS[name].scaled(unit)
    x = np.geomspace(64, 2048 * stretch, count)
    found = fit(x, law.at(x))
    assert median_error(found, x, law.at(x)) < 2e-3
    assert len(found.terms) <= len(law.terms)


@given(st.data())
def test_coefficients_are_never_negative(data):
    count = data.draw(st.integers(5, 12))
    y = data.draw(st.lists(st.floats(1, 1e6), min_size=count, max_size=count))
    law = fit(X[:count], y)
    assert law.terms and min(law.coefficients) > 0
    assert np.all(law.at(X) > 0)


@pytest.mark.parametrize("name", ["linear", "linear from a constant", "quadratic"])
@pytest.mark.parametrize("factor", [3.0, 0.3])
def test_an_outlier_does_not_pull(name, factor):
    law = LAWS[name]
    for at in (1, 6, 13):
        y = noisy(law, X, 0.02, at)
        y[at] *= factor
        found = fit(X, y)
        assert found.terms == law.terms
        np.testing.assert_allclose(found.coefficients, law.coefficients, rtol=0.06)


def test_a_term_that_falls_is_not_made_up():
    y = 1e6 / X
    assert fit(X, y).terms == (CONSTANT,)
    found = fit_terms(X, 1e6 + 3e6 / X, (CONSTANT, INVERSE), "threads")
    np.testing.assert_allclose(found.coefficients, (1e6, 3e6))
    assert found.text == "1e+06 + 3e+06 / threads"


def test_only_the_given_terms_are_chosen_from():
    y = noisy(LAWS["prefill"], X, 0.02, 0)
    assert fit(X, y, growing=(LINEAR,)).terms in ((LINEAR,), (CONSTANT, LINEAR))


def test_given_terms_stay_unless_they_come_out_as_zero():
    y = LAWS["linear"].at(X)
    assert fit_terms(X, y, (LINEAR, QUADRATIC)).terms == (LINEAR,)
    found = fit_terms([1, 2], [30.0, 20.0], (CONSTANT, INVERSE))
    np.testing.assert_allclose(found.coefficients, (10, 20))


def test_too_few_points_are_refused():
    with pytest.raises(
        InvalidParameterError, match="at least 5 different values of n; there are 4"
    ):
        fit([1, 2, 3, 4, 4], [1, 2, 3, 4, 4])
    with pytest.raises(InvalidParameterError, match="at least 2 different values of threads"):
        fit_terms([2], [1.0], (CONSTANT, INVERSE), "threads")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_points_must_be_finite_and_positive(bad):
    with pytest.raises(InvalidParameterError, match="finite points above zero"):
        fit(X, [*X[:-1], bad])
    with pytest.raises(InvalidParameterError, match="finite points above zero"):
        fit([*X[:-1], bad], X)


def test_a_law_reads_as_it_is_written():
    law = Law((CONSTANT, LINEAR, QUADRATIC), (12.0, 1.2e6, 35.0))
    assert law.text == "12 + 1.2e+06 n + 35 n^2"
    assert Law((LINEAR,), (7610.0,), "context").text == "7.61e+03 context"
    assert (
        Law((LOG, LINEAR_LOG, Term(2, 1)), (1.0, 2.0, 3.0)).text
        == "1 log n + 2 n log n + 3 n^2 log n"
    )
    assert [t.form("threads") for t in (CONSTANT, INVERSE)] == ["1", "1/threads"]
    assert law.at([10.0]).tolist() == [12 + 1.2e7 + 3500]
    assert law.coefficient(QUADRATIC) == 35 and law.coefficient(LOG) == 0
    assert law.dominant(1) == LINEAR and law.dominant(1e6) == QUADRATIC


def test_laws_add_up():
    laws = [LAWS["all three"], LAWS["linear"], LAWS["logarithmic"]]
    total = combined(laws)
    assert total.terms == (CONSTANT, LOG, LINEAR, QUADRATIC)
    np.testing.assert_allclose(total.at(X), sum(law.at(X) for law in laws))
