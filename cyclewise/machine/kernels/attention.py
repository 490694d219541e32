"""Grouped-query attention over the paged KV cache, with a running softmax (Milakov and
Gimelshein, 2018; FlashAttention), its keys cut into splits (Flash-Decoding).

The keys of a sequence fall into *splits* of SPLIT tokens. Within a split a row (a query token and
one of the query heads that share a key-value head) meets page after page; what comes of it, the
largest score, the sum of the weights and the weighted values, is the row's *partial* result. A
row's partials are merged in their order, always, so its bits depend neither on the batch nor on who
computed which split: a page or a split that a row may not see leaves it as it was, to the bit.

A tile is a record of QUERY_BLOCK_FIELDS, at most QUERY_BLOCK consecutive tokens of a sequence and
some of its splits, and one key-value head. Where one tile has all splits, it merges each partial as
it comes. Where the splits of a block are cut into parts, each tile leaves its partials in memory,
and the one that comes last merges them all.

Many rows share a page that becomes wide once, in the first-level cache; few rows widen what they
read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import F32, I16, I32, Emitter, Value, vector
from cyclewise.machine.kernels.layout import (
    ATTENTION,
    BATCH,
    LINE,
    PAGE_TOKENS,
    QUERY_BLOCK,
    QUERY_BLOCK_FIELDS,
    SPLIT,
    THREAD,
    Record,
    load_int32,
)
from cyclewise.machine.kernels.math import exp, exp_of_negative
from cyclewise.machine.kernels.pages import (
    LANE_BYTES,
    LANES,
    LARGEST_FACTOR,
    WIDE_BYTES,
    Bytes,
    Halves,
    Kind,
    largest_of,
    load_scales,
    products,
    to_factors,
)

NO_WINDOW = (1 << 31) - 1
"""A window longer than any context."""
LEAST = -3.4028234663852886e38
"""The least finite float32: the maximum of a row that has seen nothing yet."""

MANY = (6, 4, 3, 2, 1)
FEW = (4, 3, 2, 1)
"""Rows that meet keys or values at once, largest first."""
FEW_ROWS = 8
"""Up to so many rows read a page as it is stored."""
SUMS = 12
"""Vectors of sums at once: enough to hide a multiply-add's latency, and registers for them."""


def _whole_lanes(rows: Any) -> Any:
    return (rows + (LANES - 1)) // LANES * LANES


def _tiles(rows: int, sizes: tuple[int, ...]) -> list[int]:
    """How rows fall into tiles. Of few rows 5 are 3 and 2: one alone is slow."""
    found = []
    for size in sizes:
        while rows >= size and (rows, size) != (5, 4):
            found.append(size)
            rows -= size
    return found


def partial_bytes(rows: Any, padded_head_dim: Any) -> Any:
    """Of some rows' partial results: maxima (rows), sums (rows), both padded to whole vectors;
    weighted values (rows, padded_head_dim). Of the kernel's values as of numbers.
    """
    return _whole_lanes(rows) * 8 + rows * padded_head_dim * 4


def _places(rows: Any, padded_head_dim: Any) -> dict[str, Any]:
    """Where a thread's scratch holds what, and its size under the name `end`."""
    page, per_row = padded_head_dim * (PAGE_TOKENS * WIDE_BYTES), _whole_lanes(rows) * 4
    sizes = {
        "keys": page, "values": page,
        "key_scales": PAGE_TOKENS * 4, "value_scales": PAGE_TOKENS * 4,
        "queries": rows * padded_head_dim * 4, "scores": rows * (PAGE_TOKENS * 4),
        "lane_sums": rows * (LANES * 4), "query_scales": per_row, "page_maxima": per_row,
        "factors": per_row, "weight_scales": per_row,
        "partial": partial_bytes(rows, padded_head_dim),
        "total": partial_bytes(rows, padded_head_dim),
    }  # fmt: skip
    places, at = {}, rows * 0
    for name, size in sizes.items():
        places[name] = at
        at = at + size
    return places | {"end": at}


def scratch_bytes(group_size: int, padded_head_dim: int) -> int:
    """Bytes of scratch a thread needs for query groups of that size."""
    return int(_places(QUERY_BLOCK * group_size, padded_head_dim)["end"])


