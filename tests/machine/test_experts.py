from __future__ import annotations

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from cyclewise.machine.kernels.blocks import tile_bytes
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP
from cyclewise.machine.kernels.experts import ROUTE_SCRATCH_BYTES, experts_unit
from cyclewise.machine.kernels.layout import (
    BATCH,
    DISPATCH,
    EXPERTS_DOWN,
    EXPERTS_GATED,
    PLACE,
    ROUTE,
    SLOT,
)
from cyclewise.machine.kernels.linear import SUMS_BYTES
from cyclewise.machine.kernels.matmul import SCRATCH_BYTES, matmul_unit
from tests import naive, naive_experts
from tests.machine.kernel_calls import (
    EXACTLY,
    GUARD,
    Thread,
    address,
    check_guard,
    guarded,
    kernel,
    pack,
    random_rows,
    record,
)

SCRATCH = 2 * SUMS_BYTES + SCRATCH_BYTES
PRIVATE = 320


def shifted(size, dtype=np.uint8):
    """A private buffer: a guarded view behind PRIVATE bytes that are not its thread's, and what a
    record calls it.
    """
    whole = guarded(PRIVATE + size * np.dtype(dtype).itemsize)
    return whole, whole[PRIVATE:-GUARD].view(dtype)


def rows_taken(count):
    return count if count < 4 else -(-count // 4) * 4


class Routed:
    """What `route` writes for random logits."""

    def __init__(self, logits, num_chosen, *, normalize=True):
        tokens, experts = logits.shape
        self.tokens, self.experts, self.chosen = tokens, experts, num_chosen
        padded = np.full((tokens, experts + 5), np.nan, np.float32)
        padded[:, :experts] = logits
        most = tokens * num_chosen + 3 * min(experts, tokens * num_chosen)
        self._slots, self.slots = shifted(1 + 3 * experts, np.int64)
        self._places, self.places = shifted(3 * tokens * num_chosen, np.int32)
        self._row_tokens, self.row_tokens = shifted(most, np.int32)
        self._row_weights, self.row_weights = shifted(most, np.float32)
        self.num_rows = most
        self.fields = {
            "slots": self._slots, "places": self._places,
            "row_tokens": self._row_tokens, "row_weights": self._row_weights,
        }  # fmt: skip
        self._logits, self._thread = padded, Thread(ROUTE_SCRATCH_BYTES, PRIVATE)
        self._moment = record(
            ROUTE, logits=padded, logits_stride=padded.strides[0], num_experts=experts,
            num_chosen=num_chosen, normalize=int(normalize), **self.fields,
        )  # fmt: skip
        self.batch = record(BATCH, num_tokens=tokens)
        self.run()

    def run(self):
        kernel(experts_unit(), "route")(self._moment, self.batch, self._thread.record, 0, 1)
        self._thread.check()
        for buffer in self.fields.values():
            check_guard(buffer)
            assert (buffer[:PRIVATE] == 0xA5).all()

    def given(self, *names):
        return {name: self.fields[name] for name in names}

    @property
    def found_slots(self):
        """(expert, first row, rows) of each."""
        return self.slots[1 : 1 + 3 * self.slots[0]].reshape(-1, len(SLOT)).tolist()

    @property
    def found_places(self):
        return self.places.reshape(self.tokens, self.chosen, len(PLACE))

    def weights(self):
        """(tokens, experts), as the kernel has them."""
        out = np.zeros((self.tokens, self.experts), np.float32)
        for expert, first, count in self.found_slots:
            rows = slice(first, first + count)
            out[self.row_tokens[rows], expert] = self.row_weights[rows]
        return out


def check_routing(routed, want):
    """Slots, places and rows, against the twin's choice."""
    row, slots = 0, []
    for expert in want.experts:
        tokens = want.tokens_of(expert)
        slots.append([expert, row, len(tokens)])
        assert routed.row_tokens[row : row + len(tokens)].tolist() == tokens
        weights = [want.weight(token, expert) for token in tokens]
        found = routed.row_weights[row : row + len(tokens)]
        np.testing.assert_allclose(found, weights, rtol=2e-6, atol=1e-37)
        row += rows_taken(len(tokens))
    assert routed.found_slots == slots
    by_expert = {expert: (first, count) for expert, first, count in slots}
    for token, choices in enumerate(want.chosen.tolist()):
        for choice, expert in enumerate(choices):
            first, count = by_expert[expert]
            place = first + want.tokens_of(expert).index(token)
            assert routed.found_places[token, choice].tolist() == [place, first, count]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"),
    [(1, 8, 2), (1, 4, 4), (3, 8, 2), (4, 5, 1), (7, 37, 6), (40, 16, 4), (129, 128, 8)],
)
def test_route(tokens, experts, chosen, normalize):
    rng = np.random.default_rng(tokens)
    logits = (3 * rng.standard_normal((tokens, experts))).astype(np.float32)
    want = naive_experts.route(logits, chosen, normalize=normalize)
    check_routing(Routed(logits, chosen, normalize=normalize), want)


