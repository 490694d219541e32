"""Kernels that take tokens one by one: embedding, RMSNorm, quantizing activations, RoPE and the
KV cache's writing; and the capping of logits.

A tile is a token (for the last norm, a row of logits; for capping, 16 columns of all of them).
`add_norm` is the norm that stands behind a projection, not before: its result is added. RMSNorm:
Zhang and Sennrich, 2019. RoPE: Su et al., 2021, with the halves of a head as pairs; weights whose
file pairs neighbours are reordered when they are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.dot import (
    AT_HALF_LANE_SUMS,
    AT_HALF_SUMS,
    AT_LANE_SUMS,
    AT_SCALE,
    AT_SCALED_SUM,
    AT_SUM,
    ActivationLayout,
)
from cyclewise.machine.kernels.lang import F32, I8, I16, Emitter, Value, vector
from cyclewise.machine.kernels.layout import (
    BATCH,
    EMBED,
    LAYER_NORM,
    NORM,
    PAGE_TOKENS,
    POSITIONS,
    QUANTIZE,
    ROPE,
    SOFTCAP,
    THREAD,
    Record,
    load_int32,
)
from cyclewise.machine.kernels.math import absolute, round_to_int, tanh
from cyclewise.machine.kernels.pages import Bytes, Halves

LANES = 16


def _embed(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    m, b, t = (
        Record(emitter, moment, EMBED),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    with emitter.range(first, last) as token:
        token_id = load_int32(emitter, b.token_ids, token)
        tile = m.table + (token_id >> 4) * m.tile_bytes
        to = m.out + token * m.out_stride
        emitter.call_address(m.row_kernel, tile, m.columns, token_id & 15, to, t.scratch)
        with emitter.when(m.float("scale").differs(1.0)):
            factor, end = emitter.splat(m.float("scale"), LANES), to + m.out_stride
            with emitter.range(to, end, LANES * 4) as at:
                emitter.store(at, emitter.load(at, vector(F32, LANES)) * factor)


def _norm(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value,
    *, add: bool,
) -> None:  # fmt: skip
    m, b, t = (
        Record(emitter, moment, NORM),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    floats = vector(F32, LANES)
    with emitter.range(first, last) as row:
        source = emitter.variable(row)
        with emitter.when(m.of_logits.differs(0)):
            source.set(load_int32(emitter, b.logit_rows, row))
        x = m.x + source.get() * m.x_stride
        total = emitter.variable(emitter.constant(0.0, floats))
        with emitter.range(0, m.padded_width, LANES) as column:
            value = emitter.load(x + column * 4, floats)
            total.set(emitter.fma(value, value, total.get()))
        mean = emitter.sum(total.get()) / emitter.cast(m.width, F32, "sitofp")
        factor = 1.0 / emitter.unary("sqrt", mean + m.float("epsilon"))
        out = m.out + t.private * m.out_private + row * m.out_stride
        wide = emitter.splat(factor, LANES)
        with emitter.range(0, m.padded_width, LANES) as column:
            value = emitter.load(x + column * 4, floats) * wide
            value = value * emitter.load(m.weight + column * 4, floats)
            if add:
                value = emitter.load(out + column * 4, floats) + value
            emitter.store(out + column * 4, value)


def _layer_norm(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """Ba et al., 2016. The variance is that of the differences from the mean."""
    m, b, t = (
        Record(emitter, moment, LAYER_NORM),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    floats, single = vector(F32, LANES), vector(F32, 1)
    whole = (m.width >> 4) << 4
    width = emitter.cast(m.width, F32, "sitofp")

    def total(x: Value, term: Callable[[Value], Value]) -> Value:
        """Of all columns; what lies behind them is no part of it."""
        wide = emitter.variable(emitter.constant(0.0, floats))
        rest = emitter.variable(emitter.constant(0.0, single))
        with emitter.range(0, whole, LANES) as column:
            wide.set(wide.get() + term(emitter.load(x + column * 4, floats)))
        with emitter.range(whole, m.width) as column:
            rest.set(rest.get() + term(emitter.load(x + column * 4, single)))
        return emitter.sum(wide.get()) + emitter.extract(rest.get(), 0)

    with emitter.range(first, last) as row:
        source = emitter.variable(row)
        with emitter.when(m.of_logits.differs(0)):
            source.set(load_int32(emitter, b.logit_rows, row))
        x = m.x + source.get() * m.x_stride
        mean = total(x, lambda value: value) / width

        def squared(value: Value, mean: Value = mean) -> Value:
            difference = value - emitter.splat(mean, value.type.count)
            return difference * difference

        variance = total(x, squared) / width
        factor = 1.0 / emitter.unary("sqrt", variance + m.float("epsilon"))
        out = m.out + t.private * m.out_private + row * m.out_stride
        middle, wide = emitter.splat(mean, LANES), emitter.splat(factor, LANES)
        with emitter.range(0, m.padded_width, LANES) as column:
            value = (emitter.load(x + column * 4, floats) - middle) * wide
            value = value * emitter.load(m.weight + column * 4, floats)
            value = value + emitter.load(m.bias + column * 4, floats)
            emitter.store(out + column * 4, value)


def _positions(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """Adds the row of a token's position."""
    m, b, t = (
        Record(emitter, moment, POSITIONS),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    row = t.scratch
    with emitter.range(first, last) as token:
        position = load_int32(emitter, b.positions, token)
        tile, to = m.table + (position >> 4) * m.tile_bytes, m.out + token * m.out_stride
        scratch = row + m.out_stride
        emitter.call_address(m.row_kernel, tile, m.columns, position & 15, row, scratch)
        whole = (m.columns >> 4) << 4
        for begin, end, lanes in ((0, whole, LANES), (whole, m.columns, 1)):
            floats = vector(F32, lanes)
            with emitter.range(begin, end, lanes) as column:
                at = to + column * 4
                added = emitter.load(row + column * 4, floats)
                emitter.store(at, emitter.load(at, floats) + added)


def _softcap(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    m, b = Record(emitter, moment, SOFTCAP), Record(emitter, batch, BATCH)
    cap = emitter.splat(m.float("cap"), LANES)
    with emitter.range(first, last) as tile, emitter.range(0, b.num_logits) as row:
        at = m.x + row * m.x_stride + tile * (LANES * 4)
        value = emitter.load(at, vector(F32, LANES)) / cap
        emitter.store(at, tanh(emitter, value) * cap)


def _quantize(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    m, b = Record(emitter, moment, QUANTIZE), Record(emitter, batch, BATCH)
    t = Record(emitter, thread, THREAD)
    groups = m.columns >> 5
    count = m.of_logits.differs(0).select(b.num_logits, b.num_tokens)
    layout = ActivationLayout(emitter, m.out + t.private * m.out_private, groups, count)
    with emitter.range(first, last) as row:
        x = m.x + t.private * m.x_private + row * m.x_stride
        out = layout.token(row)
        with emitter.range(0, groups) as group:
            quantize_group(emitter, x + group * 128, out + group * layout.group_stride)


def quantize_group(emitter: Emitter, at: Value, to: Value) -> None:
    """32 float32 at `at` become an activation group at `to`."""
    floats = vector(F32, LANES)
    halves = [emitter.load(at + 64 * half, floats) for half in (0, 1)]
    largest = emitter.fold(
        emitter.maximum(*[absolute(emitter, half) for half in halves]), emitter.maximum
    )
    scale = largest / 127.0
    zero = emitter.constant(0.0, F32)
    inverse = emitter.splat((largest > 0.0).select(127.0 / largest, zero), LANES)
    lane_sums = []
    for half in (0, 1):
        codes = round_to_int(emitter, halves[half] * inverse)
        emitter.store(to + 16 * half, emitter.cast(codes, vector(I8, LANES), "trunc"))
        lane_sums.append(_lane_sums(emitter, codes))
    sums = [pair[0] + pair[1] for pair in lane_sums]
    total = sums[0] + sums[1]
    emitter.store(to + AT_SCALE, scale)
    emitter.store(to + AT_SCALED_SUM, scale * emitter.cast(total, F32, "sitofp"))
    emitter.store(to + AT_SUM, total * -8)
    for i in (0, 1):
        whole = lane_sums[0][i] + lane_sums[1][i]
        emitter.store(to + AT_HALF_SUMS + 2 * i, emitter.cast(sums[i] * -8, I16, "trunc"))
        emitter.store(to + AT_LANE_SUMS + 2 * i, emitter.cast(whole * -16, I16, "trunc"))
        for half in (0, 1):
            small = emitter.cast(lane_sums[half][i] * -32, I16, "trunc")
            emitter.store(to + AT_HALF_LANE_SUMS + 4 * half + 2 * i, small)


def _lane_sums(emitter: Emitter, codes: Value) -> tuple[Value, Value]:
    """Of 16 columns, the sums of those whose place among four is 0 or 1, and 2 or 3."""
    while codes.type.count > 4:
        lanes = codes.type.count // 2
        low = emitter.shuffle(codes, codes, range(lanes))
        codes = low + emitter.shuffle(codes, codes, range(lanes, 2 * lanes))
    first, second, third, fourth = (emitter.extract(codes, lane) for lane in range(4))
    return first + second, third + fourth


def _rope(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value, *,
    pages: type[Halves] | type[Bytes],
) -> None:  # fmt: skip
    """Normalizes, rotates and scales the queries in place; writes normalized and rotated keys and
    the values to the cache's pages (`pages.py`). Without weights of a norm there is none. From keys
    of int8 a constant is taken, if there is one: softmax does not see it.
    """
    kind = pages(emitter)
    m, b = Record(emitter, moment, ROPE), Record(emitter, batch, BATCH)
    head_bytes, half = m.head_dim * 4, m.rope_dim // 2
    key_bytes = kind.head_bytes(kind.steps(m.head_dim) * PAGE_TOKENS)
    value_bytes = kind.head_bytes(kind.steps(PAGE_TOKENS) * m.padded_head_dim)

    def rotate(
        head: Value, angles: tuple[Value, Value], lanes: int, at: Value, factor: Value
    ) -> None:
        floats = vector(F32, lanes)
        cosine, sine = (emitter.load(table + at * 4, floats) for table in angles)
        wide = emitter.splat(factor, lanes)
        low = emitter.load(head + at * 4, floats) * wide
        high = emitter.load(head + (at + half) * 4, floats) * wide
        emitter.store(head + at * 4, low * cosine - high * sine)
        emitter.store(head + (at + half) * 4, high * cosine + low * sine)

    def rotate_head(head: Value, angles: tuple[Value, Value], factor: Value) -> None:
        whole = (half >> 4) << 4
        with emitter.range(0, whole, LANES) as at:
            rotate(head, angles, LANES, at, factor)
        with emitter.range(whole, half) as at:
            rotate(head, angles, 1, at, factor)
        with emitter.range(m.rope_dim, m.head_dim) as at:
            value = emitter.load(head + at * 4, F32)
            emitter.store(head + at * 4, value * factor)

    def normalize(head: Value, weight: Value) -> None:
        """RMSNorm of one head, in place."""
        whole = (m.head_dim >> 4) << 4
        total = emitter.variable(emitter.constant(0.0, vector(F32, LANES)))
        with emitter.range(0, whole, LANES) as at:
            value = emitter.load(head + at * 4, vector(F32, LANES))
            total.set(emitter.fma(value, value, total.get()))
        squares = emitter.variable(emitter.sum(total.get()))
        with emitter.range(whole, m.head_dim) as at:
            value = emitter.load(head + at * 4, F32)
            squares.add(value * value)
        mean = squares.get() / emitter.cast(m.head_dim, F32, "sitofp")
        factor = 1.0 / emitter.unary("sqrt", mean + m.float("epsilon"))
        for start, end, lanes in ((0, whole, LANES), (whole, m.head_dim, 1)):
            floats, wide = vector(F32, lanes), emitter.splat(factor, lanes)
            with emitter.range(start, end, lanes) as at:
                value = emitter.load(head + at * 4, floats) * wide
                emitter.store(head + at * 4, value * emitter.load(weight + at * 4, floats))

    def subtract(head: Value, center: Value) -> None:
        with emitter.range(0, m.head_dim) as at:
            value = emitter.load(head + at * 4, F32)
            emitter.store(head + at * 4, value - emitter.load(center + at * 4, F32))

    with emitter.range(first, last) as token:
        qkv = m.qkv + token * m.qkv_stride
        position = load_int32(emitter, b.positions, token)
        angles = (m.cosines + position * half * 4, m.sines + position * half * 4)
        with emitter.when(m.query_norm.differs(0)), emitter.range(0, m.num_heads) as head:
            normalize(qkv + head * head_bytes, m.query_norm)
        with emitter.when(m.key_norm.differs(0)), emitter.range(0, m.num_kv_heads) as head:
            normalize(qkv + (m.num_heads + head) * head_bytes, m.key_norm)
        with emitter.range(0, m.num_heads) as head:
            rotate_head(qkv + head * head_bytes, angles, m.float("scale"))
            kind.mix(qkv + head * head_bytes, m.head_dim)
        slot = load_int32(emitter, b.slots, token)
        page, place = (slot // PAGE_TOKENS) * m.page_bytes, slot % PAGE_TOKENS
        with emitter.range(0, m.num_kv_heads) as head:
            key = qkv + (m.num_heads + head) * head_bytes
            rotate_head(key, angles, emitter.constant(1.0, F32))
            if kind.name == "int8":
                with emitter.when(m.key_center.differs(0)):
                    subtract(key, m.key_center + head * head_bytes)
            kind.mix(key, m.head_dim)
            kind.write_key(key, m.keys + page + head * key_bytes, place, m.head_dim)
            value = qkv + (m.num_heads + m.num_kv_heads + head) * head_bytes
            to = m.values + page + head * value_bytes
            kind.write_value(value, to, place, m.head_dim, m.padded_head_dim)


def rows_unit() -> Unit:
    kernels = {
        "embed": _embed, "norm": partial(_norm, add=False), "add_norm": partial(_norm, add=True),
        "quantize": _quantize, "rope": partial(_rope, pages=Halves),
        "rope_int8": partial(_rope, pages=Bytes), "softcap": _softcap, "layer_norm": _layer_norm,
        "positions": _positions,
    }  # fmt: skip

    def write(emitter: Emitter) -> None:
        for name, kernel in kernels.items():
            emitter.function(name, 5, lambda *a, kernel=kernel: kernel(emitter, *a))

    return Unit("rows", write, tuple(kernels))