class _Partial:
    """The partial results of rows, at an address."""

    def __init__(self, address: Value, rows: Value) -> None:
        per_row = _whole_lanes(rows) * 4
        self.maxima, self.sums = address, address + per_row
        self.out = address + per_row * 2


class _Attention:
    """Writes the tiles of one moment."""

    def __init__(self, emitter: Emitter, kind: Kind, moment: Value, batch: Value, thread: Value):
        self.emitter, self.kind = emitter, kind
        self.m, self.b = Record(emitter, moment, ATTENTION), Record(emitter, batch, BATCH)
        self.scratch = Record(emitter, thread, THREAD).scratch
        self.group = self.m.num_heads // self.m.num_kv_heads
        self.dim, self.padded = self.m.head_dim, self.m.padded_head_dim
        self.query_steps = kind.steps(self.dim)

    def tile(self, tile: Value) -> None:
        emitter, m = self.emitter, self.m
        index, self.kv_head = tile // m.num_kv_heads, tile % m.num_kv_heads
        record = self.b.query_blocks + index * (8 * len(QUERY_BLOCK_FIELDS))
        block = self.block = Record(emitter, record, QUERY_BLOCK_FIELDS)
        self.rows = block.num_tokens * self.group
        self.few = self.rows <= FEW_ROWS
        self.key_bytes_ahead, self.value_bytes_ahead = self._bytes_ahead()
        self.first_position = block.first_position
        self.at = {
            name: self.scratch + place for name, place in _places(self.rows, self.padded).items()
        }
        self._take_queries()
        total = _Partial(self.at["total"], self.rows)
        whole, ready = block.num_parts.equals(1), emitter.variable(emitter.constant(1))
        with emitter.when(whole):
            self._clear(total)
        last_position = block.first_position + block.num_tokens
        end = emitter.minimum(block.end_split * SPLIT, last_position)
        oldest = emitter.maximum(block.first_position - m.window + 1, emitter.constant(0))
        first_page = oldest // PAGE_TOKENS * PAGE_TOKENS
        with emitter.range(block.first_split, block.end_split) as split:
            partial = _Partial(
                whole.select(self.at["partial"], self._partial_address(split)), self.rows
            )
            self._clear(partial)
            start = emitter.maximum(split * SPLIT, first_page)
            stop = emitter.minimum((split + 1) * SPLIT, end)
            with emitter.range(start, stop, PAGE_TOKENS) as position:
                self._page(partial, position, end)
            with emitter.range(0, self.rows) as row:
                lanes = emitter.load(self.at["lane_sums"] + row * (LANES * 4), vector(F32, LANES))
                emitter.store(partial.sums + row * 4, emitter.sum(lanes))
            with emitter.when(whole):
                self._merge(total, partial)
        with emitter.when(whole.equals(0)):
            counter = block.counters + self.kv_head * LINE
            done = emitter.atomic_add(counter, emitter.constant(1)) + 1
            ready.set(emitter.cast(done.equals(block.num_parts), ready.get().type, "zext"))
            with emitter.when(ready.get().differs(0)):
                emitter.store(counter, emitter.constant(0), align=8)
                self._clear(total)
                with emitter.range(0, block.num_splits) as split:
                    self._merge(total, _Partial(self._partial_address(split), self.rows))
        with emitter.when(ready.get().differs(0)), emitter.range(0, self.rows) as row:
            inverse = 1.0 / emitter.load(total.sums + row * 4, F32)
            to = m.out + self._row_offset(row, m.out_stride)
            _copy(emitter, total.out + row * self.padded * 4, to, self.dim, inverse)

    def _bytes_ahead(self) -> tuple[Value, Value]:
        """Of the next page's keys and values, what each step of a product must ask for so that few
        rows have asked for all of them.
        """
        emitter, kind = self.emitter, self.kind
        vectors, halves = PAGE_TOKENS // emitter.target.lanes, self.padded // LANES
        key_steps = value_steps = emitter.constant(1)
        for rows in range(1, FEW_ROWS + 1):
            tiles = _tiles(rows, FEW)
            passes = sum(vectors // self._width(count) for count in tiles)
            blocks = halves * 0
            for count in tiles:
                blocks = blocks + (halves + self._halves(count) - 1) // self._halves(count)
            found = self.rows.equals(rows)
            key_steps = found.select(self.query_steps * passes, key_steps)
            value_steps = found.select(blocks * kind.steps(PAGE_TOKENS), value_steps)
        key_bytes = kind.head_bytes(self.query_steps * PAGE_TOKENS)
        value_bytes = kind.head_bytes(self.padded * kind.steps(PAGE_TOKENS))
        return (
            (key_bytes + key_steps - 1) // key_steps,
            (value_bytes + value_steps - 1) // value_steps,
        )

    def _width(self, count: int) -> int:
        """Vectors of keys that `count` rows meet at once."""
        vectors = PAGE_TOKENS // self.emitter.target.lanes
        return vectors if count * vectors <= SUMS else min(2, vectors)

    def _halves(self, count: int) -> int:
        """Columns of values that `count` rows meet at once, in LANES."""
        return 2 if count * 2 * (LANES // self.emitter.target.lanes) <= SUMS else 1

    def _row_offset(self, row: Value, stride: Value) -> Value:
        token, head = row // self.group, self.kv_head * self.group + row % self.group
        return (self.block.first_token + token) * stride + head * self.dim * 4

    def _partial_address(self, split: Value) -> Value:
        index = split * self.m.num_kv_heads + self.kv_head
        return self.block.partials + index * partial_bytes(self.rows, self.padded)

    def _take_queries(self) -> None:
        """The rows' queries, contiguous: as they are, or as multiples of a scale each."""
        emitter, m, at = self.emitter, self.m, self.at
        with emitter.range(0, self.rows) as row:
            source = m.qkv + self._row_offset(row, m.qkv_stride)
            to = at["queries"] + row * self.query_steps * WIDE_BYTES
            if self.kind.name == "f16":
                _copy(emitter, source, to, self.dim, emitter.constant(1.0, F32))
            else:
                self._quantize_query(source, to, at["query_scales"] + row * 4)

    def _quantize_query(self, source: Value, to: Value, scale: Value) -> None:
        emitter = self.emitter
        largest = emitter.variable(emitter.constant(0.0, F32))
        whole = (self.dim >> 4) << 4

        def each(write: Callable[[Value, int], None]) -> None:
            with emitter.range(0, whole, LANES) as at:
                write(at, LANES)
            with emitter.range(whole, self.dim) as at:
                write(at, 1)

        def measure(at: Value, lanes: int) -> None:
            value = emitter.load(source + at * 4, vector(F32, lanes))
            largest.set(emitter.maximum(largest.get(), largest_of(emitter, [value])))

        def convert(at: Value, lanes: int) -> None:
            value = emitter.load(source + at * 4, vector(F32, lanes))
            emitter.store(to + at * 2, to_factors(emitter, [value], largest.get())[0])

        each(measure)
        each(convert)
        emitter.store(scale, largest.get() / LARGEST_FACTOR)

    def _clear(self, partial: _Partial) -> None:
        """A partial, and the lanes of its sums, that have seen nothing."""
        emitter, floats = self.emitter, vector(F32, LANES)
        zero = emitter.constant(0.0, floats)
        with emitter.range(0, self.rows, LANES) as row:
            emitter.store(partial.maxima + row * 4, emitter.constant(LEAST, floats))
            emitter.store(partial.sums + row * 4, zero)
        with emitter.range(0, self.rows * self.padded, LANES) as at:
            emitter.store(partial.out + at * 4, zero)
        with emitter.range(0, self.rows) as row:
            emitter.store(self.at["lane_sums"] + row * (LANES * 4), zero)

    def _page(self, partial: _Partial, start: Value, end: Value) -> None:
        """The rows meet the page of the keys from `start` on."""
        emitter, m, at = self.emitter, self.m, self.at
        following = start + PAGE_TOKENS
        ahead = (following < end).select(following, start)
        page, next_page = (
            load_int32(emitter, self.block.pages, where // PAGE_TOKENS) * m.page_bytes
            for where in (start, ahead)
        )
        self.to_next = next_page - page
        key_lanes = self.query_steps * PAGE_TOKENS
        value_lanes = self.padded * self.kind.steps(PAGE_TOKENS)
        keys = m.keys + page + self.kv_head * self.kind.head_bytes(key_lanes)
        values = m.values + page + self.kv_head * self.kind.head_bytes(value_lanes)
        self.ahead, self.ahead_end = emitter.variable(keys), emitter.variable(keys)
        many = self.few.equals(0)
        with emitter.when(many):
            self._widen(keys, at["keys"], key_lanes)
            self._widen(values, at["values"], value_lanes)
        if self.kind.name == "int8":
            self._take_scales(keys + key_lanes * LANE_BYTES, at["key_scales"])
            self._take_scales(values + value_lanes * LANE_BYTES, at["value_scales"])

        self._look_ahead(keys, key_lanes)
        self._over_rows(lambda few, count, row: self._scores(few, count, row, keys))
        with emitter.when(m.softcap.differs(0)):
            _soft_cap(emitter, at["scores"], self.rows * PAGE_TOKENS, m.float("softcap"))
        first, last = self.first_position, self.first_position + self.block.num_tokens - 1
        seen_by_all = (following <= first + 1) & (start > last - m.window)
        for masked in (False, True):
            with emitter.when(seen_by_all.equals(int(not masked))):
                self._weights(partial, start, masked)
        self._look_ahead(values, value_lanes)
        self._over_rows(lambda few, count, row: self._weigh(few, count, row, values, partial))

    def _look_ahead(self, source: Value, lanes: Value) -> None:
        """From now on `_ask` asks for what lies there in the next page, which no hardware can
        guess.
        """
        self.ahead.set(source + self.to_next)
        self.ahead_end.set(self.ahead.get() + self.kind.head_bytes(lanes))

    def _ask(self, num_bytes: Value) -> None:
        """Asks for `num_bytes` more: too many lines at once would have to wait for each other."""
        now = self.ahead.get()
        self.emitter.prefetch(self.emitter.minimum(now, self.ahead_end.get() - LINE))
        self.ahead.set(now + num_bytes)

    def _over_rows(self, write: Callable[[bool, int, Value], None]) -> None:
        """Rows in tiles: `write(few, count, first row)`."""
        emitter = self.emitter
        for few, sizes in ((True, FEW), (False, MANY)):
            with emitter.when(self.few.equals(int(few))):
                done = emitter.variable(emitter.constant(0))
                for size in sizes:
                    with emitter.loop() as leave_if:
                        left = self.rows - done.get()
                        leave_if(left < size)
                        if few and size == 4:
                            leave_if(left.equals(5))
                        write(few, size, done.get())
                        done.add(size)

    def _widen(self, source: Value, to: Value, count: Value) -> None:
        """`count` lanes, a multiple of 16; asks for the next page, which no hardware can guess."""
        emitter = self.emitter
        with emitter.range(0, count, LANES) as at:
            emitter.prefetch(source + self.to_next + at * LANE_BYTES)
            stored = emitter.load(source + at * LANE_BYTES, vector(I16, LANES))
            emitter.store(to + at * WIDE_BYTES, self.kind.widen(stored))

    def _take_scales(self, source: Value, to: Value) -> None:
        for first in range(0, PAGE_TOKENS, LANES):
            scales = load_scales(self.emitter, source + first * 2, LANES)
            self.emitter.store(to + first * 4, scales)

    def _scores(self, few: bool, count: int, row: Value, keys: Value) -> None:
        """scores[row][key] = query[row] . key, a page of keys, one key a lane."""
        emitter, kind, at = self.emitter, self.kind, self.at
        lanes = emitter.target.lanes
        vectors = PAGE_TOKENS // lanes
        width = self._width(count)
        queries = at["queries"] + row * self.query_steps * WIDE_BYTES
        base, size = (keys, LANE_BYTES) if few else (at["keys"], WIDE_BYTES)
        for part in range(0, vectors, width):
            sums = [
                [emitter.variable(kind.zero(lanes)) for _ in range(width)] for _ in range(count)
            ]

            def addresses(step: Value, part: int = part) -> list[Value]:
                line = base + step * (PAGE_TOKENS * size)
                return [line + (part + i) * lanes * size for i in range(width)]

            products(
                kind, sums, self.query_steps,
                lambda i, step: queries + (self.query_steps * i + step) * WIDE_BYTES,
                addresses, few, lambda: self._ask(self.key_bytes_ahead),
            )  # fmt: skip
            for i in range(count):
                to = at["scores"] + (row + i) * (PAGE_TOKENS * 4)
                for j in range(width):
                    key = (part + j) * lanes
                    score = sums[i][j].get()
                    if kind.name == "int8":
                        scale = emitter.broadcast(at["query_scales"] + (row + i) * 4, F32, lanes)
                        scales = emitter.load(at["key_scales"] + key * 4, vector(F32, lanes))
                        score = emitter.to_float(score) * (scales * scale)
                    emitter.store(to + key * 4, score)

    def _weights(self, partial: _Partial, start: Value, masked: bool) -> None:
        """Scores become weights; the running maxima and sums take them in. Where some rows do not
        see the whole page, `masked`.
        """
        emitter, at, floats = self.emitter, self.at, vector(F32, LANES)

        def scores(row: Value) -> list[Value]:
            here = at["scores"] + row * (PAGE_TOKENS * 4)
            if masked:
                visible = self.first_position + row // self.group - start + 1
                return _masked(emitter, here, visible, self.m.window)
            return [emitter.load(here + i * 4, floats) for i in range(0, PAGE_TOKENS, LANES)]

        with emitter.range(0, self.rows) as row:
            largest = emitter.maximum(*scores(row))
            emitter.store(at["page_maxima"] + row * 4, emitter.fold(largest, emitter.maximum))
        with emitter.range(0, self.rows, LANES) as row:
            before = emitter.load(partial.maxima + row * 4, floats)
            now = emitter.maximum(before, emitter.load(at["page_maxima"] + row * 4, floats))
            emitter.store(partial.maxima + row * 4, now)
            emitter.store(at["factors"] + row * 4, exp_of_negative(emitter, before - now))
        with emitter.range(0, self.rows) as row:
            maximum = emitter.broadcast(partial.maxima + row * 4, F32, LANES)
            weights = [exp_of_negative(emitter, score - maximum) for score in scores(row)]
            factor = emitter.broadcast(at["factors"] + row * 4, F32, LANES)
            sums = at["lane_sums"] + row * (LANES * 4)
            total = emitter.load(sums, floats) * factor + (weights[0] + weights[1])
            emitter.store(sums, total)
            self._keep_weights(row, weights)

    def _keep_weights(self, row: Value, weights: list[Value]) -> None:
        """In the place of the row's scores: as they are, or times the values' scales and as
        multiples of a scale of their own.
        """
        emitter, at = self.emitter, self.at
        to, size = at["scores"] + row * (PAGE_TOKENS * 4), 4
        if self.kind.name == "int8":
            scales = [
                emitter.load(at["value_scales"] + i * 4, vector(F32, LANES))
                for i in range(0, PAGE_TOKENS, LANES)
            ]
            scaled = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
            largest = largest_of(emitter, scaled)
            emitter.store(at["weight_scales"] + row * 4, largest / LARGEST_FACTOR)
            weights, size = to_factors(emitter, scaled, largest), 2
        for i, weight in enumerate(weights):
            emitter.store(to + i * (LANES * size), weight)

    def _weigh(self, few: bool, count: int, row: Value, values: Value, partial: _Partial) -> None:
        """out[row] = factor[row] * out[row] + weights[row] . values, a page of values."""
        emitter, kind, at = self.emitter, self.kind, self.at
        lanes, padded = emitter.target.lanes, self.padded
        floats = vector(F32, lanes)
        base, size = (values, LANE_BYTES) if few else (at["values"], WIDE_BYTES)
        weights, out = at["scores"] + row * (PAGE_TOKENS * 4), partial.out + row * padded * 4

        def columns(first: Value, width: int) -> None:
            """`width` vectors of columns from `first` on."""

            def before(i: int, j: int) -> Value:
                change = emitter.broadcast(at["factors"] + (row + i) * 4, F32, lanes)
                return emitter.load(out + (padded * i + first + j * lanes) * 4, floats) * change

            def addresses(step: Value) -> list[Value]:
                line = base + (step * padded + first) * size
                return [line + j * lanes * size for j in range(width)]

            is_float = kind.name == "f16"
            sums = [
                [
                    emitter.variable(before(i, j) if is_float else kind.zero(lanes))
                    for j in range(width)
                ]
                for i in range(count)
            ]
            products(
                kind, sums, kind.steps(PAGE_TOKENS),
                lambda i, step: weights + step * WIDE_BYTES + i * (PAGE_TOKENS * 4),
                addresses, few, lambda: self._ask(self.value_bytes_ahead),
            )  # fmt: skip
            for i in range(count):
                for j in range(width):
                    found = sums[i][j].get()
                    if not is_float:
                        scale = emitter.broadcast(at["weight_scales"] + (row + i) * 4, F32, lanes)
                        found = emitter.fma(emitter.to_float(found), scale, before(i, j))
                    emitter.store(out + (padded * i + first + j * lanes) * 4, found)

        narrow = LANES // lanes
        wide = self._halves(count) * narrow
        whole = (padded // (wide * lanes)) * (wide * lanes)
        with emitter.range(0, whole, wide * lanes) as column:
            columns(column, wide)
        if wide > narrow:
            with emitter.range(whole, padded, LANES) as column:
                columns(column, narrow)

    def _merge(self, total: _Partial, partial: _Partial) -> None:
        """total takes in a split's partial."""
        emitter, at, floats = self.emitter, self.at, vector(F32, LANES)
        old, new = at["factors"], at["page_maxima"]
        with emitter.range(0, self.rows, LANES) as row:
            before = emitter.load(total.maxima + row * 4, floats)
            also = emitter.load(partial.maxima + row * 4, floats)
            now = emitter.maximum(before, also)
            emitter.store(total.maxima + row * 4, now)
            factors = [exp_of_negative(emitter, each - now) for each in (before, also)]
            emitter.store(old + row * 4, factors[0])
            emitter.store(new + row * 4, factors[1])
            sums = [emitter.load(each.sums + row * 4, floats) for each in (total, partial)]
            merged = emitter.fma(sums[1], factors[1], sums[0] * factors[0])
            emitter.store(total.sums + row * 4, merged)
        with emitter.range(0, self.rows) as row:
            factors = [emitter.broadcast(each + row * 4, F32, LANES) for each in (old, new)]
            with emitter.range(row * self.padded, (row + 1) * self.padded, LANES) as place:
                outs = [emitter.load(each.out + place * 4, floats) for each in (total, partial)]
                merged = emitter.fma(outs[1], factors[1], outs[0] * factors[0])
                emitter.store(total.out + place * 4, merged)


def _copy(emitter: Emitter, source: Value, to: Value, count: Value, factor: Value) -> None:
    """to = source * factor, `count` float32."""
    whole = (count >> 4) << 4
    wide = emitter.splat(factor, LANES)
    with emitter.range(0, whole, LANES) as at:
        value = emitter.load(source + at * 4, vector(F32, LANES))
        emitter.store(to + at * 4, value * wide)
    with emitter.range(whole, count) as at:
        emitter.store(to + at * 4, emitter.load(source + at * 4, F32) * factor)


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


def attention_unit() -> Unit:
    def write(emitter: Emitter) -> None:
        for name, kind in (("attention", Halves(emitter)), ("attention_int8", Bytes(emitter))):

            def run(
                moment: Value, batch: Value, thread: Value, first: Value, last: Value,
                kind: Kind = kind,
            ) -> None:  # fmt: skip
                attention = _Attention(emitter, kind, moment, batch, thread)
                with emitter.range(first, last) as tile:
                    attention.tile(tile)

            emitter.function(name, 5, run)

    return Unit("attention", write, ("attention", "attention_int8"))