def test_of_equal_logits_the_lower_expert_comes_first():
    logits = np.zeros((3, 9), np.float32)
    logits[1, 4:6] = 1
    logits[2] = -0.0
    want = naive_experts.route(logits, 3)
    assert want.chosen.tolist() == [[0, 1, 2], [4, 5, 0], [0, 1, 2]]
    check_routing(Routed(logits, 3), want)


def test_logits_that_are_no_numbers_choose_experts_that_there_are():
    """What a broken model computes must not lead out of a buffer."""
    bits = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF], np.uint32)
    rng = np.random.default_rng(0)
    logits = rng.choice(bits, (50, 6)).view(np.float32)
    routed = Routed(logits, 4)
    counts = [count for _, _, count in routed.found_slots]
    assert sum(counts) == 50 * 4
    assert all(0 <= expert < 6 for expert, _, _ in routed.found_slots)
    places = routed.found_places[..., 0]
    assert len(np.unique(places)) == places.size and places.max() < routed.num_rows


def test_a_late_thread_routes_one_batch_also_while_the_next_is_written():
    """In a small batch every thread routes for itself, and nobody waits for one that sleeps: the
    batch's record may become that of the next step under it.
    """
    tokens, chosen = 500, 8
    logits = np.random.default_rng(0).standard_normal((tokens, 64)).astype(np.float32)
    routed = Routed(logits, chosen)
    ended, wrong = threading.Event(), []

    def route_again_and_again():
        while not ended.is_set():
            routed.run()
            slots = routed.found_slots
            found = [routed.row_tokens[row : row + count] for _, row, count in slots]
            times = np.bincount(np.concatenate(found), minlength=tokens)
            if times.tolist() not in ([chosen] * tokens, [chosen] + [0] * (tokens - 1)):
                wrong.append(times)

    thread = threading.Thread(target=route_again_and_again)
    thread.start()
    num_tokens = BATCH.index("num_tokens")
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        routed.batch[num_tokens] = tokens + 1 - routed.batch[num_tokens]
    ended.set()
    thread.join()
    assert not wrong


