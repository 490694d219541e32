"""Functions of vectors that LLVM does not have, in operations that every target rounds alike."""

from __future__ import annotations

from cyclewise.machine.kernels.lang import I32, Emitter, Value, vector

_ROUND = 12582912.0
"""1.5 * 2**23: adding it to a small float32 leaves the nearest integer in the low bits."""

GELU_SLOPE, GELU_CUBE = 0.7978845608028654, 0.044715

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
"""The polynomial of Cephes' expf."""

_EXP2 = (1.3264727e-3, 9.6715130e-3, 5.5507336e-2, 2.4022242e-1, 6.9314700e-1, 1.0)
"""2**x from -0.5 to 0.5, exact at 0, of least relative error: 9.1e-8."""

LOG2_E = 1.44269504088896341


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
    floats = x.type
    shifted = clamped * LOG2_E + _ROUND
    n = shifted - _ROUND
    rest = emitter.fma(n, emitter.constant(-0.693359375, floats), clamped)
    rest = emitter.fma(n, emitter.constant(2.12194440e-4, floats), rest)
    value = emitter.constant(_EXP[0], floats)
    for coefficient in _EXP[1:]:
        value = emitter.fma(value, rest, emitter.constant(coefficient, floats))
    value = emitter.fma(value, rest * rest, rest + 1.0)
    power = emitter.bitcast(shifted, vector(I32, floats.count)) << 23
    value = value * emitter.bitcast(power + (127 << 23), floats)
    return (x < low).select(emitter.constant(0.0, x.type), value)


def exp2_of_negative(emitter: Emitter, x: Value) -> Value:
    """2**x of float32 lanes that are not above 0, within 2.2 units in the last place down to
    -126; exactly 1 at 0, exactly 0 from -127 down.
    """
    floats, words = x.type, vector(I32, x.type.count)
    # Nothing comes out below -127, where the power's bits are exactly those of 0.
    clamped = emitter.maximum(x, emitter.constant(-127.0, floats))
    shifted = clamped + _ROUND
    rest = clamped - (shifted - _ROUND)
    value = emitter.constant(_EXP2[0], floats)
    for coefficient in _EXP2[1:]:
        value = emitter.fma(value, rest, emitter.constant(coefficient, floats))
    power = emitter.bitcast(shifted, words) << 23
    return emitter.bitcast(emitter.bitcast(value, words) + power, floats)


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
