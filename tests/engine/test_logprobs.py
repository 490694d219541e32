from __future__ import annotations

import math

import numpy as np
import pytest

from cyclewise.engine.engine import Engine
from cyclewise.engine.logprobs import score, score_prompt
from cyclewise.errors import CyclewiseError
from tests.engine.toy import VOCAB_SIZE, ToyModel, hashed_logits


def naive(logits):
    exact = [float(value) for value in logits]
    total = math.fsum(math.exp(value - max(exact)) for value in exact)
    return [value - max(exact) - math.log(total) for value in exact]


@pytest.mark.parametrize("size", [1, 50, 3000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 70])
def test_a_score_agrees_with_the_twin(size, num_top):
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(size=size).astype(np.float32) * 5
        logits = np.round(logits * 4) / 4  # with ties
        want = naive(logits)
        got = score(logits, size // 2, num_top)
        assert got.token_id == size // 2
        assert got.logprob == pytest.approx(want[size // 2], abs=1e-5)
        order = sorted(range(size), key=lambda i: (-logits[i], i))[:num_top]
        assert [token for token, _ in got.top] == order
        assert [p for _, p in got.top] == pytest.approx([want[i] for i in order], abs=1e-5)


def test_impossible_tokens_and_damaged_logits():
    logits = np.array([0, -np.inf, 0], dtype=np.float32)
    assert score(logits, 1, 0).logprob == -math.inf
    with pytest.raises(CyclewiseError, match="not finite"):
        score(np.array([0, np.nan], dtype=np.float32), 0, 1)


@pytest.mark.parametrize("count", [1, 2, 9, 65, 70])
def test_a_prompt(count):
    token_ids = np.random.default_rng(count).integers(0, VOCAB_SIZE, count).tolist()
    engine = Engine(ToyModel(context=80))
    sequence = engine.new_sequence()
    scores = list(score_prompt(engine, sequence, token_ids, 2))
    assert sequence.token_ids == token_ids[:-1]
    assert [s.token_id for s in scores] == token_ids[1:]
    for i, got in enumerate(scores):
        want = naive(hashed_logits(token_ids[: i + 1]))
        assert got.logprob == pytest.approx(want[token_ids[i + 1]], abs=1e-5)
        assert got.top[0] == (int(np.argmax(want)), pytest.approx(max(want), abs=1e-5))
