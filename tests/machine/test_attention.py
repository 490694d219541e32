from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cyclewise.machine.kernels.attention import (
    NO_WINDOW,
    attention_unit,
    partial_bytes,
    scratch_bytes,
)
from cyclewise.machine.kernels.layout import (
    ATTENTION,
    BATCH,
    LINE,
    PAGE_TOKENS,
    QUERY_BLOCK,
    QUERY_BLOCK_FIELDS,
    SPLIT,
)
from tests import naive
from tests.machine.kernel_calls import GUARD, Thread, check_guard, guarded, kernel, record


@dataclass(frozen=True)
class Sequence:
    """Tokens `position .. position + count` of a sequence, the first in row `start`."""

    start: int
    count: int
    position: int
    pages: np.ndarray  # int32


class Cache:
    """A layer's keys and values in pages; what no sequence has written is the worst garbage."""

    kernel = "attention"

    def __init__(self, rng, head_dim, kv_heads, num_pages):
        self.head_dim, self.kv_heads = head_dim, kv_heads
        self.padded = -(-head_dim // 16) * 16
        self.keys = np.full((num_pages, kv_heads, head_dim, PAGE_TOKENS), 65504, np.float16)
        self.values = np.zeros((num_pages, kv_heads, PAGE_TOKENS, self.padded), np.float16)
        self.values[..., :head_dim] = -65504
        self.rng = rng

    def write(self, sequence, key_scale=1.0, value_scale=1.0):
        """Keys and values (positions, kv_heads, head_dim) of a sequence, in float16."""
        positions = sequence.position + sequence.count
        shape = (positions, self.kv_heads, self.head_dim)
        keys = naive.to_half((self.rng.standard_normal(shape) * key_scale).astype(np.float32))
        values = naive.to_half((self.rng.standard_normal(shape) * value_scale).astype(np.float32))
        for i in range(positions):
            page, place = sequence.pages[i // PAGE_TOKENS], i % PAGE_TOKENS
            self.keys[page, :, :, place] = keys[i]
            self.values[page, :, place, : self.head_dim] = values[i]
        return keys, values

    def memory(self):
        """The pages, a layer's keys before its values, and the bytes of a page's keys."""
        num_pages = len(self.keys)
        parts = [self.keys.reshape(num_pages, -1), self.values.reshape(num_pages, -1)]
        return np.concatenate(parts, axis=1).view(np.uint8), parts[0].shape[1] * 2


class ByteCache(Cache):
    """Pages of int8; garbage are the largest codes and scales."""

    kernel = "attention_int8"

    def __init__(self, rng, head_dim, kv_heads, num_pages):
        super().__init__(rng, head_dim, kv_heads, num_pages)
        half = PAGE_TOKENS // 2
        self.keys = np.full((num_pages, kv_heads, head_dim // 2, PAGE_TOKENS, 2), 127, np.int8)
        self.values = np.full((num_pages, kv_heads, half, self.padded, 2), -127, np.int8)
        self.key_scales, self.value_scales = (
            np.full((num_pages, kv_heads, PAGE_TOKENS), 0x4401, np.uint16) for _ in range(2)
        )

    def write(self, sequence, key_scale=1.0, value_scale=1.0):
        """What the codes say, float32."""
        positions = sequence.position + sequence.count
        shape = (positions, self.kv_heads, self.head_dim)
        said = []
        for factor, codes, scales in (
            (key_scale, self.keys, self.key_scales), (value_scale, self.values, self.value_scales),
        ):  # fmt: skip
            numbers = (self.rng.standard_normal(shape) * factor).astype(np.float32)
            found, stored = naive.page_codes(numbers)
            said.append(found * naive.page_scales(stored)[..., None])
            for i in range(positions):
                page, place = sequence.pages[i // PAGE_TOKENS], i % PAGE_TOKENS
                scales[page, :, place] = stored[i]
                if codes is self.keys:
                    pairs = found[i].reshape(self.kv_heads, -1, 2)
                    codes[page, :, :, place] = pairs
                else:
                    codes[page, :, place // 2, : self.head_dim, place % 2] = found[i]
        return said

    def memory(self):
        parts = [
            part.reshape(len(self.keys), self.kv_heads, -1).view(np.uint8)
            for part in (self.keys, self.key_scales, self.values, self.value_scales)
        ]
        keys, values = (
            np.concatenate(pair, axis=2).reshape(len(self.keys), -1)
            for pair in (parts[:2], parts[2:])
        )
        return np.concatenate([keys, values], axis=1), keys.shape[1]


def attend(
    cache, group, queries, sequences, block=QUERY_BLOCK, part=1 << 20, window=NO_WINDOW, softcap=0.0
):
    """The kernel's output (tokens, heads, head_dim); blocks of `block` tokens, their keys in parts
    of `part` splits.
    """
    heads, dim = group * cache.kv_heads, cache.head_dim
    tokens = len(queries)
    # Behind the queries lie keys and values, which attention must not read.
    qkv = np.full((tokens, heads + 2 * cache.kv_heads, dim), np.nan, np.float32)
    qkv[:, :heads] = queries
    memory, key_bytes = cache.memory()
    out = guarded(tokens * heads * dim * 4)
    blocks, kept = [], []
    for s in sequences:
        for first in range(0, s.count, block):
            size, position = min(block, s.count - first), s.position + first
            num_splits = -(-(position + size) // SPLIT)
            num_parts = -(-num_splits // part)
            partials = guarded(
                num_splits * cache.kv_heads * partial_bytes(size * group, cache.padded)
            )
            counters = guarded(cache.kv_heads * LINE)
            counters[:-GUARD] = 0
            kept.append((partials, counters))
            for first_split in range(0, num_splits, part):
                values = {
                    "first_token": s.start + first, "num_tokens": size,
                    "first_position": position, "pages": s.pages, "first_split": first_split,
                    "end_split": min(first_split + part, num_splits), "num_splits": num_splits,
                    "num_parts": num_parts, "partials": partials if num_parts > 1 else 0,
                    "counters": counters if num_parts > 1 else 0,
                }  # fmt: skip
                blocks.append(record(QUERY_BLOCK_FIELDS, **values))
    table = np.array(blocks)
    moment = record(
        ATTENTION, qkv=qkv, qkv_stride=qkv.strides[0], num_heads=heads,
        num_kv_heads=cache.kv_heads, head_dim=dim, padded_head_dim=cache.padded, keys=memory,
        values=memory.ctypes.data + key_bytes, page_bytes=memory.strides[0],
        out=out, out_stride=heads * dim * 4, window=window, softcap=softcap,
    )  # fmt: skip
    batch = record(BATCH, num_tokens=tokens, query_blocks=table)
    thread = Thread(scratch_bytes(group, cache.padded))
    run, tiles = kernel(attention_unit(), cache.kernel), len(blocks) * cache.kv_heads
    run(moment, batch, thread.record, tiles // 2, tiles)
    run(moment, batch, thread.record, 0, tiles // 2)
    thread.check()
    check_guard(out)
    for partials, counters in kept:
        check_guard(partials)
        assert not counters[:-GUARD].any()
        check_guard(counters)
    return out[:-GUARD].view(np.float32).reshape(tokens, heads, dim)


def ragged(rng):
    """Five sequences in one batch: their pages are mixed up, their lengths end in and on pages."""
    pages = rng.permutation(12).astype(np.int32)
    return [
        Sequence(0, 37, 0, pages[:2]),
        Sequence(37, 1, 45, pages[2:4]),
        Sequence(38, 2, 31, pages[4:6]),
        Sequence(40, 1, 0, pages[6:7]),
        Sequence(41, 18, 78, pages[7:11]),
    ]


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_ragged_sequences_over_scattered_pages(group, head_dim):
    rng = np.random.default_rng(head_dim + group)
    cache, sequences = Cache(rng, head_dim, 2, 12), ragged(rng)
    queries = rng.standard_normal((59, 2 * group, head_dim)).astype(np.float32) * head_dim**-0.5
    written = [cache.write(s) for s in sequences]
    got = attend(cache, group, queries, sequences)
    for s, (keys, values) in zip(sequences, written, strict=True):
        for i in range(s.count):
            seen = s.position + i + 1
            want = naive.attend(queries[s.start + i], keys[:seen], values[:seen])
            np.testing.assert_allclose(got[s.start + i], want, rtol=2e-5, atol=2e-6)

    # The same bits whatever comes with a token: other blocks, and every token alone.
    for block in (1, 5):
        np.testing.assert_array_equal(attend(cache, group, queries, sequences, block), got)
    for i in (0, 15, 16, 36, 58):
        s = next(s for s in sequences if s.start <= i < s.start + s.count)
        alone = Sequence(0, 1, s.position + i - s.start, s.pages)
        np.testing.assert_array_equal(attend(cache, group, queries[i : i + 1], [alone])[0], got[i])


@pytest.mark.parametrize("head_dim", [24, 96, 256])
@pytest.mark.parametrize("window", [1, 2, 20, 32, 33, 64, 90])
def test_a_window(head_dim, window):
    """Pages that lie before it are not read: they may not even exist."""
    rng = np.random.default_rng(head_dim + window)
    cache, sequences = Cache(rng, head_dim, 1, 12), ragged(rng)
    queries = rng.standard_normal((59, 4, head_dim)).astype(np.float32) * head_dim**-0.5
    written = [cache.write(s) for s in sequences]
    for s in sequences:
        s.pages[: max(0, s.position - window + 1) // PAGE_TOKENS] = -(1 << 20)
    got = attend(cache, 4, queries, sequences, window=window)
    for s, (keys, values) in zip(sequences, written, strict=True):
        for i in range(s.count):
            end = s.position + i + 1
            want = naive.attend(queries[s.start + i], keys[:end], values[:end], window=window)
            np.testing.assert_allclose(got[s.start + i], want, rtol=2e-5, atol=2e-6)
    for block in (1, 5):
        again = attend(cache, 4, queries, sequences, block, window=window)
        np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("window", [NO_WINDOW, 300])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 24), (5, 64), (7, 80)])
def test_keys_in_parts(group, head_dim, window):
    """Three splits and a bit: whoever computes which of them, the bits are the same."""
    rng = np.random.default_rng(group)
    pages = rng.permutation(61).astype(np.int32)
    sequences = [
        Sequence(0, 2, 3 * SPLIT + 40, pages[:27]),
        Sequence(2, 20, 2 * SPLIT - 10, pages[27:44]),
        Sequence(22, 1, SPLIT - 1, pages[44:52]),
        Sequence(23, 1, SPLIT, pages[52:61]),
    ]
    cache = Cache(rng, head_dim, 2, 61)
    written = [cache.write(s) for s in sequences]
    queries = rng.standard_normal((24, 2 * group, head_dim)).astype(np.float32) * head_dim**-0.5
    got = attend(cache, group, queries, sequences, window=window)
    for s, (keys, values) in zip(sequences, written, strict=True):
        for i in range(s.count):
            seen = s.position + i + 1
            want = naive.attend(
                queries[s.start + i], keys[:seen], values[:seen], window=min(window, seen)
            )
            np.testing.assert_allclose(got[s.start + i], want, rtol=2e-5, atol=2e-6)
    for block in (1, 7, 16):
        for part in (1, 2, 3):
            again = attend(cache, group, queries, sequences, block, part, window=window)
            np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("scale", [0.01, 1, 30, 1e4])
def test_soft_capping(scale):
    rng = np.random.default_rng(5)
    cache, s = Cache(rng, 64, 2, 4), Sequence(0, 20, 60, np.array([3, 0, 2], np.int32))
    queries = rng.standard_normal((20, 4, 64)).astype(np.float32) * scale
    keys, values = cache.write(s)
    got = attend(cache, 2, queries, [s], softcap=50.0)
    for i in range(20):
        want = naive.attend(queries[i], keys[: 61 + i], values[: 61 + i], softcap=50.0)
        # A score of 500 before it is capped is known to 3e-5, and 50 to 4e-6.
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("key_scale", [1e2, 1e4])
def test_large_scores_and_values(key_scale):
    """Scores of millions and values at float16's limit: the softmax stays finite and right."""
    rng = np.random.default_rng(0)
    cache, s = Cache(rng, 64, 2, 4), Sequence(0, 20, 60, np.array([3, 0, 2], np.int32))
    queries = rng.standard_normal((20, 6, 64)).astype(np.float32) * 10
    keys, values = cache.write(s, key_scale, 1e5)
    assert np.abs(values).max() == 65504
    got = attend(cache, 3, queries, [s])
    assert np.isfinite(got).all()
    for i in range(20):
        want = naive.attend(queries[i], keys[: 61 + i], values[: 61 + i])
        # A score of a million is known to a sixteenth only; two keys that near each other are rare.
        np.testing.assert_allclose(got[i], want, rtol=1e-3, atol=65504 * 1e-3)


def test_equal_scores_give_the_mean():
    rng = np.random.default_rng(1)
    cache, s = Cache(rng, 64, 1, 3), Sequence(0, 1, 69, np.array([2, 1, 0], np.int32))
    _, values = cache.write(s)
    got = attend(cache, 1, np.zeros((1, 1, 64), np.float32), [s])
    mean = values[:, 0].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(got[0, 0], mean, rtol=1e-5, atol=1e-6)


def test_a_very_negative_first_page_is_forgotten():
    """Scores that grow from page to page: the running maximum rescales what was, to nothing."""
    rng = np.random.default_rng(2)
    cache, s = Cache(rng, 8, 1, 4), Sequence(0, 1, 127, np.array([1, 3, 0, 2], np.int32))
    keys, values = cache.write(s)
    for i in range(128):
        keys[i] = [[(i // 32 - 2) * 30 + i % 3, 0, 0, 0, 0, 0, 0, 0]]
        cache.keys[s.pages[i // 32], :, :, i % 32] = keys[i]
    queries = np.ones((1, 1, 8), np.float32)
    for scale in (1, 40, -1, -40):
        got = attend(cache, 1, queries * scale, [s])
        np.testing.assert_allclose(
            got[0], naive.attend(queries[0] * scale, keys, values), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("group", "head_dim"), [(1, 8), (7, 64), (3, 80), (4, 256), (2, 34)])
@pytest.mark.parametrize(("window", "softcap"), [(NO_WINDOW, 0.0), (33, 0.0), (300, 20.0)])
def test_pages_of_int8(group, head_dim, window, softcap):
    """Ragged sequences, short and of several splits, over scattered pages: what the codes say, and
    the same bits whatever comes with a token and whoever computes its splits.
    """
    rng = np.random.default_rng(group)
    pages = rng.permutation(60).astype(np.int32)
    sequences = [
        Sequence(0, 20, 2 * SPLIT - 10, pages[:17]),
        Sequence(20, 1, 3 * SPLIT + 40, pages[17:43]),
        Sequence(21, 37, 0, pages[43:45]),
        Sequence(58, 1, 0, pages[45:46]),
        Sequence(59, 2, 31, pages[46:48]),
    ]
    cache = ByteCache(rng, head_dim, 2, 60)
    written = [cache.write(s) for s in sequences]
    queries = rng.standard_normal((61, 2 * group, head_dim)).astype(np.float32) * head_dim**-0.5
    got = attend(cache, group, queries, sequences, window=window, softcap=softcap)
    for s, (keys, values) in zip(sequences, written, strict=True):
        for i in range(s.count):
            seen = s.position + i + 1
            want = naive.attend(
                queries[s.start + i], keys[:seen], values[:seen], window=min(window, seen),
                softcap=softcap or None,
            )  # fmt: skip
            # Queries and weights are multiples of a 32,767th of their largest.
            np.testing.assert_allclose(got[s.start + i], want, rtol=1e-3, atol=3e-4)
    for block, part in ((1, 1 << 20), (5, 1 << 20), (16, 1), (7, 2), (1, 1)):
        again = attend(cache, group, queries, sequences, block, part, window, softcap)
        np.testing.assert_array_equal(again, got)


def test_large_and_small_keys_of_int8():
    rng = np.random.default_rng(0)
    for key_scale, value_scale in ((1e3, 1e5), (1e-38, 1e-38), (0.0, 0.0)):
        cache, s = ByteCache(rng, 64, 2, 4), Sequence(0, 20, 60, np.array([3, 0, 2], np.int32))
        queries = rng.standard_normal((20, 6, 64)).astype(np.float32)
        keys, values = cache.write(s, key_scale, value_scale)
        got = attend(cache, 3, queries, [s])
        assert np.isfinite(got).all()
        for i in range(20):
            want = naive.attend(queries[i], keys[: 61 + i], values[: 61 + i])
            # A score of ten thousand is known to half, as the query is to a 32,767th.
            np.testing.assert_allclose(got[i], want, rtol=0.02, atol=np.abs(values).max() * 0.05)
