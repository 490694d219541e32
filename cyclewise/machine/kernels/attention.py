"""Grouped-query attention over the paged KV cache, with a running softmax (Milakov and
Gimelshein, 2018; FlashAttention).

A tile is a block of at most QUERY_BLOCK consecutive tokens of a sequence and one key-value head;
its *rows* are the block's tokens times the query heads that share the head. Page after page, keys
and values become float32 once and serve all rows. A row meets the pages in order and nothing else
enters its sums, so its bits do not depend on the block or the batch: a page that it may not see
leaves it as it was, to the bit. Pages that lie before the window of all rows are not read.
"""

from __future__ import annotations

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import F32, I16, I32, Emitter, Value, Variable, vector
from cyclewise.machine.kernels.layout import (
    ATTENTION,
    BATCH,
    PAGE_TOKENS,
    QUERY_BLOCK,
    QUERY_BLOCK_FIELDS,
    THREAD,
    Record,
    load_int32,
)
from cyclewise.machine.kernels.math import exp

LANES = 16
NO_WINDOW = (1 << 31) - 1
"""A window longer than any context."""
LEAST = -3.4028234663852886e38
"""The least finite float32: the maximum of a row that has seen nothing yet."""

ROW_TILES = (6, 4, 3, 2, 1)
"""Rows that meet keys or values at once, largest first."""
SUMS = 12
"""Vectors of sums at once: enough to hide a multiply-add's latency, and registers for them."""


def scratch_bytes(group_size: int, padded_head_dim: int) -> int:
    """Bytes of scratch a thread needs for query groups of that size."""
    rows = QUERY_BLOCK * group_size
    page = PAGE_TOKENS * padded_head_dim * 4
    return 2 * page + rows * 4 * (2 * padded_head_dim + PAGE_TOKENS + 4)


