"""The least time that this machine needs for a moment: its closed form over the measured roofs.

The roofs come from `clock/roofs.py`, the forms from the program; `profile.py` sets the limits
beside what was measured, and the predictor starts from them. A limit is a lower bound, so whatever
may overlap is taken to: arithmetic with moving bytes, and the traffic of one level of the memory
with that of another (the hierarchical roofline: Yang, Kurth and Williams, 2020).

    limit = max(operations / rate of their unit, for each level: bytes that cross it / bandwidth)

*Far* bytes are weights and the keys and values of earlier steps. A step passes over all of them
once, so by the time one is wanted again the others have displaced it from a cache that does not
hold them all: they come from the nearest level that does. That is not the whole truth where they
are only a few times what the last cache holds, which then keeps some of them; a bandwidth read
from as large a buffer (`memory_bandwidth`) has as much kept, and is the roof to use. *Near* bytes
are what the step itself made, activations and its own keys and values; they come from the nearest
level that holds those of the moment. Bytes cross the level that they come from and all nearer ones.

The bound is strict for the program. One moment may seem a little faster than its limit where a
prefetcher has fetched its first lines during the moment before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from cyclewise.machine.costs import BatchShape, Form, cost
from cyclewise.machine.profile import Level, Roofs, at_threads
from cyclewise.machine.program import Moment, Program

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time of a moment for a batch."""

    seconds: float
    operations_seconds: float
    bytes_seconds: float

    @property
    def bound(self) -> Literal["operations", "bytes"]:
        """Which of the two it waits for."""
        return "operations" if self.operations_seconds >= self.bytes_seconds else "bytes"


class Limits:
    """Limits of a program's moments on a number of threads of one machine."""

    def __init__(
        self, roofs: Roofs, program: Program, num_threads: int,
        memory_bandwidth: float | None = None,
    ) -> None:  # fmt: skip
        """`memory_bandwidth`: bytes a second that were read within the run itself, from a buffer as
        large as the program's weights, where that is known; without it the roofs' serve.
        """
        self._program, self._num_threads = program, num_threads
        self._rates = {
            unit: at_threads(rate, num_threads) for unit, rate in roofs.operations.items()
        }
        self._capacities = [self._capacity(level) for level in roofs.levels]
        self._bandwidths = [at_threads(level.bandwidth, num_threads) for level in roofs.levels]
        if memory_bandwidth is not None:
            self._bandwidths[-1] = memory_bandwidth
        self._weight_bytes: dict[int, int] = {}
        self._alike: dict[tuple[int, int, int], list[Limit]] = {}
        """The last batch's, by tokens, rows of logits and where weights come from: of most moments
        nothing else counts.
        """
        # layers are alike: a few forms serve all moments
        self._forms = Counter(moment.form for moment in program.moments)
        places = {form: place for place, form in enumerate(self._forms)}
        self._places = [places[moment.form] for moment in program.moments]

    def seconds(self, moment: Moment | Form, shape: BatchShape) -> Limit:
        """The limit of a moment; 0 s of one that is left out of the batch."""
        form = moment.form if isinstance(moment, Moment) else moment
        return self._seconds(form, shape, self._holder(self._streamed(shape)))

    def _seconds(self, form: Form, shape: BatchShape, far_from: int) -> Limit:
        total = cost(form, shape)
        operations = total.operations / self._rates[form.unit]
        earlier = _earlier_bytes(form, shape)
        far = total.weight_bytes + earlier
        near = total.activation_bytes + total.kv_bytes - earlier
        near_from = self._holder(near)
        crossing, moving = 0, 0.0
        for index in reversed(range(len(self._bandwidths))):
            crossing += far * (index == far_from) + near * (index == near_from)
            moving = max(moving, crossing / self._bandwidths[index])
        return Limit(max(operations, moving), operations, moving)

    def each(self, shape: BatchShape) -> list[Limit]:
        """The limits of all moments, in the program's order."""
        far_from = self._holder(self._streamed(shape))
        key = (shape.num_tokens, shape.num_logits, far_from)
        if key not in self._alike:
            self._alike = {key: [self._seconds(form, shape, far_from) for form in self._forms]}
        found = [
            self._seconds(form, shape, far_from) if form.reads_keys else limit
            for form, limit in zip(self._forms, self._alike[key], strict=True)
        ]
        return [found[place] for place in self._places]

    def program_seconds(self, shape: BatchShape) -> float:
        """The sum over the moments: they run one after the other."""
        return sum(limit.seconds for limit in self.each(shape))

    def totals(self, key: Callable[[Moment], Key], shape: BatchShape) -> dict[Key, float]:
        """Seconds of the moments that `key` gives the same value: their class (`moment.kind`),
        `collapsed(moment.name)` or `layer_of(moment.name)`.
        """
        found: dict[Key, float] = {}
        for moment, limit in zip(self._program.moments, self.each(shape), strict=True):
            found[key(moment)] = found.get(key(moment), 0.0) + limit.seconds
        return found

    def _capacity(self, level: Level) -> float:
        """Bytes that the instances hold which the threads fill, one after the other."""
        if not level.num_bytes:
            return math.inf
        return level.num_bytes * -(-self._num_threads // level.cores)

    def _holder(self, num_bytes: int) -> int:
        """The nearest level that holds so many bytes."""
        return next(i for i, capacity in enumerate(self._capacities) if num_bytes <= capacity)

    def _streamed(self, shape: BatchShape) -> int:
        """Bytes that a step passes over once: its weights, and the earlier keys and values."""
        weights = self._streamed_weights(shape.num_tokens)
        earlier = (
            count * _earlier_bytes(form, shape)
            for form, count in self._forms.items()
            if form.kv_bytes_per_key
        )
        return weights + sum(earlier)

    def _streamed_weights(self, num_tokens: int) -> int:
        if num_tokens not in self._weight_bytes:
            self._weight_bytes[num_tokens] = sum(
                count * form.weight_bytes_of(num_tokens)
                for form, count in self._forms.items()
                if form.weight_bytes
            )
        return self._weight_bytes[num_tokens]


def _earlier_bytes(form: Form, shape: BatchShape) -> int:
    """Of keys and values that earlier steps wrote."""
    return form.kv_bytes_per_key * shape.num_earlier_keys(form.window)
