"""Speculation measured at a given rate of acceptance, for `whatif.py`.

What guesses are worth depends on the text; what a step costs that verifies them does not. So the
answer is generated once, and again with guesses made of it: each token is right with the chance
that the prediction assumes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from time import perf_counter

from cyclewise.clock.predict import Times
from cyclewise.clock.run import Settings
from cyclewise.engine.engine import Engine
from cyclewise.engine.generation import Generation, advance
from cyclewise.engine.request import SamplingParams
from cyclewise.models import Model


def speculated_times(model: Model, settings: Settings, drafted: int, accepted: float) -> Times:
    """Seconds to the first token and a token, when each step verifies `drafted` guesses of each
    sequence, each right with the chance `accepted` if those before it were.
    """
    engine, chances = Engine(model), random.Random(0)
    prompts = [
        [chances.randrange(engine.vocab_size) for _ in range(settings.prompt_tokens)]
        for _ in range(settings.batch)
    ]
    answers, _ = _answer(engine, prompts, settings, None)

    def guess(index: int, num_generated: int) -> list[int]:
        right = answers[index][num_generated : num_generated + drafted]
        wrong = [(token_id + 1) % engine.vocab_size for token_id in right]
        return [
            good if chances.random() < accepted else bad
            for good, bad in zip(right, wrong, strict=True)
        ]

    turns = [_answer(engine, prompts, settings, guess)[1] for _ in range(settings.repeats)]
    return Times(
        median(turn.first_token for turn in turns), median(turn.per_token for turn in turns)
    )


def _answer(
    engine: Engine,
    prompts: list[list[int]],
    settings: Settings,
    guess: Callable[[int, int], list[int]] | None,
) -> tuple[list[list[int]], Times]:
    """The tokens of all sequences, greedily, and what they took."""
    params = SamplingParams(temperature=0, max_tokens=settings.generate_tokens)
    generations = [
        Generation(engine, engine.new_sequence(), prompt, params, frozenset()) for prompt in prompts
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    start = perf_counter()
    first = 0.0
    while running := [i for i, each in enumerate(generations) if each.finish_reason is None]:
        for i in running:
            if guess and answers[i]:
                generations[i].draft(guess(i, len(answers[i])))
        gained = advance(engine, [generations[i] for i in running])
        for i, token_ids in zip(running, gained, strict=True):
            answers[i] += token_ids
        if not first and all(answers):
            first = perf_counter() - start
    seconds = perf_counter() - start - first
    for each in generations:
        engine.free(each.sequence)
    return answers, Times(first, seconds / max(1, settings.generate_tokens - 1))