@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("quantized", [True, False])
def test_dispatch(tokens, by_row, quantized):
    """Each expert's rows are what a matrix kernel reads of its tokens alone."""
    rng, columns = np.random.default_rng(tokens), 96
    logits = rng.standard_normal((tokens, 7)).astype(np.float32)
    routed, want = Routed(logits, 3), naive_experts.route(logits, 3)
    num_sources = routed.num_rows if by_row else tokens
    x = rng.standard_normal((num_sources, columns)).astype(np.float32)
    row_bytes = columns // 32 * ACTIVATION_GROUP if quantized else columns * 4 + 128
    source = np.zeros((num_sources, row_bytes if not quantized else columns * 4), np.uint8)
    source[:, : columns * 4] = x.view(np.uint8)
    out, rows = shifted(routed.num_rows * row_bytes)
    moment = record(
        DISPATCH, x=source, x_stride=source.strides[0], columns=columns, out=out,
        row_bytes=row_bytes, num_chosen=3, quantize=int(quantized), by_row=int(by_row),
        **routed.given("places"),
    )  # fmt: skip
    thread, run = Thread(0, PRIVATE), kernel(experts_unit(), "dispatch")
    for token in reversed(range(tokens)):
        run(moment, record(BATCH, num_tokens=tokens), thread.record, token, token + 1)
    check_guard(out)
    for expert, first, count in routed.found_slots:
        inputs = x[first : first + count] if by_row else x[want.tokens_of(expert)]
        at = rows[first * row_bytes :][: rows_taken(count) * row_bytes]
        if not quantized:
            got = at.reshape(-1, row_bytes)[:count, : columns * 4].view(np.float32)
            np.testing.assert_array_equal(got, inputs)
            continue
        packed = naive.quantize(inputs).pack()
        if count < 4:
            np.testing.assert_array_equal(at, packed)
            continue
        # Of the last quad only the tokens that there are.
        there = np.arange(rows_taken(count)) < count
        quads = (len(there) // 4, columns // 32, 4, ACTIVATION_GROUP)
        mask = np.broadcast_to(there.reshape(-1, 1, 4, 1), quads)
        np.testing.assert_array_equal(at.reshape(quads)[mask], packed.reshape(quads)[mask])


class Experts:
    """Random experts: (feed-forward, hidden) twice, (hidden, feed-forward)."""

    def __init__(self, rng, formats, count, hidden, feed_forward):
        sizes = ((feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward))
        self.formats, self.sizes = formats, sizes
        data = [
            [random_rows(rng, name, *size, 0.05) for name, size in zip(formats, sizes, strict=True)]
            for _ in range(count)
        ]
        self.matrices = [
            naive_experts.ExpertMatrices(*zip(formats, each, strict=True)) for each in data
        ]
        self._packed = [
            [
                pack(name, matrix, size[1])
                for name, matrix, size in zip(formats, each, sizes, strict=True)
            ]
            for each in data
        ]
        self.tables = [
            np.array([each[i].ctypes.data for each in self._packed], np.int64) for i in range(3)
        ]

    def of(self, index, prefix, table):
        """What a record says of one of the three."""
        name, (_, columns) = self.formats[index], self.sizes[index]
        at = address(matmul_unit(name), f"tile_{name}")
        separator = "_" if prefix else ""
        return {
            f"{prefix}{separator}kernel": at, table: self.tables[index],
            f"{prefix}{separator}tile_bytes": tile_bytes(name, columns),
        }  # fmt: skip


def in_rows(format_name, routed, inputs, columns):
    """Inputs by expert as matrix kernels read them, expert after expert, and a row's bytes."""
    quantized = naive.is_quantized(format_name)
    row_bytes = columns // 32 * ACTIVATION_GROUP if quantized else columns * 4
    buffer, rows = shifted(routed.num_rows * row_bytes)
    for expert, first, _ in routed.found_slots:
        x = inputs[expert]
        packed = naive.quantize(x).pack() if quantized else x.view(np.uint8).reshape(-1)
        rows[first * row_bytes :][: len(packed)] = packed
    return buffer, row_bytes


def run_in_pieces(name, moment, batch, thread, tiles):
    run, cuts = kernel(experts_unit(), name), [0, 1, tiles // 2, tiles]
    for first, last in reversed(list(pairwise(cuts))):
        if first < last:
            run(moment, batch, thread.record, first, last)
    thread.check()


FORMATS = [("Q4_1", "Q8_0", "Q6_K"), ("Q4_K", "Q4_K", "Q4_0"), ("F16", "F32", "BF16")]


@pytest.mark.parametrize("tokens", [1, 6, 50])
@pytest.mark.parametrize("formats", FORMATS)
def test_the_experts_of_a_batch(formats, tokens):
    rng = np.random.default_rng(tokens)
    count, chosen, hidden, feed_forward = 6, 2, 256, 256
    experts = Experts(rng, formats, count, hidden, feed_forward)
    logits = rng.standard_normal((tokens, count)).astype(np.float32)
    logits[:, 3] = -9  # an expert that no token chooses
    routed, want = Routed(logits, chosen), naive_experts.route(logits, chosen)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    inputs = {expert: x[want.tokens_of(expert)] for expert in want.experts}
    rows, row_bytes = in_rows(formats[0], routed, inputs, hidden)
    out = guarded(routed.num_rows * feed_forward * 4)
    tiles = feed_forward // 16
    moment = record(
        EXPERTS_GATED, x=rows, row_bytes=row_bytes, columns=hidden, out=out,
        out_stride=feed_forward * 4, num_tiles=tiles, **routed.given("slots"),
        **experts.of(0, "gate", "gates"), **experts.of(1, "up", "ups"),
    )  # fmt: skip
    batch, thread = record(BATCH, num_tokens=tokens), Thread(SCRATCH, PRIVATE)
    run_in_pieces("experts_gated", moment, batch, thread, tiles * min(count, tokens * chosen))
    check_guard(out)
    gated = {}
    found = out[:-GUARD].view(np.float32).reshape(-1, feed_forward)
    for expert, first, number in routed.found_slots:
        gated[expert] = found[first : first + number].copy()
        each = naive_experts.gated(experts.matrices[expert], inputs[expert], **EXACTLY)
        np.testing.assert_allclose(gated[expert], each, rtol=1e-5, atol=1e-30)

    rows, row_bytes = in_rows(formats[2], routed, gated, feed_forward)
    hidden_rows = rng.standard_normal((tokens, hidden)).astype(np.float32)
    out = hidden_rows.copy()
    moment = record(
        EXPERTS_DOWN, x=rows, x_private=1, row_bytes=row_bytes, columns=feed_forward, out=out,
        out_stride=hidden * 4, **routed.given("slots", "row_tokens", "row_weights"),
        **experts.of(2, "", "matrices"),
    )  # fmt: skip
    run_in_pieces("experts_down", moment, batch, thread, hidden // 16)
    each = naive_experts.add_experts(
        hidden_rows, gated, experts.matrices, want, routed.weights(), **EXACTLY
    )
    np.testing.assert_array_equal(out, each)


def test_a_token_gets_the_same_bits_whoever_comes_with_it():
    rng = np.random.default_rng(9)
    count, chosen, hidden = 4, 2, 64
    experts = Experts(rng, ("Q8_0",) * 3, count, hidden, hidden)
    logits = rng.standard_normal((40, count)).astype(np.float32)
    x = rng.standard_normal((40, hidden)).astype(np.float32)

    def run(tokens):
        routed = Routed(logits[tokens], chosen)
        want = naive_experts.route(logits[tokens], chosen)
        inputs = {expert: x[tokens][want.tokens_of(expert)] for expert in want.experts}
        rows, row_bytes = in_rows("Q8_0", routed, inputs, hidden)
        out = np.zeros((len(tokens), hidden), np.float32)
        moment = record(
            EXPERTS_DOWN, x=rows, x_private=1, row_bytes=row_bytes, columns=hidden, out=out,
            out_stride=hidden * 4, **routed.given("slots", "row_tokens", "row_weights"),
            **experts.of(2, "", "matrices"),
        )  # fmt: skip
        batch, thread = record(BATCH, num_tokens=len(tokens)), Thread(SCRATCH, PRIVATE)
        run_in_pieces("experts_down", moment, batch, thread, hidden // 16)
        return out

    whole = run(list(range(40)))
    for tokens in ([0], [39, 3], list(range(10, 23))):
        np.testing.assert_array_equal(run(tokens), whole[tokens])
