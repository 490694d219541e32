"""Perplexity against its definition, written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest

from cyclewise.bench.perplexity import log_softmax, perplexity, scored_logits
from cyclewise.engine.engine import Engine
from cyclewise.errors import InvalidParameterError
from tests.bench.fakes import FakeVocabulary, fake_model


def naive(
    table: np.ndarray, tokens: list[int], context: int, chunks: int, bos: int | None
) -> float:
    losses = []
    for index in range(chunks):
        chunk = tokens[index * context : (index + 1) * context]
        if bos is not None:
            chunk[0] = bos
        for position in range(context // 2, context - 1):
            row = table[chunk[position]].astype(np.float64)
            probabilities = np.exp(row) / np.exp(row).sum()
            losses.append(-np.log(probabilities[chunk[position + 1]]))
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize("context", [4, 5, 32, 300])
@pytest.mark.parametrize("bos", [None, 3])
def test_against_the_definition(context: int, bos: int | None) -> None:
    model = fake_model()
    tokens = np.random.default_rng(1).integers(40, size=700).tolist()
    vocabulary = FakeVocabulary(bos_id=bos, add_bos=bos is not None)
    result = perplexity(Engine(model), tokens, vocabulary=vocabulary, context=context, chunks=2)
    expected = naive(model.machine.table, tokens, context, 2, bos)
    assert result.perplexity == pytest.approx(expected, rel=1e-7)
    assert result.tokens == 2 * (context - context // 2 - 1)
    assert set(result.as_dict()) >= {"perplexity", "tokens"}


def test_a_bos_that_the_model_does_not_add_is_left_out() -> None:
    tokens = np.random.default_rng(1).integers(40, size=64).tolist()
    given = [FakeVocabulary(bos_id=3), FakeVocabulary()]
    first, second = (
        perplexity(Engine(fake_model()), tokens, vocabulary=v, context=8, chunks=8) for v in given
    )
    assert first == second


def test_the_pages_are_given_back() -> None:
    engine = Engine(fake_model())
    free = engine.pool.num_free
    list(scored_logits(engine, list(range(40))))
    assert engine.pool.num_free == free


def test_large_logits_do_not_overflow() -> None:
    assert log_softmax(np.array([1e4, 1e4], np.float32)) == pytest.approx(np.log([0.5, 0.5]))


@pytest.mark.parametrize(("context", "chunks"), [(512, 2), (3, 1), (8, 0)])
def test_a_short_text_and_bad_counts(context: int, chunks: int) -> None:
    with pytest.raises(InvalidParameterError):
        perplexity(
            Engine(fake_model()),
            list(range(40)) * 20,
            vocabulary=FakeVocabulary(),
            context=context,
            chunks=chunks,
        )
