"""Growth laws: cycles as a short sum of powers and logarithms of what they grow with.

Measured points come in, from `complexity.py`; a `Law` goes out. The shape is the performance-model
normal form (Calotoiu, Hoefler, Poke and Wolf, SC'13): a sum of c * x^i * log2(x)^j, here a constant
and at most two terms of a small space, none of them negative.

A logarithm comes alone or with the constant: beside another power no measurement could tell it.
Errors are relative, because cycles span orders of magnitude and noise multiplies them. Which terms
a law has is decided by leaving out one point after another and predicting it from the others; of
the laws that predict nearly as well as the best, the one with the fewest and lowest terms is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cyclewise.errors import InvalidParameterError

MIN_POINTS = 5
"""Different values of the variable that the choice of a law needs."""
OCCAM = 0.5
"""By what share of it a simpler law's error may exceed the best law's."""
NEGLIGIBLE = 1e-3
"""A relative error that is no reason to prefer a law."""
OUTLIER = 10.0
"""A point missed by more than so many usual misses counts as one missed by that."""
HUBER = 2.0
"""Residuals beyond so many standard deviations weigh less: the square of Huber's weight (1964),
so that what is far off hardly weighs at all."""
REWEIGHTINGS = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Term:
    """x^power * log2(x)^logs"""

    power: int
    logs: int = 0

    def at(self, x: Floats) -> Floats:
        """The term at positive x."""
        return np.asarray(x ** float(self.power) * np.log2(x) ** self.logs)

    def form(self, symbol: str) -> str:
        """`1`, `n`, `n^2 log n`, `1/n`, with the symbol in place of n."""
        if self.power < 0:
            return f"1/{symbol}"
        power = {0: "", 1: symbol}.get(self.power, f"{symbol}^{self.power}")
        log = f"log {symbol}" if self.logs else ""
        return " ".join(part for part in (power, log) if part) or "1"


CONSTANT, LINEAR, QUADRATIC, INVERSE = Term(0), Term(1), Term(2), Term(-1)
GROWING = (Term(0, 1), LINEAR, Term(1, 1), QUADRATIC, Term(2, 1))
"""The terms that a law is chosen from, beside the constant."""


@dataclass(frozen=True, slots=True)
class Law:
    """A sum of terms, lowest first."""

    terms: tuple[Term, ...]
    coefficients: tuple[float, ...]
    """Positive, one a term."""
    symbol: str = "n"

    def at(self, x: ArrayLike) -> Floats:
        """The law at positive x, of any shape."""
        at = np.asarray(x, np.float64)
        total = np.zeros_like(at)
        for term, coefficient in zip(self.terms, self.coefficients, strict=True):
            total += coefficient * term.at(at)
        return total

    def coefficient(self, term: Term) -> float:
        """The coefficient of a term; 0 if the law has none such."""
        return dict(zip(self.terms, self.coefficients, strict=True)).get(term, 0.0)

    def dominant(self, x: float) -> Term:
        """The term with the largest share at x."""
        at = np.array([x], np.float64)
        pairs = zip(self.terms, self.coefficients, strict=True)
        return max(pairs, key=lambda pair: float(pair[1] * pair[0].at(at)[0]))[0]

    def scaled(self, factor: float) -> Law:
        """The law in another unit."""
        scaled = tuple(factor * coefficient for coefficient in self.coefficients)
        return Law(self.terms, scaled, self.symbol)

    @property
    def text(self) -> str:
        """`1.2e+06 n + 35 n^2`"""
        pairs = zip(self.terms, self.coefficients, strict=True)
        return " + ".join(_product(coefficient, term, self.symbol) for term, coefficient in pairs)


def _product(coefficient: float, term: Term, symbol: str) -> str:
    if term.power < 0:
        return f"{coefficient:.3g} / {symbol}"
    return f"{coefficient:.3g}" + ("" if term == CONSTANT else f" {term.form(symbol)}")


def fit(x: ArrayLike, y: ArrayLike, symbol: str = "n", growing: Sequence[Term] = GROWING) -> Law:
    """The law that predicts points best which it has not seen.

    Args:
        x: (points,), positive; a value may come more than once.
        y: (points,), positive.
        symbol: the variable's name in the law's text.
        growing: the terms to choose from, beside the constant.

    Raises:
        InvalidParameterError: fewer than `MIN_POINTS` different values of x, or values that are not
            positive.
    """
    at, values = _checked(x, y, MIN_POINTS, symbol)
    spaces = _spaces(growing)
    misses = np.stack([_left_out(_design(space, at, values)) for space in spaces])
    usual = max(float(np.median(misses, axis=1).min()), NEGLIGIBLE)
    means = np.minimum(misses, OUTLIER * usual).mean(1)
    allowed = max((1 + OCCAM) * float(means.min()), float(means.min()) + NEGLIGIBLE)
    simplest = int(np.argmax(means <= allowed))
    return _law(spaces[simplest], at, values, symbol)


def fit_terms(x: ArrayLike, y: ArrayLike, terms: Sequence[Term], symbol: str = "n") -> Law:
    """The law made of the given terms, less those that came out as zero.

    Arguments as in `fit`. Raises InvalidParameterError for fewer different values of x than terms,
    or values that are not positive.
    """
    at, values = _checked(x, y, len(terms), symbol)
    return _law(tuple(terms), at, values, symbol)


def combined(laws: Sequence[Law], symbol: str = "n") -> Law:
    """The sum of laws in the same variable."""
    sums: dict[Term, float] = {}
    for law in laws:
        for term, coefficient in zip(law.terms, law.coefficients, strict=True):
            sums[term] = sums.get(term, 0.0) + coefficient
    terms = sorted(sums, key=lambda term: (term.power < 0, term.power, term.logs))
    return Law(tuple(terms), tuple(sums[term] for term in terms), symbol)


def median_error(law: Law, x: ArrayLike, y: ArrayLike) -> float:
    """The median over the points of |law - y| / y."""
    values = np.asarray(y, np.float64)
    return float(np.median(np.abs(law.at(x) / values - 1)))


def _checked(x: ArrayLike, y: ArrayLike, least: int, symbol: str) -> tuple[Floats, Floats]:
    at, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert at.shape == values.shape and at.ndim == 1
    if not (np.all(at > 0) and np.all(values > 0) and np.all(np.isfinite(at * values))):
        raise InvalidParameterError(f"A law in {symbol} needs finite points above zero.")
    distinct = len(np.unique(at))
    if distinct < least:
        raise InvalidParameterError(
            f"A law in {symbol} needs at least {least} different values of {symbol}; "
            f"there are {distinct}."
        )
    return at, values


def _spaces(growing: Sequence[Term]) -> list[tuple[Term, ...]]:
    """The laws to choose from, simplest first. Programs have few logarithms: one counts for two
    more terms.
    """
    powers = [term for term in growing if not term.logs]
    chosen = [(), *((term,) for term in growing), *combinations(powers, 2)]
    spaces = [(CONSTANT, *terms) for terms in chosen] + [terms for terms in chosen if terms]

    def complexity(terms: tuple[Term, ...]) -> tuple[int, float]:
        logs = sum(term.logs for term in terms)
        return len(terms) + 2 * logs, sum(term.power for term in terms) + logs / 2

    return sorted(spaces, key=complexity)


def _design(terms: Sequence[Term], at: Floats, values: Floats) -> Floats:
    """(points, terms): a law's coefficients times it should give ones."""
    return np.asarray(np.stack([term.at(at) for term in terms], axis=1) / values[:, None])


