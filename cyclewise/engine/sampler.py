"""Logits become the next token id.

One float32 row of logits comes in from the engine, with the tokens before it; one token id goes
out. The filters act in the order of llama.cpp's default chain (`common/common.h`,
`common_params_sampling.samplers`), which differs from that of Hugging Face transformers in that
the temperature comes last, so that top-p and min-p mean the same at every temperature:

1. repetition penalty: a positive logit is divided by it, a negative one multiplied (CTRL, Keskar
   et al. 2019, arXiv:1909.05858), for each token that is among the last 64 (llama.cpp's
   `repeat_last_n`), however often it is there;
2. top-k (Fan et al. 2018, arXiv:1805.04833);
3. top-p, of the probabilities after top-k (Holtzman et al. 2019, arXiv:1904.09751); the token that
   crosses the threshold stays;
4. min-p, relative to the most likely token (Nguyen et al. 2024, arXiv:2407.01082);
5. temperature, and one draw.

Of equal logits the lower token id comes first. The draw is Python's own `random.random()`, whose
stream the language promises to keep, so a seed gives the same text in years to come; importing
numpy's generators would delay the first token by 30 ms.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import CyclewiseError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Sampler", "SamplingParams"]

REPETITION_WINDOW = 64  # tokens
_GREEDY_BELOW = 1e-6  # a temperature this low leaves nothing to chance, and float32 overflows
_FIRST_GUESS = 256  # tokens that nearly always hold the nucleus of top-p
_BLOCK = 512  # shares summed at once when many tokens take part in the draw


class Sampler:
    """Chooses the tokens of one generation. It keeps the state of the random numbers."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        greedy = params.temperature < _GREEDY_BELOW or params.top_k == 1
        self._random = None if greedy else random.Random(params.seed)

    def sample(self, logits: npt.NDArray[np.float32], token_ids: SequenceOf[int]) -> int:
        """Choose the next token.

        logits     (vocab_size,), not changed
        token_ids  the tokens before it, prompt included; only the last 64 are read

        Raises CyclewiseError if the logits are not numbers.
        """
        params = self.params
        if params.repetition_penalty != 1 and token_ids:
            logits = _penalize(logits, token_ids[-REPETITION_WINDOW:], params.repetition_penalty)
        best = int(logits.argmax())
        top = logits[best]
        if not np.isfinite(top):  # argmax stops at the first NaN
            raise CyclewiseError(
                "the model's logits are not finite numbers: its file is damaged, or was converted "
                "badly; fetch it again"
            )
        if self._random is None:
            return best
        draw = self._random.random()
        if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
            return _draw((logits - top) / np.float32(params.temperature), draw)
        kept = _filter(logits, top, params)
        return int(kept[_draw((logits[kept] - top) / np.float32(params.temperature), draw)])


def _penalize(
    logits: npt.NDArray[np.float32], token_ids: SequenceOf[int], penalty: float
) -> npt.NDArray[np.float32]:
    seen = np.unique(np.asarray(token_ids, dtype=np.int64))
    logits = logits.copy()
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _filter(
    logits: npt.NDArray[np.float32], top: np.float32, params: SamplingParams
) -> npt.NDArray[np.int64]:
    """The token ids that pass top-k, top-p and min-p, in rising order.

    Each of the three keeps a prefix of the vocabulary sorted by logit, so together they come down
    to one number of tokens; only values are sorted, and only as many as may be in the prefix.
    """
    floor = top + np.float32(math.log(params.min_p)) if params.min_p else np.float32(-np.inf)
    total = None  # the probability that top-p is a share of; None: that of the pool
    if params.top_k:
        pool = np.flatnonzero(logits >= _bound(logits, params.top_k))
    elif params.top_p == 1:
        return np.flatnonzero(logits >= floor)
    else:
        total = float(np.exp(logits - top).sum(dtype=np.float64))
        if params.min_p:
            pool = np.flatnonzero(logits >= floor)
        else:
            pool = _nucleus_pool(logits, top, params.top_p * total)
    ordered = np.sort(logits[pool])[::-1]
    if params.top_k:
        ordered = ordered[: params.top_k]
    cumulative = np.exp(ordered - top).cumsum(dtype=np.float64)
    share = params.top_p * (cumulative[-1] if total is None else total)
    count = min(
        int(cumulative.searchsorted(share)) + 1 if params.top_p < 1 else len(ordered),
        int(np.count_nonzero(ordered >= floor)),
        len(ordered),
    )
    threshold = ordered[count - 1]
    kept: npt.NDArray[np.int64] = pool[logits[pool] >= threshold]
    if len(kept) > count:  # of the tokens that share the last place, the lower ids stay
        last = np.flatnonzero(logits[kept] == threshold)
        kept = np.delete(kept, last[count - len(kept) :])
    return kept


def _nucleus_pool(
    logits: npt.NDArray[np.float32], top: np.float32, share: float
) -> npt.NDArray[np.int64]:
    """Token ids among which are the most likely ones that reach a share, in rising order."""
    count = _FIRST_GUESS
    while True:
        bound = _bound(logits, count)
        pool = np.flatnonzero(logits >= bound)
        if bound == -np.inf or np.exp(logits[pool] - top).sum(dtype=np.float64) > share:
            return pool
        count *= 8


def _bound(logits: npt.NDArray[np.float32], count: int) -> np.float32:
    """A value that at least `count` logits reach, and not many more.

    The logits are cut into columns of 64. `count` columns whose greatest logit reaches the bound
    have as many logits that do. This is five times as quick as partitioning all logits.
    """
    if count >= len(logits):
        return np.float32(-np.inf)
    num_columns = len(logits) // 64
    if count <= num_columns:
        logits = logits[: 64 * num_columns].reshape(64, num_columns).max(axis=0)
    place = len(logits) - count
    return np.float32(np.partition(logits, place)[place])


def _draw(scaled: npt.NDArray[np.float32], draw: float) -> int:
    """The index that a draw in [0, 1) hits, of shares exp(scaled).

    Shares are summed in blocks, so that a large vocabulary needs no running sum of its own length.
    """
    shares = np.zeros(-(-len(scaled) // _BLOCK) * _BLOCK, dtype=np.float32)
    np.exp(scaled, out=shares[: len(scaled)])
    blocks = shares.reshape(-1, _BLOCK)
    sums = blocks.sum(axis=1, dtype=np.float64).cumsum()
    target = draw * float(sums[-1])
    block = _place(sums, target)
    before = float(sums[block - 1]) if block else 0.0
    return block * _BLOCK + _place(blocks[block].cumsum(dtype=np.float64), target - before)


def _place(cumulative: npt.NDArray[np.float64], target: float) -> int:
    # rounding may bring the target up to the end, behind the last share that is not 0
    below_end = np.nextafter(cumulative[-1], 0.0)
    return int(cumulative.searchsorted(min(target, below_end), side="right"))
