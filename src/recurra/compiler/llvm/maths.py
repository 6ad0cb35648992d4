"""exp, log and their kin on whole vectors: no branch, no table, no library.

Each is a range reduction and a polynomial; the coefficients are Chebyshev fits, made with 40 digits. Infinities and
NaN come out as they should. Relative errors, measured over the whole range against 40 digits, are in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from llvmlite import ir

from recurra.compiler.llvm.code import Code

# (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, constant term first.
_EXP = {
    False: (0.5, 0.16666576062275124, 0.04166655345865175, 0.008363333082182943, 0.001392637599580353),
    True: (
        0.5,
        0.1666666666666667,
        0.04166666666666667,
        0.008333333333325985,
        0.0013888888888883642,
        0.00019841269875342141,
        2.4801587325920163e-05,
        2.7557254740405416e-06,
        2.7557273171941026e-07,
        2.5105490906986696e-08,
        2.091488256348507e-09,
    ),
}
# (atanh(s) / s - 1) / s^2 as a polynomial in s^2, for |s| <= (sqrt(2) - 1) / (sqrt(2) + 1).
_ATANH = {
    False: (0.33333342531875165, 0.19994385336755438, 0.14790199140742355),
    True: (
        0.3333333333333333,
        0.2000000000000044,
        0.14285714285400977,
        0.11111111196044504,
        0.09090897800030397,
        0.07693120940969297,
        0.06634357396174048,
        0.0654361809832981,
    ),
}
# ln(2) as two numbers, the first so short that small multiples of it are exact.
_LN2 = {False: (0.693359375, -2.12194440054690583e-4), True: (6.93147180369123816490e-01, 1.90821492927058770002e-10)}
_MANTISSA = {False: 23, True: 52}
_BIAS = {False: 127, True: 1023}

Build = Callable[[Code, ir.Value], ir.Value]


def call(code: Code, name: str, x: ir.Value) -> ir.Value:
    """One of FUNCTIONS, of a vector."""
    f = code.floats
    full = f"recurra.{name}"
    found = f.module.globals.get(full)
    if found is None:
        found = f.function(full, [f.vector], f.vector)
        found.attributes.add("alwaysinline")
        inner = Code(f, found)
        inner.b.ret(FUNCTIONS[name](inner, found.args[0]))
    return code.b.call(found, [x])


def power(code: Code, x: ir.Value, exponent: float) -> ir.Value:
    """x to a constant. A power that is not whole goes by exp and log, which costs |exponent log(x)| roundings."""
    b, f = code.b, code.floats
    if exponent == 0.5:
        return call(code, "sqrt", x)
    if exponent == -0.5:
        return b.fdiv(f.splat(1.0), call(code, "sqrt", x))
    if exponent != int(exponent) or abs(exponent) > 64:
        return call(code, "exp", b.fmul(call(code, "log", x), f.splat(exponent)))
    result, square, left = f.splat(1.0), x, abs(int(exponent))
    while left:
        result = b.fmul(result, square) if left & 1 else result
        square, left = b.fmul(square, square), left >> 1
    return result if exponent >= 0 else b.fdiv(f.splat(1.0), result)


def _polynomial(code: Code, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    result: ir.Value = code.floats.splat(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = code.fma(result, x, code.floats.splat(coefficient))
    return result


def _clamp(code: Code, x: ir.Value, low: float, high: float) -> ir.Value:
    # Comparisons with NaN are false, so NaN stays.
    b, f = code.b, code.floats
    x = b.select(b.fcmp_ordered("<", x, f.splat(low)), f.splat(low), x)
    return b.select(b.fcmp_ordered(">", x, f.splat(high)), f.splat(high), x)


def _reduce(code: Code, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x as n ln(2) + r: the whole number n as bits, and exp(r) - 1."""
    b, f = code.b, code.floats
    # Adding 1.5 * 2^mantissa rounds to a whole number and leaves it in the low bits. Unlike a conversion this is
    # defined for NaN.
    magic = f.splat(1.5 * 2.0 ** _MANTISSA[f.double])
    shifted = code.fma(x, f.splat(1 / math.log(2)), magic)
    n = b.fsub(shifted, magic)
    bits = b.sub(b.bitcast(shifted, f.integers), b.bitcast(magic, f.integers))
    high, low = _LN2[f.double]
    r = code.fma(n, f.splat(-low), code.fma(n, f.splat(-high), x))
    inner = _polynomial(code, r, _EXP[f.double])
    return bits, code.fma(b.fmul(r, r), inner, r)


def _power_of_two(code: Code, n: ir.Value) -> ir.Value:
    b, f = code.b, code.floats
    exponent = b.add(n, f.integer(_BIAS[f.double]))
    return b.bitcast(b.shl(exponent, f.integer(_MANTISSA[f.double])), f.vector)


