"""Grouped-query attention over the paged KV cache, with a running softmax (Milakov and
Gimelshein, 2018; FlashAttention), its keys cut into splits (Flash-Decoding).

The keys of a sequence fall into *splits* of SPLIT tokens, and these into *chunks* of some pages.
Within a split a row (a query token and one of the query heads that share a key-value head) meets
chunk after chunk: first all of its keys, whose scores become weights at once, then its values. What
comes of it, the largest score, the sum of the weights and the weighted values, is the row's
*partial* result. A row's partials are merged in their order, always, so its bits depend neither on
the batch nor on who computed which split: a chunk or a split that a row may not see leaves it as it
was, to the bit.

A tile is a record of QUERY_BLOCK_FIELDS, at most QUERY_BLOCK consecutive tokens of a sequence and
some of its splits, and one key-value head. Where one tile has all splits, it merges each partial as
it comes. Where the splits of a block are cut into parts, each tile leaves its partials in memory,
and the one that comes last merges them all.

Many rows share a page that becomes wide once, in the first-level cache; few rows widen what they
read. Scores are powers of 2: a query is multiplied by log2(e) when it is taken.
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
from cyclewise.machine.kernels.math import LOG2_E, exp, exp2_of_negative
from cyclewise.machine.kernels.pages import (
    KINDS,
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


def partial_bytes(rows: Any, padded_head_dim: Any) -> Any:
    """Of some rows' partial results: maxima (rows), sums (rows), both padded to whole vectors;
    weighted values (rows, padded_head_dim). Of the kernel's values as of numbers.
    """
    return _whole_lanes(rows) * 8 + rows * padded_head_dim * 4


def _places(chunk: int, rows: Any, padded_head_dim: Any) -> dict[str, Any]:
    """Where a thread's scratch holds what, and its size under the name `end`."""
    wide, per_row = padded_head_dim * WIDE_BYTES, _whole_lanes(rows) * 4
    sizes = {
        "keys": wide * PAGE_TOKENS, "values": wide * chunk,
        "key_scales": PAGE_TOKENS * 4, "value_scales": chunk * 4,
        "queries": rows * padded_head_dim * 4, "scores": rows * (chunk * 4),
        "lane_sums": rows * (LANES * 4), "query_scales": per_row,
        "factors": per_row, "new_factors": per_row, "weight_scales": per_row,
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
    chunk = max(kind.chunk for kind in KINDS.values())
    return int(_places(chunk, QUERY_BLOCK * group_size, padded_head_dim)["end"])


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
        self.key_lanes = self.query_steps * PAGE_TOKENS
        self.value_lanes = self.padded * kind.steps(PAGE_TOKENS)
        self.score_row = kind.chunk * 4

    def tile(self, tile: Value) -> None:
        emitter, m, kind = self.emitter, self.m, self.kind
        index, self.kv_head = tile // m.num_kv_heads, tile % m.num_kv_heads
        record = self.b.query_blocks + index * (8 * len(QUERY_BLOCK_FIELDS))
        block = self.block = Record(emitter, record, QUERY_BLOCK_FIELDS)
        self.rows = block.num_tokens * self.group
        self.few = self.rows <= FEW_ROWS
        self.first_position = block.first_position
        self.at = {
            name: self.scratch + place
            for name, place in _places(kind.chunk, self.rows, self.padded).items()
        }
        self._take_queries()
        total = _Partial(self.at["total"], self.rows)
        whole, ready = block.num_parts.equals(1), emitter.variable(emitter.constant(1))
        with emitter.when(whole):
            self._clear(total)
        last_position = block.first_position + block.num_tokens
        self.end = emitter.minimum(block.end_split * SPLIT, last_position)
        oldest = emitter.maximum(block.first_position - m.window + 1, emitter.constant(0))
        first_page = oldest // PAGE_TOKENS * PAGE_TOKENS
        with emitter.range(block.first_split, block.end_split) as split:
            partial = _Partial(
                whole.select(self.at["partial"], self._partial_address(split)), self.rows
            )
            self._clear(partial)
            start = emitter.maximum(split * SPLIT, first_page // kind.chunk * kind.chunk)
            stop = emitter.minimum((split + 1) * SPLIT, self.end)
            with emitter.range(start, stop, kind.chunk) as chunk:
                self.start = emitter.maximum(chunk, first_page)
                self.stop = emitter.minimum(
                    chunk + kind.chunk, (stop + PAGE_TOKENS - 1) & -PAGE_TOKENS
                )
                self._meet_keys()
                self._weights(partial)
                self._meet_values(partial)
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
        """The rows' queries, contiguous: as they are, or as multiples of a scale each. Their scores
        will be powers of 2, unless they have to be capped before.
        """
        emitter, m, at = self.emitter, self.m, self.at
        capped = m.softcap.differs(0)
        unit = capped.select(emitter.constant(1.0, F32), emitter.constant(LOG2_E, F32))
        with emitter.range(0, self.rows) as row:
            source = m.qkv + self._row_offset(row, m.qkv_stride)
            to = at["queries"] + row * self.query_steps * WIDE_BYTES
            if self.kind.name == "f16":
                _copy(emitter, source, to, self.dim, unit)
            else:
                self._quantize_query(source, to, at["query_scales"] + row * 4, unit)

    def _quantize_query(self, source: Value, to: Value, scale: Value, unit: Value) -> None:
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
        emitter.store(scale, largest.get() / LARGEST_FACTOR * unit)

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

    def _keys(self, position: Value) -> Value:
        """The address of the head's keys of the page that begins at `position`."""
        return self.m.keys + self._in_page(position, self.key_lanes)

    def _values(self, position: Value) -> Value:
        return self.m.values + self._in_page(position, self.value_lanes)

    def _in_page(self, position: Value, lanes: Value) -> Value:
        number = load_int32(self.emitter, self.block.pages, position // PAGE_TOKENS)
        return number * self.m.page_bytes + self.kv_head * self.kind.head_bytes(lanes)

    def _meet_keys(self) -> None:
        """The scores of all rows and a chunk of keys; -inf where a row does not see a key. Asks for
        the values.
        """
        emitter, m, at, kind = self.emitter, self.m, self.at, self.kind
        with emitter.range(self.start, self.stop, PAGE_TOKENS) as position:
            keys, ahead = self._keys(position), self._values(position)
            with emitter.when(self.few.equals(0)):
                self._widen(keys, at["keys"], self.key_lanes, ahead - keys)
            if kind.name == "int8":
                self._take_scales(keys + self.key_lanes * LANE_BYTES, at["key_scales"])
                emitter.prefetch(ahead + self.value_lanes * LANE_BYTES)
            scores = at["scores"] + (position - self.start) * 4
            self._over_rows(
                lambda few, count, row: self._scores(few, count, row, keys, scores, ahead)
            )
        with emitter.when(m.softcap.differs(0)):
            _soft_cap(emitter, at["scores"], self.rows * kind.chunk, m.float("softcap"))
        first, last = self.first_position, self.first_position + self.block.num_tokens - 1
        hidden = (self.stop > first + 1) | (self.start <= last - m.window)
        with emitter.when(hidden), emitter.range(0, self.rows) as row:
            visible = first + row // self.group - self.start + 1
            _hide(emitter, at["scores"] + row * self.score_row, kind.chunk, visible, m.window)

    def _meet_values(self, partial: _Partial) -> None:
        """What all rows weigh of a chunk of values is added to the partial. Asks for the next keys,
        which no hardware can guess.
        """
        emitter, at, kind = self.emitter, self.at, self.kind
        with (
            emitter.when(self.few.equals(0)),
            emitter.range(self.start, self.stop, PAGE_TOKENS) as position,
        ):
            values = self._values(position)
            to = at["values"] + kind.steps(position - self.start) * self.padded * WIDE_BYTES
            self._widen(values, to, self.value_lanes, self._next_keys(position) - values)
        self._over_rows(lambda few, count, row: self._weigh(few, count, row, partial))

    def _next_keys(self, position: Value) -> Value:
        following = position + self.kind.chunk
        return self._keys((following < self.end).select(following, position))

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

    def _widen(self, source: Value, to: Value, count: Value, ahead: Value) -> None:
        """`count` lanes, a multiple of 16; asks for what lies `ahead` of them."""
        emitter = self.emitter
        with emitter.range(0, count, LANES) as at:
            emitter.prefetch(source + at * LANE_BYTES + ahead)
            stored = emitter.load(source + at * LANE_BYTES, vector(I16, LANES))
            emitter.store(to + at * WIDE_BYTES, self.kind.widen(stored))

    def _take_scales(self, source: Value, to: Value) -> None:
        for first in range(0, PAGE_TOKENS, LANES):
            scales = load_scales(self.emitter, source + first * 2, LANES)
            self.emitter.store(to + first * 4, scales)

    def _scores(
        self, few: bool, count: int, row: Value, keys: Value, scores: Value, ahead: Value
    ) -> None:
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
            products(
                kind, sums, self.query_steps, queries, self.query_steps * WIDE_BYTES,
                base + part * lanes * size, PAGE_TOKENS * size, few,
                ahead + self.query_steps * (part * lanes * LANE_BYTES) if few else None,
            )  # fmt: skip
            for i in range(count):
                to = scores + (row + i) * self.score_row
                for j in range(width):
                    key = (part + j) * lanes
                    score = sums[i][j].get()
                    if kind.name == "int8":
                        scale = emitter.broadcast(at["query_scales"] + (row + i) * 4, F32, lanes)
                        scales = emitter.load(at["key_scales"] + key * 4, vector(F32, lanes))
                        score = emitter.to_float(score) * (scales * scale)
                    emitter.store(to + key * 4, score)

    def _weights(self, partial: _Partial) -> None:
        """The scores of a chunk become weights, in their place; the running maxima and sums take
        them in.
        """
        emitter, at, lanes = self.emitter, self.at, self.emitter.target.lanes
        floats, count = vector(F32, lanes), self.stop - self.start
        if self.kind.name == "int8":
            with emitter.range(self.start, self.stop, PAGE_TOKENS) as position:
                to = at["value_scales"] + (position - self.start) * 4
                self._take_scales(self._values(position) + self.value_lanes * LANE_BYTES, to)
                emitter.prefetch(self._next_keys(position) + self.key_lanes * LANE_BYTES)
        with emitter.range(0, self.rows) as row:
            scores, largest = (
                at["scores"] + row * self.score_row,
                emitter.variable(emitter.constant(LEAST, floats)),
            )
            with emitter.range(0, count, PAGE_TOKENS) as key:
                for i in range(0, PAGE_TOKENS, lanes):
                    score = emitter.load(scores + (key + i) * 4, floats)
                    largest.set(emitter.maximum(largest.get(), score))
            before = emitter.broadcast(partial.maxima + row * 4, F32, lanes)
            now = emitter.maximum(before, emitter.fold_all(largest.get(), emitter.maximum))
            emitter.store(partial.maxima + row * 4, emitter.extract(now, 0))
            factor = exp2_of_negative(emitter, before - now)
            emitter.store(at["factors"] + row * 4, emitter.extract(factor, 0))
        with emitter.range(0, self.rows) as row:
            self._weights_of(row, partial, count)

    def _weights_of(self, row: Value, partial: _Partial, count: Value) -> None:
        """A row's scores become weights: as they are, or times the values' scales and as multiples
        of a scale of their own.
        """
        emitter, at, lanes = self.emitter, self.at, self.emitter.target.lanes
        floats, scores = vector(F32, lanes), at["scores"] + row * self.score_row
        maximum, factor = (
            emitter.broadcast(address + row * 4, F32, lanes)
            for address in (partial.maxima, at["factors"])
        )
        sums = at["lane_sums"] + row * (LANES * 4)
        totals = [
            emitter.variable(emitter.load(sums + i * 4, floats) * factor)
            for i in range(0, LANES, lanes)
        ]
        largest = emitter.variable(emitter.constant(0.0, floats))
        with emitter.range(0, count, PAGE_TOKENS) as key:
            for i in range(0, PAGE_TOKENS, lanes):
                place = (key + i) * 4
                weight = exp2_of_negative(emitter, emitter.load(scores + place, floats) - maximum)
                totals[i % LANES // lanes].add(weight)
                if self.kind.name == "int8":
                    weight = weight * emitter.load(at["value_scales"] + place, floats)
                    largest.set(emitter.maximum(largest.get(), weight))
                emitter.store(scores + place, weight)
        for i, total in enumerate(totals):
            emitter.store(sums + i * lanes * 4, total.get())
        if self.kind.name == "int8":
            greatest = emitter.fold(largest.get(), emitter.maximum)
            emitter.store(at["weight_scales"] + row * 4, greatest / LARGEST_FACTOR)
            with emitter.range(0, count, PAGE_TOKENS) as key:
                weights = [
                    emitter.load(scores + (key + i) * 4, vector(F32, LANES))
                    for i in range(0, PAGE_TOKENS, LANES)
                ]
                for i, factors in enumerate(to_factors(emitter, weights, greatest)):
                    emitter.store(scores + key * 2 + i * (LANES * 2), factors)

    def _weigh(self, few: bool, count: int, row: Value, partial: _Partial) -> None:
        """out[row] = factor[row] * out[row] + weights[row] . values, a chunk of values."""
        emitter, kind, at = self.emitter, self.kind, self.at
        lanes, padded = emitter.target.lanes, self.padded
        floats = vector(F32, lanes)
        size = LANE_BYTES if few else WIDE_BYTES
        weights, out = at["scores"] + row * self.score_row, partial.out + row * padded * 4

        def columns(first: Value, width: int) -> None:
            """`width` vectors of columns from `first` on."""

            def before(i: int, j: int) -> Value:
                change = emitter.broadcast(at["factors"] + (row + i) * 4, F32, lanes)
                return emitter.load(out + (padded * i + first + j * lanes) * 4, floats) * change

            is_float = kind.name == "f16"
            sums = [
                [
                    emitter.variable(before(i, j) if is_float else kind.zero(lanes))
                    for j in range(width)
                ]
                for i in range(count)
            ]
            with emitter.range(self.start, self.stop, PAGE_TOKENS) as position:
                done = kind.steps(position - self.start)
                values, ahead = at["values"] + done * padded * size, None
                if few:
                    values = self._values(position)
                    column_bytes = kind.steps(PAGE_TOKENS) * LANE_BYTES
                    ahead = self._next_keys(position) + first * column_bytes
                products(
                    kind, sums, kind.steps(PAGE_TOKENS),
                    weights + done * WIDE_BYTES, self.score_row,
                    values + first * size, padded * size, few, ahead,
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
        old, new = at["factors"], at["new_factors"]
        with emitter.range(0, self.rows, LANES) as row:
            before = emitter.load(total.maxima + row * 4, floats)
            also = emitter.load(partial.maxima + row * 4, floats)
            now = emitter.maximum(before, also)
            emitter.store(total.maxima + row * 4, now)
            factors = [exp2_of_negative(emitter, each - now) for each in (before, also)]
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
    """score = cap * tanh(score / cap) as a power of 2; `count` is a multiple of 16."""
    floats = vector(F32, LANES)
    wide, twice = emitter.splat(cap * LOG2_E, LANES), emitter.splat(2.0 / cap, LANES)
    with emitter.range(0, count, LANES) as at:
        power = exp(emitter, emitter.load(scores + at * 4, floats) * twice)
        emitter.store(scores + at * 4, wide - (wide + wide) / (power + 1.0))


def _hide(emitter: Emitter, scores: Value, count: int, visible: Value, window: Value) -> None:
    """-inf for a row's scores of `count` keys from the `visible`-th on, and more than `window` keys
    before it.
    """
    floats = vector(F32, LANES)
    limit, oldest = (
        emitter.splat(emitter.cast(key, I32, "trunc"), LANES) for key in (visible, visible - window)
    )
    for first in range(0, count, LANES):
        index = emitter.vector_constant(range(first, first + LANES), I32)
        hidden = emitter.constant(float("-inf"), floats)
        seen = (index < limit) & (index >= oldest)
        score = emitter.load(scores + first * 4, floats)
        emitter.store(scores + first * 4, seen.select(score, hidden))


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
