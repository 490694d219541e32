"""How long a program would take: its closed forms and what kernels cost here (`calibrate.py`).

A step lasts as long as its moments one after the other and what happens between steps; a prompt
takes a few steps, an answer one a token. What drifts on a shared machine, the bandwidth of its
memory, is read again right before predicting: of a moment that waits for memory the time is scaled
by it. `whatif.py` changes the view and asks again, `validate.py` compares with what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cyclewise.clock.calibrate import (
    COUNTS,
    MOST_COLD,
    Costs,
    attention_features,
    attention_tiles,
    kind_of,
)
from cyclewise.clock.run import Settings
from cyclewise.clock.synthetic import SHAPE
from cyclewise.machine.costs import BatchShape, Form, kv_bytes
from cyclewise.machine.kernels.blocks import GROUP, ROWS
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP
from cyclewise.machine.names import CacheKind

if TYPE_CHECKING:
    from cyclewise.models import Model

OVERLAP = 3.0
"""How sharply a moment turns from waiting for arithmetic to waiting for memory: the exponent p of
time = (arithmetic^p + memory^p)^(1/p).
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A moment, as far as its time goes."""

    name: str
    form: Form


@dataclass(frozen=True, slots=True)
class View:
    """What the predictor knows of a program; a change makes another one."""

    parts: tuple[Part, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    prefill_chunk: int
    kv: CacheKind = "f16"
    """What the cache holds."""

    @classmethod
    def of(cls, model: Model) -> View:
        """A loaded model's."""
        config = model.config
        return cls(
            tuple(Part(moment.name, moment.form) for moment in model.program.moments),
            config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size,
            model.machine.max_batch_tokens, config.kv,
        )  # fmt: skip

    @property
    def kv_share(self) -> float:
        """Bytes of the cache, of those that float16 takes."""
        return kv_bytes(1, self.head_dim, self.kv) / kv_bytes(1, self.head_dim)

    @property
    def formats(self) -> tuple[str, ...]:
        """Of its matrices."""
        names = (matrix.format for part in self.parts for matrix in part.form.matrices)
        return tuple(dict.fromkeys(names))

    @property
    def weight_bytes(self) -> int:
        """That a step streams."""
        return sum(part.form.weight_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Times:
    """Of one setting, in seconds."""

    first_token: float
    """From the prompts' first step to their first tokens."""
    per_token: float
    """A step of decode, on average over the answer."""

    def tokens_per_second(self, batch: int) -> float:
        """Of all sequences together."""
        return batch / self.per_token


class Predictor:
    """Predicts with one calibration."""

    def __init__(self, costs: Costs, num_threads: int, bandwidth: float) -> None:
        """
        Args:
            costs: of `num_threads` threads.
            bandwidth: bytes a second that they read from memory now.
        """
        self._costs, self._others = costs, costs["others"]
        self._num_threads, self._bandwidth = num_threads, bandwidth

    def times(self, view: View, settings: Settings) -> Times:
        """Of prompts of one length and answers of one length."""
        first = sum(self.step(view, shape) for shape in prefill_shapes(view, settings))
        middle = settings.prompt_tokens + (settings.generate_tokens - 1) // 2
        shape = BatchShape(((1, middle),) * settings.batch, settings.batch)
        return Times(first, self.step(view, shape))

    def step(self, view: View, shape: BatchShape) -> float:
        """Seconds from one step's start to the next one's."""
        inside = sum(self.moment(view, part, shape) for part in view.parts)
        return inside + self.outside(view, shape)

    def outside(self, view: View, shape: BatchShape) -> float:
        """Seconds between the moments of one step and those of the next."""
        step, sequence, logit = self._others["host"]
        return step + shape.num_logits * (sequence + logit * view.vocab_size)

    def moment(self, view: View, part: Part, shape: BatchShape) -> float:
        """Seconds from a moment's start until it is over."""
        rows = shape.num_logits if part.form.of_logits else shape.num_tokens
        kind = kind_of(part.name)
        if not rows:
            return 0.0
        if part.form.matrices:
            return self._matrices(part.form, rows)
        if kind == "attend":
            return self._attention(view, shape, part.form.window)
        return self._other(view, part, kind, rows)

    def _matrices(self, form: Form, rows: int) -> float:
        fixed = seconds = waiting = least = 0.0
        weight_bytes, count_read = form.weight_bytes_of(rows), 1.0
        if form.num_experts:
            # Every expert that is read has its part of the tokens.
            count_read = form.experts_read(rows)
            rows = max(1, round(rows * form.num_chosen / count_read))
        for matrix in form.matrices:
            costs = self._costs[matrix.format]
            tiles, groups = count_read * -(-matrix.rows // ROWS), matrix.columns / GROUP
            fixed = max(fixed, between(costs["fixed"], rows))
            each, full = (
                between(costs["tile"], count) + groups * between(costs["group"], count)
                for count in (rows, COUNTS[-1])
            )
            seconds += tiles / self._num_threads * each
            least += tiles / self._num_threads * min(each, full * rows / COUNTS[-1])
            if rows <= MOST_COLD:
                waiting += count_read * matrix.num_bytes / between(costs["bandwidth"], rows)
        if not waiting:
            return fixed + seconds
        # A full batch shares the unpacking: arithmetic alone takes more than its tokens' part.
        share = min(1.0, waiting / seconds) ** OVERLAP
        share = min(share, 1 - (least / seconds) ** OVERLAP)
        slower = weight_bytes / waiting / self._bandwidth
        scaled = (1 - share + share * slower**OVERLAP) ** (1 / OVERLAP)
        return float(fixed + seconds * scaled)

    def _attention(self, view: View, shape: BatchShape, window: int | None) -> float:
        *features, gap = self._others["attend"]
        blocks = attention_features(
            shape.chunks, view.num_heads, view.num_kv_heads, view.head_dim, window
        )
        tiles = attention_tiles(shape.chunks, view.num_kv_heads)
        work = float((blocks @ np.array(features)).sum()) * view.num_kv_heads
        seconds = float(gap + work * -(-tiles // self._num_threads) / tiles)
        key_bytes = 2 * 2 * view.num_kv_heads * view.head_dim
        waiting = shape.num_keys(window) * key_bytes / self._bandwidth
        saved = (1 - view.kv_share) * min(1.0, waiting / seconds) ** OVERLAP
        return float(seconds * (1 - saved))

    def _other(self, view: View, part: Part, kind: str, rows: int) -> float:
        costs = self._others
        if kind.endswith("quantize"):
            narrow = between(costs["gate_up.quantize"], rows)
            wide = between(costs["down.quantize"], rows)
            width = part.form.bytes_per_row / (4 + ACTIVATION_GROUP / GROUP)
            slope = (wide - narrow) / (SHAPE.feed_forward - SHAPE.hidden_size)
            return max(0.0, narrow + slope * (width - SHAPE.hidden_size))
        if kind == "rope":
            size = (view.num_heads + 2 * view.num_kv_heads) * view.head_dim
            usual = (SHAPE.num_heads + 2 * SHAPE.num_kv_heads) * SHAPE.head_dim
            return between(costs["rope"], rows) * size / usual
        usual = SHAPE.hidden_size
        if kind not in costs:
            # Not calibrated: it is taken to handle bytes as a norm does.
            return between(costs["norm"], rows) * part.form.bytes_per_row / (8 * usual)
        width = part.form.weight_bytes / 4 if kind == "norm" else usual
        return between(costs[kind], rows) * width / usual


def prefill_shapes(view: View, settings: Settings) -> list[BatchShape]:
    """The steps of the prompts, first come, first served."""
    left = [settings.prompt_tokens] * settings.batch
    done = [0] * settings.batch
    shapes = []
    while any(left):
        room, chunks, ends = view.prefill_chunk, [], 0
        for i in range(settings.batch):
            count = min(left[i], room)
            if count:
                chunks.append((count, done[i]))
                left[i], done[i], room = left[i] - count, done[i] + count, room - count
                ends += not left[i]
        shapes.append(BatchShape(tuple(chunks), ends))
    return shapes


def between(values: Sequence[float], count: int) -> float:
    """The value at a number of tokens, on the line that joins those of COUNTS around it."""
    return float(np.interp(count, COUNTS, values))
