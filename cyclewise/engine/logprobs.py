"""How likely the model thought a token, and which it thought likelier.

Rows of logits come in as the machine gave them, so these are probabilities of the model's own
distribution: before bias, penalties, structure, filters and temperature. `generation.py` asks for
those of chosen tokens, `llm.py` and `scheduler.py` for those of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cyclewise.engine.engine import Engine
from cyclewise.engine.kvcache import Sequence
from cyclewise.engine.sampler import greatest, require_finite

if TYPE_CHECKING:
    import numpy.typing as npt

SCORED_TOKENS = 64
"""Tokens of a prompt whose rows of logits are held at once."""


@dataclass(frozen=True, slots=True)
class Score:
    """The natural logarithm of a token's probability, and of the likeliest tokens', best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # token ids and their logarithms


def score(logits: npt.NDArray[np.float32], token_id: int, num_top: int) -> Score:
    """The score of a token by the row of logits (vocab_size,) that it follows.

    Raises CyclewiseError if the logits are not numbers.
    """
    places, greatest_logit = greatest(logits, max(1, num_top))
    require_finite(greatest_logit)
    total = np.exp(logits - greatest_logit).sum(dtype=np.float64)
    shift = float(greatest_logit) + float(np.log(total))
    order = places[np.argsort(-logits[places], kind="stable")][:num_top]
    return Score(
        token_id,
        float(logits[token_id]) - shift,
        [(int(place), float(logits[place]) - shift) for place in order],
    )


def score_prompt(
    engine: Engine, sequence: Sequence, token_ids: SequenceOf[int], num_top: int
) -> Iterable[Score]:
    """Evaluate a prompt but for its last token; the scores of all tokens but the first.

    sequence  empty; afterwards it holds the prompt without its last token
    """
    for start in range(0, len(token_ids) - 1, SCORED_TOKENS):
        following = token_ids[start + 1 : start + 1 + SCORED_TOKENS]
        rows = engine.evaluate(sequence, token_ids[start : start + len(following)], "all")
        for row, token_id in zip(rows, following, strict=True):
            yield score(row, token_id, num_top)


@dataclass(slots=True)
class PromptScores:
    """The scores of all tokens of a prompt but the first, while its rows of logits come in.

    Each is taken once, also where a prompt is evaluated again.
    """

    token_ids: SequenceOf[int]  # the prompt
    num_top: int
    scores: list[Score] = field(default_factory=list)  # so far

    @property
    def is_complete(self) -> bool:
        return len(self.scores) + 1 >= len(self.token_ids)

    def cacheable(self, token_ids: SequenceOf[int]) -> SequenceOf[int]:
        """Of tokens that begin with the prompt, those that lead to no row that is still wanted but
        the last one's: what `Sequence.reuse` may look for.
        """
        return token_ids if self.is_complete else token_ids[: len(self.scores) + 1]

    def take(self, rows: npt.NDArray[np.float32], end: int) -> None:
        """rows  (tokens, vocab_size): of so many tokens before the one at `end`

        Raises CyclewiseError if the logits are not numbers.
        """
        for place, row in enumerate(rows, end - len(rows)):
            if place == len(self.scores) and not self.is_complete:
                self.scores.append(score(row, int(self.token_ids[place + 1]), self.num_top))
