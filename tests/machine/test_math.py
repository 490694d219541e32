from __future__ import annotations

import numpy as np
import pytest

from cyclewise.machine.kernels.compiler import Compiler, Unit, callable_at
from cyclewise.machine.kernels.lang import F32, I16, I32, vector
from cyclewise.machine.kernels.math import (
    absolute,
    exp,
    exp2_of_negative,
    gelu,
    round_to_int,
    silu,
    tanh,
)
from tests import naive
from tests.machine.kernel_calls import FUSED

LANES = 16


def _map(write, source=F32, result=F32):
    """Writes a kernel of (x, out, count) that maps 16 lanes at once."""

    def kernel(emitter, x, out, count):
        with emitter.range(0, count, LANES) as at:
            found = emitter.load(
                x + at * (source.width // 8 if source is I16 else 4), vector(source, LANES)
            )
            emitter.store(
                out + at * (result.width // 8 if result is I16 else 4), write(emitter, found)
            )

    return kernel


KERNELS = {
    "exp": _map(exp),
    "exp2_of_negative": _map(exp2_of_negative),
    "silu": _map(silu),
    "gelu": _map(gelu),
    "tanh": _map(tanh),
    "absolute": _map(absolute),
    "round": _map(round_to_int, result=I32),
    "from_half": _map(lambda emitter, x: emitter.half_to_float(x), source=I16),
    "to_half": _map(lambda emitter, x: emitter.float_to_half(x), result=I16),
    "fma": lambda emitter, x, out, count: emitter.store(
        out,
        emitter.fma(*(emitter.load(x + 64 * i, vector(F32, LANES)) for i in range(3))),
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Calls one of KERNELS; they are compiled into a cache of their own."""

    def write(emitter):
        for name, kernel in KERNELS.items():
            emitter.function(name, 3, lambda *a, kernel=kernel: kernel(emitter, *a))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CYCLEWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        compiler = Compiler()
        compiler.load([Unit("test_math", write, tuple(KERNELS))])

    def call(name, x, dtype=np.float32):
        padded = np.zeros(-(-len(x) // LANES) * LANES, x.dtype)
        padded[: len(x)] = x
        out = np.zeros(len(padded), dtype)
        callable_at(compiler.address(name), 3)(padded.ctypes.data, out.ctypes.data, len(padded))
        return out[: len(x)]

    yield call
    compiler.address("exp")  # the code lives as long as its compiler


def ulps(got, exact):
    """How many units in the last place of float32 `got` is from the float64 `exact`."""
    return np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32))


def test_exp(run):
    x = np.concatenate([np.linspace(-87, 88, 200_003), np.linspace(-1, 1, 50_001)])
    x = np.unique(x.astype(np.float32))
    got = run("exp", x)
    assert ulps(got, np.exp(x.astype(np.float64))).max() <= 2
    assert (np.diff(got.astype(np.float64)) >= -np.spacing(got[1:])).all()


def test_exp_at_its_ends(run):
    x = np.array([0.0, -0.0, -87.01, -100, -1e30, -np.inf, 1e-45, -1e-38], np.float32)
    np.testing.assert_array_equal(run("exp", x), [1, 1, 0, 0, 0, 0, 1, 1])
    assert np.isfinite(run("exp", np.array([88, 89, 1e30, np.inf], np.float32))).all()


def test_exp2_of_negative(run):
    x = np.concatenate([np.linspace(-126, 0, 200_003), np.linspace(-1, 0, 50_001)])
    x = np.unique(x.astype(np.float32))
    # 2.14 where multiply-adds round twice
    assert ulps(run("exp2_of_negative", x), np.exp2(x.astype(np.float64))).max() <= 2.2
    least = run("exp2_of_negative", np.linspace(-127, -126, 10_001).astype(np.float32))
    assert (least >= 0).all() and (least <= 2.0**-125).all()
    ends = np.array([0.0, -0.0, -127, -130, -1e30, -np.inf, -1e-45, -1e-38], np.float32)
    np.testing.assert_array_equal(run("exp2_of_negative", ends), [1, 1, 0, 0, 0, 0, 1, 1])


def test_silu(run):
    x = np.unique(np.linspace(-80, 100, 100_001).astype(np.float32))
    assert ulps(run("silu", x), naive.silu(x)).max() <= 5
    np.testing.assert_array_equal(
        run("silu", np.array([0.0, 200, 3e38], np.float32)), [0, 200, np.float32(3e38)]
    )
    assert (np.abs(run("silu", np.array([-90, -200, -1e4], np.float32))) < 1e-33).all()


def test_gelu(run):
    x = np.unique(np.linspace(-5, 100, 100_001).astype(np.float32))
    exact = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
    np.testing.assert_allclose(naive.gelu(x), exact, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run("gelu", x), exact, rtol=3e-6, atol=1e-7)
    np.testing.assert_array_equal(
        run("gelu", np.array([0.0, 200, 3e38], np.float32)), [0, 200, np.float32(3e38)]
    )
    assert (np.abs(run("gelu", np.array([-15, -90, -1e4], np.float32))) < 1e-33).all()


def test_tanh(run):
    x = np.unique(np.concatenate([np.linspace(-20, 20, 100_001), np.linspace(-1e-3, 1e-3, 1001)]))
    x = x.astype(np.float32)
    assert np.abs(run("tanh", x) - np.tanh(x.astype(np.float64))).max() <= 2e-7
    ends = np.array([0.0, -0.0, 100, -100, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(run("tanh", ends), [0, 0, 1, -1, 1, -1])


def test_rounding_and_magnitude(run):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [np.arange(-128, 128) + 0.5, rng.uniform(-4e6, 4e6, 1000), [-0.0, 0.25]]
    ).astype(np.float32)
    np.testing.assert_array_equal(run("round", x, np.int32), np.rint(x).astype(np.int32))
    np.testing.assert_array_equal(run("absolute", x).view(np.int32), np.abs(x).view(np.int32))


def test_every_half_float(run):
    words = np.arange(1 << 16, dtype=np.uint16)
    words = words[~np.isnan(words.view(np.float16))]
    want = words.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(
        run("from_half", words.view(np.int16)).view(np.int32), want.view(np.int32)
    )
    np.testing.assert_array_equal(run("to_half", want, np.uint16), words)


def test_rounding_to_half(run):
    rng = np.random.default_rng(1)
    bits = (
        rng.integers(0, 0x47800000, 100_000).astype(np.uint32)
        | rng.integers(0, 2, 100_000).astype(np.uint32) << 31
    )
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    edges = [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(1e9))]
    x = np.concatenate([bits.view(np.float32), *edges, -middles])
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(run("to_half", x, np.uint16), want.view(np.uint16))


def test_fma_rounds_once_where_the_processor_can(run):
    rng = np.random.default_rng(2)
    for _ in range(50):
        left, right = rng.standard_normal((2, LANES)).astype(np.float32)
        addend = (-left * right * rng.choice([1, 1, 3, 2**-20, 2**20], LANES)).astype(np.float32)
        got = run("fma", np.concatenate([left, right, addend]))[:LANES]
        np.testing.assert_array_equal(got, naive.fma(left, right, addend, fused=FUSED))