def _law(terms: tuple[Term, ...], at: Floats, values: Floats, symbol: str) -> Law:
    design = _design(terms, at, values)
    coefficients = _solve(design, _robust(design)[None])[0]
    kept = [(t, float(c)) for t, c in zip(terms, coefficients, strict=True) if c > 0]
    return Law(tuple(t for t, _ in kept), tuple(c for _, c in kept), symbol)


def _left_out(design: Floats) -> Floats:
    """(points,): by how much each point is missed by the fit to the others, relative to it."""
    others = _robust(design) * (1 - np.eye(len(design)))
    return np.asarray(np.abs((design * _solve(design, others)).sum(1) - 1))


def _robust(design: Floats) -> Floats:
    """(points,): weights under which an outlier pulls no harder than an ordinary point."""
    weights = np.ones(len(design))
    for _ in range(REWEIGHTINGS):
        residuals = np.abs(design @ _solve(design, weights[None])[0] - 1)
        width = HUBER * max(1.4826 * float(np.median(residuals)), NEGLIGIBLE)
        weights = (width / np.maximum(residuals, width)) ** 2
    return weights


def _solve(design: Floats, weights: Floats) -> Floats:
    """(problems, terms): weighted least squares without negative coefficients.

    The optimum is the ordinary solution on the terms that are not zero in it; there are few enough
    to try every set. `design`: (points, terms); `weights`: (problems, points).
    """
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1
    columns = design / scale
    count = columns.shape[1]
    squares = (columns[:, :, None] * columns[:, None, :]).reshape(-1, count * count)
    products = (weights @ squares).reshape(-1, count, count)
    sides = weights @ columns
    best = np.zeros_like(sides)
    gains = np.zeros(len(weights))
    for size in range(1, count + 1):
        for kept in combinations(range(count), size):
            chosen = list(kept)
            part = np.linalg.solve(products[:, chosen][:, :, chosen], sides[:, chosen, None])[
                ..., 0
            ]
            gain = (part * sides[:, chosen]).sum(1)
            better = (part >= 0).all(1) & (gain > gains)
            gains[better] = gain[better]
            best[better] = 0
            best[np.ix_(better, chosen)] = part[better]
    return np.asarray(best / scale)
