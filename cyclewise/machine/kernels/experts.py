"""Mixtures of experts: which experts a token goes to, and the matrices of those alone.

`route` chooses experts for every token of a batch and sorts the tokens by expert: *rows*, expert
after expert, each expert's tokens in their order. `dispatch` writes activations in that order.
`experts_gated` and `experts_down` then are what `linear.py` has for one matrix, over the experts
that were chosen: an expert that no token chose is not touched. Shazeer et al., 2017; top-k over
softmax as in Mixtral (Jiang et al., 2024) and Qwen3 (Yang et al., 2025).

What a token gets depends on no other token: its experts' parts are added in the experts' order.
"""

from __future__ import annotations

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP, ActivationLayout
from cyclewise.machine.kernels.lang import F32, I8, I32, Emitter, Value, vector
from cyclewise.machine.kernels.layout import (
    BATCH,
    DISPATCH,
    EXPERTS_DOWN,
    EXPERTS_GATED,
    PLACE,
    ROUTE,
    SLOT,
    THREAD,
    Record,
    load_int32,
)
from cyclewise.machine.kernels.linear import LANES, SUMS_BYTES
from cyclewise.machine.kernels.math import exp, silu
from cyclewise.machine.kernels.rows import quantize_group

PLACE_BYTES, SLOT_BYTES = 4 * len(PLACE), 8 * len(SLOT)
MAX_EXPERTS = 1024
"""What `route` has room for in a thread's scratch memory."""
_COUNTS, _NEXT, _KEYS = 0, 8 * MAX_EXPERTS, 16 * MAX_EXPERTS
ROUTE_SCRATCH_BYTES = 20 * MAX_EXPERTS
_TAKEN = -(1 << 31)


