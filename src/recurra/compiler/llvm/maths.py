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
# (sin(r) / r - 1) / r^2 and (cos(r) - 1 + r^2 / 2) / r^4 as polynomials in r^2, for |r| <= pi / 4 and a little more.
_SIN = {
    False: (
        -0.16666666663849675, 0.008333331872526864, -0.00019840085556195348, 2.724977294115182e-06,
    ),
    True: (
        -0.16666666666666666, 0.008333333333330943, -0.0001984126983674956, 2.755731609787775e-06,
        -2.5051130870968297e-08, 1.591805913698281e-10,
    ),
}  # fmt: skip
_COS = {
    False: (
        0.041666664656496995, -0.0013888302451873107, 2.454781592843413e-05,
    ),
    True: (
        0.041666666666666664, -0.0013888888888887393, 2.4801587298760048e-05, -2.755731726880539e-07,
        2.0876145659059344e-09, -1.1382588535352522e-11,
    ),
}  # fmt: skip
# pi / 2 as a sum, in parts so short that a multiple of each by a number below 2^16, or 2^20, is exact.
_HALF_PI = {
    False: (
        1.5703125,
        0.0004825592041015625,
        1.2665987014770508e-06,
        9.89530235528946e-10,
        2.5579538487363607e-12,
        5.384581669432009e-15,
    ),
    True: (1.5707963267341256, 6.077100506303966e-11, 2.0222662487111665e-21, 8.478427660348229e-32),
}
# (atan(s) / s - 1) / s^2 as a polynomial in s^2, for |s| <= tan(pi / 8).
_ATAN = {
    False: (
        -0.33333331760434554, 0.1999954031495797, -0.14263949753605723, 0.10743668324830098, -0.06451718869358958,
    ),
    True: (
        -0.3333333333333333, 0.19999999999999804, -0.14285714285659779, 0.11111111105150588, -0.09090908753259112,
        0.07692296368042296, -0.0666642476020052, 0.05878927554473807, -0.05230443640686948, 0.045515447340221615,
        -0.03456931506332609, 0.016284375050043393,
    ),
}  # fmt: skip
# erf(x) / x as a polynomial in x^2, for |x| <= 1.
_ERF = {
    False: (
        1.1283791658483509, -0.37612626666720334, 0.11283594715160218, -0.026854212010626412, 0.005189087423433974,
        -0.000801686428716587, 7.875875062685488e-05,
    ),
    True: (
        1.1283791670955126, -0.3761263890318375, 0.11283791670954879, -0.026866170645076792, 0.0052239776248180145,
        -0.000854832698083379, 0.0001205533111164271, -1.4925595266831182e-05, 1.6461000484121368e-06,
        -1.6350312701054695e-07, 1.4659775274047436e-08, -1.1372848856791674e-09, 5.957176147748911e-11,
    ),
}  # fmt: skip
# (1 + 2 x) exp(x^2) erfc(x) as a polynomial in (x - k) / (x + k), for x from 0.98 to 6.6; k is 2, or 3.
_ERFC = {
    False: (
        1.2769783781590285, -0.09276351436546391, -0.16602984662048142, 0.16403308605597966, -0.054224403894667934,
        -0.007756026127021216, 0.008559605206831952, -3.502223805959897e-05,
    ),
    True: (
        1.2530080582697296, -0.13562110612458006, -0.047562294353475136, 0.1296451587025097, -0.11927366341267175,
        0.06830802736109803, -0.023770515023535603, 0.0025293912780536766, 0.0018886923037205992,
        -0.0007798232291864396, -0.00010517759317683018, 0.00012501457354916346, 5.021244706786119e-06,
        -1.9672985494084732e-05, -7.704291002070978e-07, 2.4782996032243748e-06,
    ),
}  # fmt: skip
_MANTISSA = {False: 23, True: 52}
_BIAS = {False: 127, True: 1023}

Build = Callable[[Code, ir.Value], ir.Value]


def call(code: Code, name: str, x: ir.Value) -> ir.Value:
    """One of FUNCTIONS, of a vector."""
    f = code.floats
    full = f"recurra.{name}.{f.lanes}"
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


