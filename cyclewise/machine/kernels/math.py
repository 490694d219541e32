"""Functions of vectors that LLVM does not have, in operations that every target rounds alike."""

from __future__ import annotations

from cyclewise.machine.kernels.lang import I32, Emitter, Value, vector

_ROUND = 12582912.0
"""1.5 * 2**23: adding it to a small float32 leaves the nearest integer in the low bits."""

GELU_SLOPE, GELU_CUBE = 0.7978845608028654, 0.044715

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
"""The polynomial of Cephes' expf."""


def round_to_int(emitter: Emitter, value: Value) -> Value:
    """float32 lanes (below 2**22) to the nearest int32, ties to even."""
    words = vector(I32, value.type.count)
    shifted = emitter.bitcast(value + _ROUND, words)
    return shifted - 0x4B400000


def exp(emitter: Emitter, x: Value) -> Value:
    """e**x of float32 lanes, within 2 units in the last place; exactly 1 at 0, exactly 0 below
    -87.
    """
    low = emitter.constant(-87.0, x.type)
    high = emitter.constant(88.0, x.type)
    clamped = emitter.minimum(emitter.maximum(x, low), high)
    return (x < low).select(emitter.constant(0.0, x.type), _exp(emitter, clamped))


def exp_of_negative(emitter: Emitter, x: Value) -> Value:
    """e**x of float32 lanes that are not above 0, with fewer operations; exactly 0 below -88."""
    # Of the power -127 the scale is 0.
    return _exp(emitter, emitter.maximum(x, emitter.constant(-88.0, x.type)))


def _exp(emitter: Emitter, x: Value) -> Value:
    """Of lanes from -88 to 88."""
    floats = x.type
    shifted = x * 1.44269504088896341 + _ROUND
    n = shifted - _ROUND
    rest = emitter.fma(n, emitter.constant(-0.693359375, floats), x)
    rest = emitter.fma(n, emitter.constant(2.12194440e-4, floats), rest)
    value = emitter.constant(_EXP[0], floats)
    for coefficient in _EXP[1:]:
        value = emitter.fma(value, rest, emitter.constant(coefficient, floats))
    value = emitter.fma(value, rest * rest, rest + 1.0)
    power = emitter.bitcast(shifted, vector(I32, floats.count)) << 23
    return value * emitter.bitcast(power + (127 << 23), floats)


def silu(emitter: Emitter, x: Value) -> Value:
    """x * sigmoid(x)."""
    negative = emitter.constant(-0.0, x.type) - x
    return x / (exp(emitter, negative) + 1.0)


def gelu(emitter: Emitter, x: Value) -> Value:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))): GELU's approximation (Hendrycks and
    Gimpel, 2016), with tanh(y) as 2 * sigmoid(2y) - 1.
    """
    negative = x * (x * x * (-2 * GELU_SLOPE * GELU_CUBE) - 2 * GELU_SLOPE)
    return x / (exp(emitter, negative) + 1.0)


def tanh(emitter: Emitter, x: Value) -> Value:
    """(1 - e**-2|x|) / (1 + e**-2|x|), with x's sign. Below 2**-10 the result's last places are
    lost: what caps logits needs an absolute error.
    """
    power = exp(emitter, absolute(emitter, x) * -2.0)
    value = (1.0 - power) / (power + 1.0)
    return (x < 0.0).select(-0.0 - value, value)


def absolute(emitter: Emitter, x: Value) -> Value:
    words = vector(I32, x.type.count)
    return emitter.bitcast(emitter.bitcast(x, words) & 0x7FFFFFFF, x.type)
