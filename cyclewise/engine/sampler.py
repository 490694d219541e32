"""Logits become the next token id.

One float32 row of logits comes in from the engine, with the tokens before it; one token id goes
out. The filters act in the order of llama.cpp's default chain (`common/common.h`,
`common_params_sampling.samplers`), which differs from that of Hugging Face transformers in that
the temperature comes last, so that top-p and min-p mean the same at every temperature:

1. logit bias: added to the logits of the tokens that it names;
2. repetition penalty: a positive logit is divided by it, a negative one multiplied (CTRL, Keskar
   et al. 2019, arXiv:1909.05858), for each token that is among the last 64 (llama.cpp's
   `repeat_last_n`), prompt included, however often it is there;
3. presence and frequency penalty, as OpenAI defines them: of each token that was generated, and
   not of the prompt's, the first is subtracted once, the second as often as it was generated;
4. the structure: tokens that it rules out here are gone;
5. top-k (Fan et al. 2018, arXiv:1805.04833);
6. typical-p, of the probabilities after top-k: the tokens whose surprise is nearest to the entropy
   (Meister et al. 2022, arXiv:2202.00666); the token that crosses the threshold stays;
7. top-p, of the probabilities after typical-p (Holtzman et al. 2019, arXiv:1904.09751); the token
   that crosses the threshold stays;
8. min-p, relative to the most likely token that is left (Nguyen et al. 2024, arXiv:2407.01082);
9. temperature, and one draw.

At temperature 0 the most likely token after step 4 is taken. Of equal logits the lower token id
comes first. The draw is Python's own `random.random()`, whose stream the language promises to keep,
so a seed gives the same text in years to come; importing numpy's generators would delay the first
token by 30 ms.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Protocol

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
_STRIDE = 64  # logits of a column, when the greatest are looked for column by column
_FEW = 8  # of so many tokens, one: so few allowed ones are taken out of the row


class Structure(Protocol):
    """What tokens must spell. It may find out what is allowed while the machine runs a step."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """(vocab_size,): which tokens may come next. At least one may."""

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next; quicker than asking for all."""

    def advance(self, token_id: int) -> bool:
        """Take note of the token chosen; return whether the text is complete and ends here."""


class Sampler:
    """Chooses the tokens of one generation.

    It keeps the state of the random numbers, and how often each token was chosen.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        greedy = params.temperature < _GREEDY_BELOW or params.top_k == 1
        self._random = None if greedy else random.Random(params.seed)
        self._filters = bool(
            params.top_k or params.typical_p < 1 or params.top_p < 1 or params.min_p
        )
        self._counts: dict[int, int] | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = {}

    def copy(self) -> Sampler:
        """One that would choose alike from here on."""
        other = Sampler(self.params)
        if self._random is not None and other._random is not None:
            other._random.setstate(self._random.getstate())
        other._counts = None if self._counts is None else self._counts.copy()
        return other

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        token_ids: SequenceOf[int],
        structure: Structure | None = None,
    ) -> int:
        """Choose the next token.

        logits     (vocab_size,), not changed
        token_ids  the tokens before it, prompt included; only the last 64 are read
        structure  what says which tokens are allowed; None: all are

        Raises CyclewiseError if the logits are not numbers.
        """
        logits = self._adjust(logits, token_ids)
        if structure is None:
            token_id = self._choose(logits)
        elif self._random is None and structure.allows(best := int(logits.argmax())):
            token_id = best
            require_finite(logits[best])
        else:
            token_id = self._choose_allowed(logits, structure.allowed())
        if self._counts is not None:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        return token_id

    def _adjust(
        self, logits: npt.NDArray[np.float32], token_ids: SequenceOf[int]
    ) -> npt.NDArray[np.float32]:
        """Steps 1 to 3: a copy where there is something to change."""
        params = self.params
        penalizes = params.repetition_penalty != 1 and bool(token_ids)
        if not (params.logit_bias or penalizes or self._counts):
            return logits
        logits = logits.copy()
        for token_id, bias in params.logit_bias.items():
            logits[token_id] += np.float32(bias)
        if penalizes:
            _penalize(logits, token_ids[-REPETITION_WINDOW:], params.repetition_penalty)
        if self._counts:
            chosen = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[chosen] -= np.float32(params.presence_penalty) + times * np.float32(
                params.frequency_penalty
            )
        return logits

    def _choose_allowed(
        self, logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_]
    ) -> int:
        """The same as of a row in which the others are impossible."""
        top_k = self.params.top_k
        if self._random is not None and top_k:
            # nearly always, enough of the likeliest tokens are allowed, and no others matter
            likely, _ = greatest(logits, 4 * top_k)
            few = likely[allowed[likely]]
            if len(few) >= top_k:
                return int(few[self._choose(logits[few])])
        if np.count_nonzero(allowed) * _FEW < len(allowed):
            few = np.flatnonzero(allowed)
            return int(few[self._choose(logits[few])])
        return self._choose(np.where(allowed, logits, np.float32(-np.inf)))

    def _choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Steps 5 to 9."""
        if self._random is None:
            best = int(logits.argmax())
            require_finite(logits[best])  # argmax stops at the first NaN
            return best
        temperature = np.float32(self.params.temperature)
        draw = self._random.random()
        if not self._filters:
            top = logits.max()
            require_finite(top)
            return _draw(logits, top, temperature, draw)
        kept, values, top = _filter(logits, self.params)
        return int(kept[_draw(values, top, temperature, draw)])