def _quadrant(code: Code, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x as n pi / 2 + r: the whole number n as bits, and r.

    Good for |x| up to 1e5 (float32), 1e6 (float64). Beyond, the error grows in proportion to x; from 6e6, 7e15 on
    all that is left of sin and cos is that they lie between -1 and 1.
    """
    b, f = code.b, code.floats
    magic = f.splat(1.5 * 2.0 ** _MANTISSA[f.double])
    shifted = code.fma(x, f.splat(2 / math.pi), magic)
    n = b.fsub(shifted, magic)
    for part in _HALF_PI[f.double]:
        x = code.fma(n, f.splat(-part), x)
    bits = b.sub(b.bitcast(shifted, f.integers), b.bitcast(magic, f.integers))
    # A little more than pi / 4, as n is rounded.
    return bits, _clamp(code, x, -0.8, 0.8)


def _turned(code: Code, x: ir.Value, quarters: int) -> ir.Value:
    """sin(x + quarters pi / 2)."""
    b, f = code.b, code.floats
    n, r = _quadrant(code, x)
    n = b.add(n, f.integer(quarters))
    square = b.fmul(r, r)
    sine = code.fma(b.fmul(r, square), _polynomial(code, square, _SIN[f.double]), r)
    inner = code.fma(square, _polynomial(code, square, _COS[f.double]), f.splat(-0.5))
    cosine = code.fma(square, inner, f.splat(1.0))
    odd = b.icmp_unsigned("!=", b.and_(n, f.integer(1)), f.integer(0))
    sign = b.shl(b.and_(n, f.integer(2)), f.integer(8 * f.bytes - 2))
    chosen = b.bitcast(b.select(odd, cosine, sine), f.integers)
    return b.bitcast(b.xor(chosen, sign), f.vector)


def _atan(code: Code, x: ir.Value) -> ir.Value:
    """From 1 on by the angle of 1 / x, and always by twice the half of the angle."""
    b, f = code.b, code.floats
    one, size = f.splat(1.0), call(code, "abs", x)
    large = b.fcmp_ordered(">", size, one)
    t = b.select(large, b.fdiv(one, size), size)
    s = b.fdiv(t, b.fadd(call(code, "sqrt", code.fma(t, t, one)), one))
    square = b.fmul(s, s)
    half = code.fma(b.fmul(s, square), _polynomial(code, square, _ATAN[f.double]), s)
    angle = b.fadd(half, half)
    angle = b.select(large, b.fsub(f.splat(math.pi / 2), angle), angle)
    sign = b.xor(b.bitcast(x, f.integers), b.bitcast(size, f.integers))
    return b.bitcast(b.or_(b.bitcast(angle, f.integers), sign), f.vector)


def _erf(code: Code, x: ir.Value) -> ir.Value:
    b, f = code.b, code.floats
    square = b.fmul(x, x)
    near = b.fmul(x, _polynomial(code, square, _ERF[f.double]))
    # From 6.5 on it is 1.
    size = _clamp(code, call(code, "abs", x), 0.0, 6.5)
    k = 3.0 if f.double else 2.0
    place = b.fdiv(b.fsub(size, f.splat(k)), b.fadd(size, f.splat(k)))
    tail = b.fdiv(_polynomial(code, place, _ERFC[f.double]), code.fma(size, f.splat(2.0), f.splat(1.0)))
    far = b.fsub(f.splat(1.0), b.fmul(call(code, "exp", b.fneg(b.fmul(size, size))), tail))
    far = b.select(b.fcmp_ordered("<", x, f.splat(0.0)), b.fneg(far), far)
    return b.select(b.fcmp_ordered("<=", square, f.splat(1.0)), near, far)


def _round(code: Code, x: ir.Value) -> ir.Value:
    """The nearest whole number; of two, the even one."""
    b, f = code.b, code.floats
    # From this size on all numbers are whole; adding it rounds those below.
    whole = f.splat(2.0 ** _MANTISSA[f.double])
    size = call(code, "abs", x)
    rounded = b.fsub(b.fadd(size, whole), whole)
    # With the sign of x, also where it is a zero.
    sign = b.xor(b.bitcast(x, f.integers), b.bitcast(size, f.integers))
    signed = b.bitcast(b.or_(b.bitcast(rounded, f.integers), sign), f.vector)
    return b.select(b.fcmp_ordered("<", size, whole), signed, x)


def _floor(code: Code, x: ir.Value) -> ir.Value:
    b, f = code.b, code.floats
    rounded = _round(code, x)
    above = b.fcmp_ordered(">", rounded, x)
    return b.select(above, b.fsub(rounded, f.splat(1.0)), rounded)


def _intrinsic(code: Code, x: ir.Value, name: str) -> ir.Value:
    return code.b.call(code.floats.intrinsic(name), [x])


FUNCTIONS: dict[str, Build] = {
    "exp": _exp,
    "log": _log,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "log_sigmoid": _log_sigmoid,
    "sin": partial(_turned, quarters=0),
    "cos": partial(_turned, quarters=1),
    "atan": _atan,
    "erf": _erf,
    "round": _round,
    "floor": _floor,
    "sqrt": partial(_intrinsic, name="sqrt"),
    "abs": partial(_intrinsic, name="fabs"),
}