def _route(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """One tile: all tokens. Of equal logits the lower expert's comes first."""
    m, b, t = (
        Record(emitter, moment, ROUTE),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    private, chosen, experts = t.private, m.num_chosen, m.num_experts
    places, slots = m.places + private, m.slots + private
    counts, following, keys = (t.scratch + at for at in (_COUNTS, _NEXT, _KEYS))

    def place_of(token: Value, choice: Value) -> Value:
        return places + (token * chosen + choice) * PLACE_BYTES

    def choose(token: Value) -> None:
        """Writes experts into the places' first field and their weights into the third."""
        logits = m.logits + token * m.logits_stride
        with emitter.range(0, experts) as expert:
            emitter.store(keys + expert * 4, _sortable(emitter.load(logits + expert * 4, I32)))
        with emitter.range(0, chosen) as choice:
            best = emitter.variable(emitter.constant(0))
            largest = emitter.variable(emitter.constant(_TAKEN, I32))
            with emitter.range(0, experts) as expert:
                key = emitter.load(keys + expert * 4, I32)
                better = key > largest.get()
                largest.set(better.select(key, largest.get()))
                best.set(better.select(expert, best.get()))
            expert = best.get()
            emitter.store(keys + expert * 4, emitter.constant(_TAKEN, I32))
            emitter.store(place_of(token, choice), emitter.cast(expert, I32, "trunc"))
            count = counts + expert * 8
            emitter.store(count, emitter.load(count) + 1)
        top = logits + load_int32(emitter, place_of(token, emitter.constant(0)), _zero(emitter)) * 4
        largest_logit = emitter.load(top, vector(F32, 1))

        def exponential(expert: Value) -> Value:
            logit = emitter.load(logits + expert * 4, vector(F32, 1))
            return exp(emitter, logit - largest_logit)

        total = emitter.variable(emitter.constant(0.0, vector(F32, 1)))
        with emitter.range(0, chosen) as choice:
            at = place_of(token, choice)
            weight = exponential(load_int32(emitter, at, _zero(emitter)))
            emitter.store(at + 8, weight)
            total.set(total.get() + weight)
        with emitter.when(m.normalize.equals(0)):
            total.set(emitter.constant(0.0, vector(F32, 1)))
            with emitter.range(0, experts) as expert:
                total.set(total.get() + exponential(expert))
        with emitter.range(0, chosen) as choice:
            at = place_of(token, choice) + 8
            emitter.store(at, emitter.load(at, vector(F32, 1)) / total.get())

    # Read once: under a thread that comes late, the record becomes that of the next step.
    tokens = b.num_tokens
    with emitter.range(first, last):
        with emitter.range(0, experts) as expert:
            emitter.store(counts + expert * 8, emitter.constant(0))
        with emitter.range(0, tokens) as token:
            choose(token)
        row, used = (emitter.variable(emitter.constant(0)) for _ in range(2))
        with emitter.range(0, experts) as expert:
            count = emitter.load(counts + expert * 8)
            emitter.store(following + expert * 8, row.get())
            with emitter.when(count > 0):
                slot = slots + 8 + used.get() * SLOT_BYTES
                for i, value in enumerate((expert, row.get(), count)):
                    emitter.store(slot + 8 * i, value)
                used.add(1)
                row.add(_rows_taken(emitter, count))
        emitter.store(slots, used.get())
        with emitter.range(0, tokens) as token, emitter.range(0, chosen) as choice:
            at = place_of(token, choice)
            expert = load_int32(emitter, at, _zero(emitter))
            weight = emitter.load(at + 8, F32)
            place = emitter.load(following + expert * 8)
            emitter.store(following + expert * 8, place + 1)
            emitter.store(m.row_tokens + private + place * 4, emitter.cast(token, I32, "trunc"))
            emitter.store(m.row_weights + private + place * 4, weight)
            emitter.store(at, emitter.cast(place, I32, "trunc"))
            emitter.store(at + 8, emitter.cast(expert, I32, "trunc"))
        # Only now is it known where an expert's rows begin: where the last of them has left off.
        with emitter.range(0, tokens) as token, emitter.range(0, chosen) as choice:
            at = place_of(token, choice)
            expert = load_int32(emitter, at + 8, _zero(emitter))
            count = emitter.load(counts + expert * 8)
            start = emitter.load(following + expert * 8) - count
            emitter.store(at + 4, emitter.cast(start, I32, "trunc"))
            emitter.store(at + 8, emitter.cast(count, I32, "trunc"))


def _zero(emitter: Emitter) -> Value:
    return emitter.constant(0)


def _sortable(bits: Value) -> Value:
    """A float32's bits as an integer that compares as it does; never that of a taken expert, also
    if the float is no number.
    """
    emitter = bits.emitter
    negative = bits < 0
    key = negative.select(bits ^ 0x7FFFFFFF, bits)
    return emitter.maximum(key, emitter.constant(_TAKEN + 1, I32))


def _rows_taken(emitter: Emitter, count: Value) -> Value:
    """Rows that an expert's tokens take: from four on they lie in quads."""
    return (count > 3).select((count + 3) & -4, count)


def _dispatch(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """A tile is a token. Its activations, int8 or float32, go to its row with each of its experts;
    with `by_row` they come from those rows too.
    """
    m, t = Record(emitter, moment, DISPATCH), Record(emitter, thread, THREAD)
    groups = m.columns >> 5
    out = m.out + t.private

    def copy_floats(source: Value, row: Value) -> None:
        to = out + row * m.row_bytes
        with emitter.range(0, m.row_bytes, 64) as at:
            emitter.store(to + at, emitter.load(source + at, vector(F32, LANES)))

    with emitter.range(first, last) as token, emitter.range(0, m.num_chosen) as choice:
        place = m.places + t.private + (token * m.num_chosen + choice) * PLACE_BYTES
        row, start, count = (
            load_int32(emitter, place, emitter.constant(i)) for i in range(len(PLACE))
        )
        index = m.by_row.differs(0).select(row, token)
        source = m.x + t.private * m.x_private + index * m.x_stride
        with emitter.when(m.quantize.equals(0)):
            copy_floats(source, row)
        with emitter.when(m.quantize.differs(0)):
            layout = ActivationLayout(emitter, out + start * m.row_bytes, groups, count)
            to = layout.token(row - start)
            # The first of a token's choices is quantized, the others copy it.
            own = m.by_row.differs(0) | choice.equals(0)
            with emitter.when(own), emitter.range(0, groups) as group:
                at = to + group * layout.group_stride
                quantize_group(emitter, source + group * 128, at)
            with emitter.when(own.equals(0)):
                before = place - choice * PLACE_BYTES
                row0, start0, count0 = (
                    load_int32(emitter, before, emitter.constant(i)) for i in range(len(PLACE))
                )
                known = ActivationLayout(emitter, out + start0 * m.row_bytes, groups, count0)
                origin = known.token(row0 - start0)
                with emitter.range(0, groups) as group:
                    _copy_group(
                        emitter,
                        origin + group * known.group_stride,
                        to + group * layout.group_stride,
                    )


def _copy_group(emitter: Emitter, source: Value, to: Value) -> None:
    """All 60 bytes; two pieces overlap."""
    for at, size in ((0, 32), (ACTIVATION_GROUP - 32, 32)):
        emitter.store(to + at, emitter.load(source + at, vector(I8, size)))


def _experts_gated(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """A tile is one of a chosen expert: rows[i] = silu(gate . x[i]) * (up . x[i])"""
    m, t = Record(emitter, moment, EXPERTS_GATED), Record(emitter, thread, THREAD)
    floats = vector(F32, LANES)
    slots, x = m.slots + t.private, m.x + t.private
    gates, ups, scratch = (t.scratch + i * SUMS_BYTES for i in range(3))
    end = emitter.load(slots) * m.num_tiles
    with emitter.range(first, (last > end).select(end, last)) as index:
        slot = Record(emitter, slots + 8 + index // m.num_tiles * SLOT_BYTES, SLOT)
        tile, expert, start, count = (
            index % m.num_tiles, slot.expert, slot.first_row, slot.num_rows,
        )  # fmt: skip
        rows = x + start * m.row_bytes
        gate = emitter.load(m.gates + expert * 8) + tile * m.gate_tile_bytes
        up = emitter.load(m.ups + expert * 8) + tile * m.up_tile_bytes
        common = (m.columns, rows, m.row_bytes, count)
        emitter.call_address(m.gate_kernel, gate, *common, gates, scratch)
        emitter.call_address(m.up_kernel, up, *common, ups, scratch)
        with emitter.range(0, count) as row:
            opened = silu(emitter, emitter.load(gates + row * 64, floats))
            value = opened * emitter.load(ups + row * 64, floats)
            emitter.store(m.out + (start + row) * m.out_stride + tile * 64, value)


def _experts_down(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """A tile is one of the result, of all chosen experts: hidden += weight * (down . row). The
    tiles of one expert are taken together: they read the same rows.
    """
    m, t = Record(emitter, moment, EXPERTS_DOWN), Record(emitter, thread, THREAD)
    floats = vector(F32, LANES)
    slots, x = m.slots + t.private, m.x + t.private * m.x_private
    tokens, weights = m.row_tokens + t.private, m.row_weights + t.private
    sums = t.scratch
    scratch = sums + 2 * SUMS_BYTES
    with emitter.range(0, emitter.load(slots)) as index:
        slot = Record(emitter, slots + 8 + index * SLOT_BYTES, SLOT)
        start, count = slot.first_row, slot.num_rows
        rows, matrix = x + start * m.row_bytes, emitter.load(m.matrices + slot.expert * 8)
        with emitter.range(first, last) as tile:
            at = matrix + tile * m.tile_bytes
            emitter.call_address(m.kernel, at, m.columns, rows, m.row_bytes, count, sums, scratch)
            with emitter.range(0, count) as row:
                token = load_int32(emitter, tokens, start + row)
                weight = emitter.broadcast(weights + (start + row) * 4, F32, LANES)
                to = m.out + token * m.out_stride + tile * 64
                value = emitter.load(sums + row * 64, floats)
                emitter.store(to, emitter.fma(weight, value, emitter.load(to, floats)))


def experts_unit() -> Unit:
    kernels = {
        "route": _route, "dispatch": _dispatch, "experts_gated": _experts_gated,
        "experts_down": _experts_down,
    }  # fmt: skip

    def write(emitter: Emitter) -> None:
        for name, kernel in kernels.items():
            emitter.function(name, 5, lambda *a, kernel=kernel: kernel(emitter, *a))

    return Unit("experts", write, tuple(kernels))