def require_finite(top: np.float32) -> None:
    if not math.isfinite(top):
        raise CyclewiseError(
            "the model's logits are not finite numbers: its file is damaged, or was converted "
            "badly; fetch it again"
        )


def _penalize(logits: npt.NDArray[np.float32], token_ids: SequenceOf[int], penalty: float) -> None:
    seen = np.unique(np.asarray(token_ids, dtype=np.int64))
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


Kept = tuple["npt.NDArray[np.int64]", "npt.NDArray[np.float32]", np.float32]
"""Places in rising order, their logits, and the greatest of these."""


def _filter(logits: npt.NDArray[np.float32], params: SamplingParams) -> Kept:
    """The token ids that pass top-k, typical-p, top-p and min-p."""
    if params.typical_p == 1:
        return _likely(logits, params.top_k, params.top_p, params.min_p)
    ids, values, top = _likely(logits, params.top_k, 1.0, 0.0)
    typical = _typical(values - top, params.typical_p)
    ids, values = ids[typical], values[typical]
    kept, values, top = _likely(values, 0, params.top_p, params.min_p)
    return ids[kept], values, top


def _likely(logits: npt.NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> Kept:
    """The places that pass top-k, top-p and min-p.

    Each of the three keeps a prefix of the places sorted by logit, so together they come down
    to one number of tokens; only values are sorted, and only as many as may be in the prefix.
    """
    total = None  # the probability that top-p is a share of; None: that of the pool
    if top_k:
        pool, top = greatest(logits, top_k)
        require_finite(top)
    else:
        top = logits.max()
        require_finite(top)
        if top_p < 1:
            total = float(np.exp(logits - top).sum(dtype=np.float64))
        if min_p:
            pool = np.flatnonzero(logits >= top + np.float32(math.log(min_p)))
        elif total is not None:
            pool = _nucleus_pool(logits, top, top_p * total)
        else:
            pool = np.arange(len(logits))
        if top_p == 1:
            return pool, logits[pool], top
    values = logits[pool]
    ordered = np.sort(values)[::-1][: top_k or None]
    count = len(ordered)
    if min_p:
        floor = top + np.float32(math.log(min_p))
        count = int((-ordered).searchsorted(-floor, side="right"))
    if top_p < 1:
        cumulative = np.exp(ordered - top).cumsum(dtype=np.float64)
        share = top_p * (cumulative[-1] if total is None else total)
        count = min(count, int(cumulative.searchsorted(share)) + 1)
    if count == len(values):
        return pool, values, top
    threshold = ordered[count - 1]
    kept = np.flatnonzero(values >= threshold)
    if len(kept) > count:  # of the tokens that share the last place, the lower ids stay
        last = np.flatnonzero(values[kept] == threshold)
        kept = np.delete(kept, last[count - len(kept) :])
    return pool[kept], values[kept], top


def _typical(values: npt.NDArray[np.float32], typical_p: float) -> npt.NDArray[np.int64]:
    """The places, in rising order, whose surprise is nearest to the entropy, of this share.

    values  logits less the greatest of them
    """
    shares = np.exp(values)
    total = float(shares.sum(dtype=np.float64))
    surprises = np.float32(math.log(total)) - values
    present = shares > 0  # what is ruled out has an infinite surprise, and no part in the entropy
    entropy = (shares * np.where(present, surprises, 0)).sum(dtype=np.float64) / total
    nearness = -np.abs(surprises - np.float32(entropy))
    count = _FIRST_GUESS
    while True:
        pool, _ = greatest(nearness, count)
        order = pool[np.argsort(-nearness[pool], kind="stable")]
        cumulative = shares[order].cumsum(dtype=np.float64)
        place = int(cumulative.searchsorted(typical_p * total))
        if place < len(order) or len(order) == len(values):
            return np.sort(order[: place + 1])
        count *= 8


def _nucleus_pool(
    logits: npt.NDArray[np.float32], top: np.float32, share: float
) -> npt.NDArray[np.int64]:
    """Token ids among which are the most likely ones that reach a share, in rising order."""
    count = _FIRST_GUESS
    while True:
        pool, _ = greatest(logits, count)
        if len(pool) == len(logits):
            return pool
        if np.exp(logits[pool] - top).sum(dtype=np.float64) > share:
            return pool
        count *= 8


def greatest(
    values: npt.NDArray[np.float32], count: int
) -> tuple[npt.NDArray[np.int64], np.float32]:
    """Places, in rising order, among which are the `count` greatest values, and few others; the
    greatest value: NaN if any is.

    The row is cut into columns. Where `count` columns have a greatest value that reaches a bound,
    so many values do; only those columns are looked at again.
    """
    if count >= len(values):
        return np.arange(len(values)), values.max()
    width = len(values) // _STRIDE
    if count > width:
        bound = np.partition(values, len(values) - count)[len(values) - count]
        return np.flatnonzero(values >= bound), values.max()
    in_grid = _STRIDE * width
    grid = values[:in_grid].reshape(_STRIDE, width)
    peaks = grid.max(axis=0)
    highest = np.partition(peaks, width - count)[width - count :]  # NaN is the greatest here
    bound, top = highest[0], highest.max()
    columns = np.flatnonzero(peaks >= bound)
    rows, hits = divmod(np.flatnonzero(grid.take(columns, axis=1) >= bound), len(columns) or 1)
    places = rows * width + columns[hits]
    if in_grid < len(values):
        rest = values[in_grid:]
        top = max(top, rest.max(), key=lambda value: (math.isnan(value), value))
        places = np.concatenate([places, np.flatnonzero(rest >= bound) + in_grid])
    return places, top


def _draw(
    logits: npt.NDArray[np.float32], top: np.float32, temperature: np.float32, draw: float
) -> int:
    """The index that a draw in [0, 1) hits, of shares exp((logits - top) / temperature).

    Shares are summed in blocks, so that a large vocabulary needs no running sum of its own length.
    They are computed in one array: fresh memory costs as much as the arithmetic.
    """
    count = len(logits)
    shares = np.empty(-(-count // _BLOCK) * _BLOCK, dtype=np.float32)
    shares[count:] = 0
    values = shares[:count]
    np.subtract(logits, top, out=values)
    if temperature != 1:
        np.divide(values, temperature, out=values)
    np.exp(values, out=values)
    if count <= _BLOCK:
        cumulative = values.cumsum(dtype=np.float64)
        return _place(cumulative, draw * float(cumulative[-1]))
    blocks = shares.reshape(-1, _BLOCK)
    sums = blocks.sum(axis=1, dtype=np.float64).cumsum()
    target = draw * float(sums[-1])
    block = _place(sums, target)
    before = float(sums[block - 1]) if block else 0.0
    return block * _BLOCK + _place(blocks[block].cumsum(dtype=np.float64), target - before)


def _place(cumulative: npt.NDArray[np.float64], target: float) -> int:
    # rounding may bring the target up to the end, behind the last share that is not 0
    below_end = math.nextafter(cumulative[-1], 0.0)
    return int(cumulative.searchsorted(min(target, below_end), side="right"))
