from __future__ import annotations

import pytest

from cyclewise.clock.run import Settings
from cyclewise.clock.speculated import speculated_times
from tests.engine.toy import ToyModel


def steps(accepted, batch=1):
    """Tokens of the steps of the last answer."""
    model = ToyModel(context=256, max_batch_tokens=64)
    settings = Settings(prompt_tokens=10, generate_tokens=21, batch=batch, repeats=1)
    times = speculated_times(model, settings, 4, accepted)
    assert times.first_token > 0 and times.per_token > 0
    # The first answer is decoded plainly: its prompts, and a step for each token but the first.
    return model.machine.steps[21:]


def test_all_guesses_right():
    assert steps(1.0) == [10, 5, 5, 5, 5]


def test_no_guess_right():
    assert steps(0.0) == [10, *[5] * 16, 4, 3, 2, 1]


def test_some_guesses_right():
    assert 5 < len(steps(0.6)) < 21


@pytest.mark.parametrize("batch", [2, 3])
def test_every_sequence_is_drafted(batch):
    assert steps(1.0, batch) == [10 * batch, *[5 * batch] * 4]