def _exp(code: Code, x: ir.Value) -> ir.Value:
    b, f = code.b, code.floats
    x = _clamp(code, x, -746.0, 710.0) if f.double else _clamp(code, x, -104.0, 89.0)
    n, less_one = _reduce(code, x)
    # In two factors, because 2^n itself can overflow or be subnormal.
    half = b.ashr(n, f.integer(1))
    scaled = b.fmul(b.fadd(less_one, f.splat(1.0)), _power_of_two(code, half))
    return b.fmul(scaled, _power_of_two(code, b.sub(n, half)))


def _sigmoid(code: Code, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)). What would be below the normal numbers is zero."""
    b, f = code.b, code.floats
    # The bounds keep the factor 2^n normal, or infinite at the upper one.
    x = _clamp(code, b.fneg(x), -708.0, 710.0) if f.double else _clamp(code, b.fneg(x), -87.0, 89.0)
    n, less_one = _reduce(code, x)
    exp = b.fmul(b.fadd(less_one, f.splat(1.0)), _power_of_two(code, n))
    return b.fdiv(f.splat(1.0), b.fadd(exp, f.splat(1.0)))


def _tanh(code: Code, x: ir.Value) -> ir.Value:
    """(exp(2 x) - 1) / (exp(2 x) + 1), from exp(2 x) - 1, so that small x lose nothing."""
    b, f = code.b, code.floats
    bound = 40.0 if f.double else 20.0
    n, less_one = _reduce(code, _clamp(code, b.fadd(x, x), -bound, bound))
    scale = _power_of_two(code, n)
    whole = code.fma(scale, less_one, b.fsub(scale, f.splat(1.0)))
    return b.fdiv(whole, b.fadd(whole, f.splat(2.0)))


def _atanh(code: Code, above: ir.Value, below: ir.Value) -> ir.Value:
    """2 atanh(above / below), the logarithm of (below + above) / (below - above)."""
    b, f = code.b, code.floats
    s = b.fdiv(above, below)
    square = b.fmul(s, s)
    inner = b.fmul(square, _polynomial(code, square, _ATANH[f.double]))
    twice = b.fadd(s, s)
    return code.fma(twice, inner, twice)


def _log(code: Code, x: ir.Value) -> ir.Value:
    b, f = code.b, code.floats
    mantissa = _MANTISSA[f.double]
    up = mantissa + 2
    small = b.fcmp_ordered("<", x, f.splat(2.0 ** (1 - _BIAS[f.double])))
    normal = b.select(small, b.fmul(x, f.splat(2.0**up)), x)
    # The mantissa is taken between sqrt(1/2) and sqrt(2).
    bits = b.bitcast(normal, f.integers)
    middle = b.bitcast(f.splat(math.sqrt(0.5)), f.integers)
    n = b.ashr(b.sub(bits, middle), f.integer(mantissa))
    m = b.bitcast(b.sub(bits, b.shl(n, f.integer(mantissa))), f.vector)
    n = b.sitofp(b.sub(n, b.select(small, f.integer(up), f.integer(0))), f.vector)
    one = f.splat(1.0)
    high, low = _LN2[f.double]
    result = code.fma(n, f.splat(low), _atanh(code, b.fsub(m, one), b.fadd(m, one)))
    result = code.fma(n, f.splat(high), result)
    result = b.select(b.fcmp_ordered("==", x, f.splat(0.0)), f.splat(-math.inf), result)
    result = b.select(b.fcmp_ordered("<", x, f.splat(0.0)), f.splat(math.nan), result)
    return b.select(b.fcmp_unordered(">=", x, f.splat(math.inf)), x, result)


def _log_sigmoid(code: Code, x: ir.Value) -> ir.Value:
    """min(x, 0) - log(1 + exp(-|x|))."""
    b, f = code.b, code.floats
    e = call(code, "exp", b.fneg(call(code, "abs", x)))
    # 1 + e or (1 + e) / 2, whichever is nearer to 1.
    large = b.fcmp_ordered(">", e, f.splat(math.sqrt(2) - 1))
    above = b.fadd(e, b.select(large, f.splat(-1.0), f.splat(0.0)))
    below = b.fadd(e, b.select(large, f.splat(3.0), f.splat(2.0)))
    log = b.fadd(_atanh(code, above, below), b.select(large, f.splat(math.log(2)), f.splat(0.0)))
    negative = b.select(b.fcmp_ordered("<", x, f.splat(0.0)), x, f.splat(0.0))
    return b.fsub(negative, log)


def _intrinsic(code: Code, x: ir.Value, name: str) -> ir.Value:
    return code.b.call(code.floats.intrinsic(name), [x])


FUNCTIONS: dict[str, Build] = {
    "exp": _exp,
    "log": _log,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "log_sigmoid": _log_sigmoid,
    "sqrt": partial(_intrinsic, name="sqrt"),
    "abs": partial(_intrinsic, name="fabs"),
}