def _attention(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    m, b, t = (
        Record(emitter, moment, ATTENTION),
        Record(emitter, batch, BATCH),
        Record(emitter, thread, THREAD),
    )
    group = m.num_heads // m.num_kv_heads
    dim, padded = m.head_dim, m.padded_head_dim
    floats = vector(F32, LANES)
    zero, one = emitter.constant(0.0, F32), emitter.constant(1.0, F32)
    page_floats = padded * (PAGE_TOKENS * 4)
    keys, values = t.scratch, t.scratch + page_floats
    queries = values + page_floats  # (rows, head_dim)
    out = queries + padded * group * (QUERY_BLOCK * 4)  # (rows, padded_head_dim)
    scores = out + padded * group * (QUERY_BLOCK * 4)  # (rows, PAGE_TOKENS)
    maxima = scores + group * (QUERY_BLOCK * PAGE_TOKENS * 4)  # (rows)
    sums = maxima + group * (QUERY_BLOCK * 4)
    factors = sums + group * (QUERY_BLOCK * 4)
    page_maxima = factors + group * (QUERY_BLOCK * 4)

    with emitter.range(first, last) as tile:
        block_index, kv_head = tile // m.num_kv_heads, tile % m.num_kv_heads
        record = b.query_blocks + block_index * (8 * len(QUERY_BLOCK_FIELDS))
        block = Record(emitter, record, QUERY_BLOCK_FIELDS)
        rows = block.num_tokens * group
        heads = kv_head * group

        with emitter.range(0, rows) as row:
            token, head = row // group, heads + row % group
            source = m.qkv + (block.first_token + token) * m.qkv_stride + head * dim * 4
            _copy(emitter, source, queries + row * dim * 4, dim, one)
            with emitter.range(0, padded, LANES) as at:
                to = out + (row * padded + at) * 4
                emitter.store(to, emitter.constant(0.0, floats))
            emitter.store(maxima + row * 4, emitter.constant(LEAST, F32))
            emitter.store(sums + row * 4, zero)

        end = block.first_position + block.num_tokens
        oldest = emitter.maximum(block.first_position - m.window + 1, emitter.constant(0))
        with emitter.range(oldest // PAGE_TOKENS * PAGE_TOKENS, end, PAGE_TOKENS) as start:
            following = start + PAGE_TOKENS
            ahead = (following < end).select(following, start)
            page, next_page = (
                load_int32(emitter, block.pages, at // PAGE_TOKENS) * m.page_bytes
                for at in (start, ahead)
            )
            half_page = kv_head * PAGE_TOKENS * 2
            to_next = next_page - page
            source = m.keys + page + half_page * dim
            _widen(emitter, source, keys, dim * PAGE_TOKENS, to_next)
            source = m.values + page + half_page * padded
            _widen(emitter, source, values, padded * PAGE_TOKENS, to_next)

            def score(count: int, row: Value) -> None:
                _scores(
                    emitter,
                    count,
                    queries + row * dim * 4,
                    keys,
                    dim,
                    scores + row * (PAGE_TOKENS * 4),
                )

            _over_rows(emitter, rows, score)
            with emitter.when(m.softcap.differs(0)):
                _soft_cap(emitter, scores, rows * PAGE_TOKENS, m.float("softcap"))

            def masked(row: Value, start: Value = start) -> list[Value]:
                visible = block.first_position + row // group - start + 1
                return _masked(emitter, scores + row * (PAGE_TOKENS * 4), visible, m.window)

            with emitter.range(0, rows) as row:
                largest = emitter.maximum(*masked(row))
                emitter.store(page_maxima + row * 4, emitter.fold(largest, emitter.maximum))
            with emitter.range(0, rows, LANES) as row:
                _rescale(emitter, *(at + row * 4 for at in (maxima, page_maxima, sums, factors)))
            with emitter.range(0, rows) as row:
                maximum = emitter.broadcast(maxima + row * 4, F32, LANES)
                weights = [exp(emitter, score - maximum) for score in masked(row)]
                for part, weight in enumerate(weights):
                    emitter.store(scores + row * (PAGE_TOKENS * 4) + part * LANES * 4, weight)
                total = emitter.load(sums + row * 4, F32) + emitter.sum(weights[0] + weights[1])
                emitter.store(sums + row * 4, total)

            def weigh(count: int, row: Value) -> None:
                _weighted(
                    emitter, count, scores + row * (PAGE_TOKENS * 4), values, padded,
                    out + row * padded * 4, factors + row * 4,
                )  # fmt: skip

            _over_rows(emitter, rows, weigh)

        with emitter.range(0, rows) as row:
            token, head = row // group, heads + row % group
            to = m.out + (block.first_token + token) * m.out_stride + head * dim * 4
            inverse = one / emitter.load(sums + row * 4, F32)
            _copy(emitter, out + row * padded * 4, to, dim, inverse)


def _over_rows(emitter: Emitter, rows: Value, call: object) -> None:
    done = emitter.variable(emitter.constant(0))
    for size in ROW_TILES:
        with emitter.loop() as leave_if:
            leave_if(done.get() + size > rows)
            call(size, done.get())  # type: ignore[operator]
            done.add(size)


def _copy(emitter: Emitter, source: Value, to: Value, count: Value, factor: Value) -> None:
    """to = source * factor, `count` float32."""
    whole = (count >> 4) << 4
    wide = emitter.splat(factor, LANES)
    with emitter.range(0, whole, LANES) as at:
        value = emitter.load(source + at * 4, vector(F32, LANES))
        emitter.store(to + at * 4, value * wide)
    with emitter.range(whole, count) as at:
        emitter.store(to + at * 4, emitter.load(source + at * 4, F32) * factor)


def _widen(emitter: Emitter, source: Value, to: Value, count: Value, to_next: Value) -> None:
    """float16 to float32; `count` is a multiple of 16. Asks for what lies `to_next` bytes on: the
    next page, which no hardware can guess.
    """
    with emitter.range(0, count, LANES) as at:
        emitter.prefetch(source + to_next + at * 2)
        halves = emitter.load(source + at * 2, vector(I16, LANES))
        emitter.store(to + at * 4, emitter.half_to_float(halves))


def _scores(
    emitter: Emitter, rows: int, queries: Value, keys: Value, dim: Value, out: Value
) -> None:
    """out[row][key] = query[row] . key, a page of keys, one key a lane."""
    lanes = emitter.target.lanes
    vectors = PAGE_TOKENS // lanes
    width = vectors if rows * vectors <= SUMS else min(2, vectors)
    floats = vector(F32, lanes)
    for part in range(0, vectors, width):
        zero = emitter.constant(0.0, floats)
        sums = [[emitter.variable(zero) for _ in range(width)] for _ in range(rows)]
        with emitter.range(0, dim) as at:
            base = keys + at * (PAGE_TOKENS * 4) + part * lanes * 4
            _multiply_add(
                emitter, sums, base, [queries + (dim * row + at) * 4 for row in range(rows)]
            )
        for row in range(rows):
            for i in range(width):
                to = out + row * (PAGE_TOKENS * 4) + (part + i) * lanes * 4
                emitter.store(to, sums[row][i].get())


def _multiply_add(
    emitter: Emitter, sums: list[list[Variable]], vectors: Value, scalars: list[Value]
) -> None:
    """sums[row][i] += scalars[row] * vectors[i], both read from memory: first whichever are fewer,
    so that registers hold them.
    """
    lanes = emitter.target.lanes
    rows, width = range(len(sums)), range(len(sums[0]))

    def scalar(row: int) -> Value:
        return emitter.broadcast(scalars[row], F32, lanes)

    def found(i: int) -> Value:
        return emitter.load(vectors + i * lanes * 4, vector(F32, lanes))

    def add(row: int, i: int, left: Value, right: Value) -> None:
        sums[row][i].set(emitter.fma(left, right, sums[row][i].get()))

    if len(rows) < len(width):
        held = [scalar(row) for row in rows]
        for i in width:
            right = found(i)
            for row in rows:
                add(row, i, held[row], right)
    else:
        held = [found(i) for i in width]
        for row in rows:
            left = scalar(row)
            for i in width:
                add(row, i, left, held[i])


def _soft_cap(emitter: Emitter, scores: Value, count: Value, cap: Value) -> None:
    """score = cap * tanh(score / cap); `count` is a multiple of 16."""
    floats = vector(F32, LANES)
    wide, twice = emitter.splat(cap, LANES), emitter.splat(2.0 / cap, LANES)
    with emitter.range(0, count, LANES) as at:
        power = exp(emitter, emitter.load(scores + at * 4, floats) * twice)
        emitter.store(scores + at * 4, wide - (wide + wide) / (power + 1.0))


def _masked(emitter: Emitter, scores: Value, visible: Value, window: Value) -> list[Value]:
    """A row's scores of a page: -inf from the `visible`-th key on, and more than `window` keys
    before it.
    """
    floats = vector(F32, LANES)
    limit, oldest = (
        emitter.splat(emitter.cast(key, I32, "trunc"), LANES) for key in (visible, visible - window)
    )
    found = []
    for first in range(0, PAGE_TOKENS, LANES):
        index = emitter.vector_constant(range(first, first + LANES), I32)
        hidden = emitter.constant(float("-inf"), floats)
        seen = (index < limit) & (index >= oldest)
        found.append(seen.select(emitter.load(scores + first * 4, floats), hidden))
    return found


def _rescale(
    emitter: Emitter, maxima: Value, page_maxima: Value, sums: Value, factors: Value
) -> None:
    """The running maxima of LANES rows; `factors` and `sums` take what was down to the new ones."""
    floats = vector(F32, LANES)
    before = emitter.load(maxima, floats)
    now = emitter.maximum(before, emitter.load(page_maxima, floats))
    factor = exp(emitter, before - now)
    emitter.store(maxima, now)
    emitter.store(factors, factor)
    emitter.store(sums, emitter.load(sums, floats) * factor)


def _weighted(
    emitter: Emitter,
    rows: int,
    weights: Value,
    values: Value,
    padded: Value,
    out: Value,
    factors: Value,
) -> None:
    """out[row] = factor[row] * out[row] + weights[row] . values, a page of values."""
    lanes = emitter.target.lanes
    floats = vector(F32, lanes)

    def columns(first: Value, width: int) -> None:
        """`width` vectors of columns from `first` on."""
        sums = []
        for row in range(rows):
            change = emitter.broadcast(factors + row * 4, F32, lanes)
            at = out + (padded * row + first) * 4
            sums.append(
                [
                    emitter.variable(emitter.load(at + i * lanes * 4, floats) * change)
                    for i in range(width)
                ]
            )
        with emitter.range(0, PAGE_TOKENS) as token:
            base = values + (token * padded + first) * 4
            of_token = [weights + (token + row * PAGE_TOKENS) * 4 for row in range(rows)]
            _multiply_add(emitter, sums, base, of_token)
        for row in range(rows):
            for i in range(width):
                at = out + (padded * row + first) * 4 + i * lanes * 4
                emitter.store(at, sums[row][i].get())

    narrow = LANES // lanes
    wide = 2 * narrow if rows * 2 * narrow <= SUMS else narrow
    step = wide * lanes
    whole = (padded // step) * step
    with emitter.range(0, whole, step) as column:
        columns(column, wide)
    if wide > narrow:
        with emitter.range(whole, padded, LANES) as column:
            columns(column, narrow)


def attention_unit() -> Unit:
    def write(emitter: Emitter) -> None:
        emitter.function("attention", 5, lambda *a: _attention(emitter, *a))

    return Unit("attention", write, ("attention",))
