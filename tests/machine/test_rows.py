from __future__ import annotations

import numpy as np
import pytest

from cyclewise.machine.kernels.blocks import tile_bytes
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
)
from cyclewise.machine.kernels.matmul import SCRATCH_BYTES, matmul_unit
from cyclewise.machine.kernels.rows import rows_unit
from tests import naive
from tests.machine.kernel_calls import (
    FORMATS,
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


def floats(buffer, *shape):
    """The float32 of a guarded buffer."""
    return buffer[:-GUARD].view(np.float32).reshape(*shape)


@pytest.mark.parametrize("scale", [1.0, 24.0, 0.1])
@pytest.mark.parametrize("format_name", FORMATS)
def test_embed(format_name, scale):
    rng = np.random.default_rng(0)
    columns, vocab = 256, 37
    data = random_rows(rng, format_name, vocab, columns, 0.1)
    table = pack(format_name, data, columns)
    ids = np.array([0, 36, 15, 16, 36, 7], np.int32)
    out = guarded(len(ids) * columns * 4)
    moment = record(
        EMBED, row_kernel=address(matmul_unit(format_name), f"row_{format_name}"), table=table,
        tile_bytes=tile_bytes(format_name, columns), columns=columns,
        out=out, out_stride=columns * 4, scale=scale,
    )  # fmt: skip
    batch, thread = record(BATCH, num_tokens=len(ids), token_ids=ids), Thread(SCRATCH_BYTES)
    run = kernel(rows_unit(), "embed")
    run(moment, batch, thread.record, 2, len(ids))
    run(moment, batch, thread.record, 0, 2)
    np.testing.assert_array_equal(
        floats(out, -1, columns), naive.dequantize(format_name, data)[ids] * np.float32(scale)
    )
    thread.check()
    check_guard(out)


@pytest.mark.parametrize("width", [1, 16, 40, 576])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_norm(width, scale):
    rng = np.random.default_rng(width)
    padded, tokens = -(-width // 16) * 16, 5
    x, weight = np.zeros((tokens, padded), np.float32), np.zeros(padded, np.float32)
    x[:, :width] = rng.standard_normal((tokens, width)) * scale
    weight[:width] = rng.standard_normal(width)
    out, thread = guarded(tokens * padded * 4), Thread(0)
    moment = record(
        NORM, x=x, x_stride=padded * 4, weight=weight, width=width, padded_width=padded,
        epsilon=1e-5, out=out, out_stride=padded * 4,
    )  # fmt: skip
    run = kernel(rows_unit(), "norm")
    run(moment, record(BATCH, num_tokens=tokens), thread.record, 0, tokens)
    want = naive.rms_norm(x[:, :width], weight[:width], 1e-5)
    np.testing.assert_allclose(floats(out, tokens, padded)[:, :width], want, rtol=3e-6)
    np.testing.assert_array_equal(floats(out, tokens, padded)[:, width:], 0)
    check_guard(out)


def test_norm_of_the_rows_that_need_logits_into_a_private_buffer():
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((9, 32)).astype(np.float32), np.ones(32, np.float32)
    rows = np.array([1, 4, 8], np.int32)
    out, private = guarded(2 * 9 * 128), 9 * 128
    moment = record(
        NORM, x=x, x_stride=128, weight=weight, width=32, padded_width=32, epsilon=1e-6,
        out=out, out_stride=128, of_logits=1, out_private=1,
    )  # fmt: skip
    batch = record(BATCH, num_tokens=9, num_logits=3, logit_rows=rows)
    kernel(rows_unit(), "norm")(moment, batch, Thread(0, private).record, 0, 3)
    assert (out[:private] == 0xA5).all()
    np.testing.assert_allclose(
        floats(out, 18, 32)[9:12], naive.rms_norm(x[rows], weight, 1e-6), rtol=3e-6
    )


@pytest.mark.parametrize("width", [1, 16, 40, 768])
@pytest.mark.parametrize("middle", [0.0, 30.0])
def test_layer_norm(width, middle):
    """Of rows whose values are far from zero too; what lies behind a row does not count."""
    rng = np.random.default_rng(width)
    padded, rows = -(-width // 16) * 16, np.array([0, 2, 3], np.int32)
    x = np.full((5, padded), 99, np.float32)
    weight, bias = np.zeros((2, padded), np.float32)
    x[:, :width] = rng.standard_normal((5, width)) + middle
    weight[:width], bias[:width] = rng.standard_normal((2, width))
    out, private = guarded(64 + 5 * padded * 4), 64
    moment = record(
        LAYER_NORM, x=x, x_stride=padded * 4, weight=weight, bias=bias, width=width,
        padded_width=padded, epsilon=1e-5, out=out, out_stride=padded * 4, out_private=1,
    )  # fmt: skip
    run, want = kernel(rows_unit(), "layer_norm"), x[:, :width]
    run(moment, record(BATCH, num_tokens=5), Thread(0, private).record, 0, 5)
    got = out[private:-GUARD].view(np.float32).reshape(5, padded).copy()
    want = naive.layer_norm(want, weight[:width], bias[:width], 1e-5)
    np.testing.assert_allclose(got[:, :width], want, rtol=3e-5, atol=3e-5)
    np.testing.assert_array_equal(got[:, width:], 0)
    check_guard(out)

    moment[LAYER_NORM.index("of_logits")] = 1
    batch = record(BATCH, num_tokens=5, num_logits=3, logit_rows=rows)
    run(moment, batch, Thread(0, private).record, 0, 3)
    again = out[private:-GUARD].view(np.float32).reshape(5, padded)
    np.testing.assert_array_equal(again[:3], got[rows])


@pytest.mark.parametrize(("format_name", "columns"), [("F32", 40), ("F16", 48), ("Q8_0", 64)])
def test_positions(format_name, columns):
    rng, stride = np.random.default_rng(columns), -(-columns // 16) * 16
    data = random_rows(rng, format_name, 50, columns, 0.1)
    table = pack(format_name, data, columns)
    positions = np.array([0, 49, 15, 16, 16], np.int32)
    out, before = guarded(5 * stride * 4), rng.standard_normal((5, stride)).astype(np.float32)
    floats(out, 5, stride)[:] = before
    moment = record(
        POSITIONS, row_kernel=address(matmul_unit(format_name), f"row_{format_name}"), table=table,
        tile_bytes=tile_bytes(format_name, columns), columns=columns, out=out,
        out_stride=stride * 4,
    )  # fmt: skip
    thread = Thread(stride * 4 + SCRATCH_BYTES)
    batch = record(BATCH, num_tokens=5, positions=positions)
    for token in range(5):
        kernel(rows_unit(), "positions")(moment, batch, thread.record, token, token + 1)
    thread.check()
    want = before[:, :columns] + naive.dequantize(format_name, data)[positions]
    np.testing.assert_array_equal(floats(out, 5, stride)[:, :columns], want)
    np.testing.assert_array_equal(floats(out, 5, stride)[:, columns:], before[:, columns:])
    check_guard(out)


def test_a_norm_is_added():
    rng = np.random.default_rng(3)
    x, weight = np.zeros((5, 48), np.float32), np.zeros(48, np.float32)
    x[:, :40], weight[:40] = rng.standard_normal((5, 40)), rng.standard_normal(40)
    out, before = guarded(5 * 48 * 4), rng.standard_normal((5, 48)).astype(np.float32)
    before[:, 40:] = 0
    floats(out, 5, 48)[:] = before
    moment = record(
        NORM, x=x, x_stride=192, weight=weight, width=40, padded_width=48, epsilon=1e-6,
        out=out, out_stride=192,
    )  # fmt: skip
    run = kernel(rows_unit(), "add_norm")
    run(moment, record(BATCH, num_tokens=5), Thread(0, 64).record, 1, 5)
    np.testing.assert_array_equal(floats(out, 5, 48)[0], before[0])
    run(moment, record(BATCH, num_tokens=5), Thread(0, 64).record, 0, 1)
    want = before[:, :40] + naive.rms_norm(x[:, :40], weight[:40], 1e-6)
    np.testing.assert_allclose(floats(out, 5, 48)[:, :40], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(floats(out, 5, 48)[:, 40:], 0)
    check_guard(out)


@pytest.mark.parametrize("cap", [30.0, 5.0])
def test_softcap(cap):
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((3, 80)) * [[1], [50], [1e-3]]).astype(np.float32)
    logits[1, :4] = [1e30, -1e30, np.inf, -np.inf]
    out = guarded(logits.nbytes)
    floats(out, 3, 80)[:] = logits
    moment = record(SOFTCAP, x=out, x_stride=320, cap=cap)
    run = kernel(rows_unit(), "softcap")
    run(moment, record(BATCH, num_tokens=9, num_logits=2), Thread(0).record, 1, 5)
    want = logits.copy()
    want[:2, 16:] = naive.softcap(logits[:2, 16:], cap)
    np.testing.assert_allclose(floats(out, 3, 80), want, rtol=1e-6, atol=cap * 1e-7)
    run(moment, record(BATCH, num_tokens=9, num_logits=2), Thread(0).record, 0, 1)
    want[:2, :16] = naive.softcap(logits[:2, :16], cap)
    np.testing.assert_allclose(floats(out, 3, 80), want, rtol=1e-6, atol=cap * 1e-7)
    check_guard(out)


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 12])
def test_quantize(tokens):
    rng = np.random.default_rng(2)
    columns = 320
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    hard = [x[0] * 1e20, x[0] * 1e-20, np.arange(columns) % 255 - 127]
    hard.append(hard[-1] / 2)  # ties, to even
    hard[-1][::32] = 127
    x[tokens // 2 :] = np.resize(hard, (tokens, columns))[tokens // 2 :]
    x[0, :64] = 0
    x[-1, 5] = 1e4
    want = naive.quantize(x).pack()
    for private in (0, len(want)):
        for of_logits in (0, 1):
            out, thread = guarded(2 * len(want)), Thread(0, private)
            out[:-GUARD] = 0
            source = np.concatenate([np.zeros(private // 4, np.float32), x.ravel()])
            moment = record(
                QUANTIZE, x=source, x_stride=columns * 4, x_private=1, columns=columns,
                out=out, out_private=1, of_logits=of_logits,
            )  # fmt: skip
            counts = {"num_tokens": 512, "num_logits": tokens}
            batch = record(BATCH, **(counts if of_logits else {"num_tokens": tokens}))
            run = kernel(rows_unit(), "quantize")
            run(moment, batch, thread.record, tokens // 2, tokens)
            run(moment, batch, thread.record, 0, tokens // 2)
            np.testing.assert_array_equal(out[private : private + len(want)], want)
            assert not out[:private].any()
            check_guard(out)


@pytest.mark.parametrize(
    ("head_dim", "rope_dim"), [(8, 8), (64, 64), (80, 80), (80, 32), (128, 128)]
)
def test_rope_and_the_cache(head_dim, rope_dim):
    rng = np.random.default_rng(head_dim)
    heads, kv_heads, tokens, num_pages = 6, 2, 5, 4
    padded = -(-head_dim // 16) * 16
    width = (heads + 2 * kv_heads) * head_dim
    qkv = rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim)).astype(np.float32)
    qkv[1] *= 30000  # beyond what float16 holds
    qkv[2] *= 1e-6  # subnormal there
    before = qkv.copy()
    angles = rng.uniform(-9, 9, (100, rope_dim // 2))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 31, 32, 99, 7], np.int32)
    slots = np.array([0, 127, 64, 35, 96], np.int32)
    key_bytes, value_bytes = (
        kv_heads * head_dim * PAGE_TOKENS * 2,
        kv_heads * padded * PAGE_TOKENS * 2,
    )
    cache = guarded(num_pages * (key_bytes + value_bytes))
    untouched = cache.copy()
    scale = np.float32(head_dim**-0.5)
    moment = record(
        ROPE, qkv=qkv, qkv_stride=width * 4, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, padded_head_dim=padded, rope_dim=rope_dim, cosines=cosines, sines=sines,
        scale=float(scale), keys=cache, values=cache.ctypes.data + key_bytes,
        page_bytes=key_bytes + value_bytes,
    )  # fmt: skip
    batch = record(BATCH, num_tokens=tokens, positions=positions, slots=slots)
    kernel(rows_unit(), "rope")(moment, batch, Thread(0).record, 0, tokens)

    pages = cache[:-GUARD].reshape(num_pages, -1)
    keys = (
        pages[:, :key_bytes]
        .copy()
        .view(np.uint16)
        .reshape(num_pages, kv_heads, head_dim, PAGE_TOKENS)
    )
    values = (
        pages[:, key_bytes:]
        .copy()
        .view(np.uint16)
        .reshape(num_pages, kv_heads, PAGE_TOKENS, padded)
    )
    for i in range(tokens):
        angle = cosines[positions[i]], sines[positions[i]]
        page, place = divmod(int(slots[i]), PAGE_TOKENS)
        np.testing.assert_array_equal(
            qkv[i, :heads], naive.rotate(before[i, :heads] * scale, *angle)
        )
        want = naive.to_half(naive.rotate(before[i, heads:-kv_heads], *angle)).view(np.uint16)
        np.testing.assert_array_equal(keys[page, :, :, place], want)
        want = naive.to_half(before[i, -kv_heads:]).view(np.uint16)
        np.testing.assert_array_equal(values[page, :, place, :head_dim], want)
        keys[page, :, :, place] = 0xA5A5
        values[page, :, place, :head_dim] = 0xA5A5
    # Nothing else was written.
    restored = np.concatenate(
        [keys.reshape(num_pages, -1), values.reshape(num_pages, -1)], axis=1
    ).view(np.uint8)
    np.testing.assert_array_equal(restored.ravel(), untouched[:-GUARD])
    check_guard(cache)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(8, 8), (64, 64), (80, 32), (96, 96), (34, 0)])
def test_rope_and_pages_of_int8(head_dim, rope_dim, centered):
    """Queries and keys are mixed after they are rotated; keys and values become codes."""
    rng = np.random.default_rng(head_dim)
    heads, kv_heads, tokens, num_pages, half = 6, 2, 5, 4, PAGE_TOKENS // 2
    padded = -(-head_dim // 16) * 16
    qkv = rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim)).astype(np.float32)
    qkv[1] *= 30000  # beyond what float16 holds
    qkv[2] *= 1e-20
    qkv[3, -kv_heads:] = 0
    before = qkv.copy()
    angles = rng.uniform(-9, 9, (100, rope_dim // 2))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 31, 32, 99, 7], np.int32)
    slots = np.array([0, 127, 64, 35, 97], np.int32)
    center = rng.standard_normal((kv_heads, head_dim)).astype(np.float32)
    key_bytes = kv_heads * (head_dim + 2) * PAGE_TOKENS
    value_bytes = kv_heads * (padded + 2) * PAGE_TOKENS
    cache = guarded(num_pages * (key_bytes + value_bytes))
    untouched = cache.copy()
    moment = record(
        ROPE, qkv=qkv, qkv_stride=qkv.strides[0], num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, padded_head_dim=padded, rope_dim=rope_dim, cosines=cosines, sines=sines,
        scale=0.25, keys=cache, values=cache.ctypes.data + key_bytes,
        page_bytes=key_bytes + value_bytes, key_center=center if centered else 0,
    )  # fmt: skip
    batch = record(BATCH, num_tokens=tokens, positions=positions, slots=slots)
    kernel(rows_unit(), "rope_int8")(moment, batch, Thread(0).record, 0, tokens)

    pages = cache[:-GUARD].reshape(num_pages, -1)
    keys = pages[:, :key_bytes].reshape(num_pages, kv_heads, -1)
    values = pages[:, key_bytes:].reshape(num_pages, kv_heads, -1)
    for i in range(tokens):
        angle = cosines[positions[i]], sines[positions[i]]
        page, place = divmod(int(slots[i]), PAGE_TOKENS)
        want = naive.mixed(naive.rotate(before[i, :heads] * np.float32(0.25), *angle))
        np.testing.assert_allclose(qkv[i, :heads], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        want = naive.rotate(before[i, heads:-kv_heads], *angle)
        want = np.clip(naive.mixed(want - center if centered else want), -65504, 65504)
        for head in range(kv_heads):
            codes = keys[page, head, : head_dim * PAGE_TOKENS].view(np.int8)
            codes = codes.reshape(-1, PAGE_TOKENS, 2)[:, place]
            scales = keys[page, head, head_dim * PAGE_TOKENS :].view(np.uint16)
            scale = naive.page_scales(scales[place : place + 1])
            assert np.abs(want[head]).max() <= 127 * scale[0] * (1 + 1e-5)
            error = np.abs(codes.reshape(-1) * scale - want[head]).max()
            assert error <= 0.501 * scale[0] + 1e-5 * np.abs(want[head]).max()
            codes[:] = np.array(0xA5, np.uint8).view(np.int8)
            scales[place] = 0xA5A5
            codes = values[page, head, : padded * PAGE_TOKENS].view(np.int8)
            codes = codes.reshape(half, padded, 2)[place // 2, :head_dim, place % 2]
            scales = values[page, head, padded * PAGE_TOKENS :].view(np.uint16)
            said, stored = naive.page_codes(before[i, heads + kv_heads + head])
            np.testing.assert_array_equal(codes, said)
            assert scales[place] == stored
            codes[:] = np.array(0xA5, np.uint8).view(np.int8)
            scales[place] = 0xA5A5
    np.testing.assert_array_equal(cache, untouched)


@pytest.mark.parametrize("normed", [(), ("query_norm",), ("key_norm",), ("query_norm", "key_norm")])
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(8, 0), (64, 64), (72, 32), (256, 256)])
def test_rope_of_normed_heads(head_dim, rope_dim, normed):
    """With and without rotation, and a scale of its own; one key-value head."""
    rng = np.random.default_rng(head_dim)
    heads, tokens = 3, 4
    padded = -(-head_dim // 16) * 16
    qkv = rng.standard_normal((tokens, heads + 2, head_dim)).astype(np.float32) * 40
    before = qkv.copy()
    angles = rng.uniform(-9, 9, (50, rope_dim // 2))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions, slots = np.array([3, 0, 49, 7], np.int32), np.array([0, 31, 40, 64], np.int32)
    key_bytes, value_bytes = head_dim * PAGE_TOKENS * 2, padded * PAGE_TOKENS * 2
    cache = guarded(3 * (key_bytes + value_bytes))
    weights = {name: rng.standard_normal(head_dim).astype(np.float32) for name in normed}
    moment = record(
        ROPE, qkv=qkv, qkv_stride=(heads + 2) * head_dim * 4, num_heads=heads, num_kv_heads=1,
        head_dim=head_dim, padded_head_dim=padded, rope_dim=rope_dim,
        cosines=cosines if rope_dim else 0, sines=sines if rope_dim else 0, scale=0.25,
        epsilon=1e-6, keys=cache, values=cache.ctypes.data + key_bytes,
        page_bytes=key_bytes + value_bytes, **weights,
    )  # fmt: skip
    batch = record(BATCH, num_tokens=tokens, positions=positions, slots=slots)
    kernel(rows_unit(), "rope")(moment, batch, Thread(0).record, 0, tokens)
    pages = cache[:-GUARD].reshape(3, -1)
    keys = pages[:, :key_bytes].copy().view(np.float16).reshape(3, head_dim, PAGE_TOKENS)
    values = pages[:, key_bytes:].copy().view(np.float16).reshape(3, PAGE_TOKENS, padded)
    parts = {"query_norm": before[:, :heads], "key_norm": before[:, heads : heads + 1]}
    for name, weight in weights.items():
        parts[name] = naive.rms_norm(parts[name], weight, 1e-6).astype(np.float32)
    for i in range(tokens):
        angle = cosines[positions[i]], sines[positions[i]]
        page, place = divmod(int(slots[i]), PAGE_TOKENS)
        want = naive.rotate(parts["query_norm"][i] * np.float32(0.25), *angle)
        np.testing.assert_allclose(qkv[i, :heads], want, rtol=1e-5, atol=1e-5)
        want = naive.rotate(parts["key_norm"][i], *angle)[0]
        np.testing.assert_allclose(keys[page, :, place], want, rtol=2e-3, atol=1e-5)
        np.testing.assert_array_equal(
            values[page, place, :head_dim], naive.to_half(before[i, heads + 1])
        )
    check_guard(cache)
