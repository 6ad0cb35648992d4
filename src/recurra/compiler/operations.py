"""What PyTorch's pointwise operations are in the loop IR, and which of its operations are not taken apart for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from recurra.compiler.build import Builder, Operand, Value
from recurra.compiler.ir import Kind, Op

_aten = torch.ops.aten


def as_float(b: Builder, x: Operand) -> Operand:
    """Numbers, 1 for true and 0 for false."""
    return b.apply(Op.WHERE, x, 1.0, 0.0) if _is_bool(x) else x


def as_bool(b: Builder, x: Operand) -> Operand:
    """Whether a number is other than 0."""
    return x if _is_bool(x) else b.apply(Op.NE, x, 0.0)


def _is_bool(x: Operand) -> bool:
    return isinstance(x, Value) and x.node.kind is Kind.BOOL


class _Numbers:
    """An operation of the IR on numbers."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def __call__(self, b: Builder, *operands: Operand) -> Value:
        return b.apply(self.op, *(as_float(b, x) for x in operands))


class _Truths:
    """An operation of the IR on truth values."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def __call__(self, b: Builder, *operands: Operand) -> Value:
        return b.apply(self.op, *(as_bool(b, x) for x in operands))


_add, _sub, _mul, _div = (_Numbers(op) for op in (Op.ADD, Op.SUB, Op.MUL, Op.DIV))
_exp, _log, _tanh, _sigmoid = (_Numbers(op) for op in (Op.EXP, Op.LOG, Op.TANH, Op.SIGMOID))
_largest, _least = _Numbers(Op.MAXIMUM), _Numbers(Op.MINIMUM)
_above, _equal = _Numbers(Op.GT), _Numbers(Op.EQ)


def _scaled(b: Builder, x: Operand, alpha: float) -> Operand:
    return x if alpha == 1 else _mul(b, x, alpha)


def _sum(b: Builder, x: Operand, y: Operand, *, alpha: float = 1) -> Value:
    return _add(b, x, _scaled(b, y, alpha))


def _difference(b: Builder, x: Operand, y: Operand, *, alpha: float = 1) -> Value:
    return _sub(b, x, _scaled(b, y, alpha))


def _reverse_difference(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> Value:
    return _sub(b, y, _scaled(b, x, alpha))


def where(b: Builder, mask: Operand, x: Operand, y: Operand) -> Value:
    """x where the mask is true, else y."""
    return b.apply(Op.WHERE, as_bool(b, mask), as_float(b, x), as_float(b, y))


def _masked_fill(b: Builder, x: Operand, mask: Operand, value: Operand) -> Value:
    return where(b, mask, value, x)


def _clamp(b: Builder, x: Value, low: Operand | None = None, high: Operand | None = None) -> Value:
    if low is not None:
        x = _largest(b, x, low)
    return x if high is None else _least(b, x, high)


def _relu(b: Builder, x: Value) -> Value:
    return _largest(b, x, 0.0)


def _sqrt(b: Builder, x: Value) -> Value:
    return b.apply(Op.SQRT, x)


def _rsqrt(b: Builder, x: Value) -> Value:
    return _div(b, 1.0, _sqrt(b, x))


def _reciprocal(b: Builder, x: Value) -> Value:
    return _div(b, 1.0, x)


def _square(b: Builder, x: Value) -> Value:
    return _mul(b, x, x)


# As PyTorch calculates them.
_POWERS: dict[float, Callable[[Builder, Value], Value]] = {
    2: _square,
    3: lambda b, x: _mul(b, _square(b, x), x),
    0.5: _sqrt,
    -0.5: _rsqrt,
    -1: _reciprocal,
    -2: lambda b, x: _reciprocal(b, _square(b, x)),
}


def _power(b: Builder, x: Value, exponent: float) -> Value:
    known = _POWERS.get(exponent)
    return b.power(x, exponent) if known is None else known(b, x)


def truncated(b: Builder, x: Value) -> Value:
    """Towards zero to a whole number."""
    size = b.apply(Op.FLOOR, b.apply(Op.ABS, x))
    return where(b, b.apply(Op.LT, x, 0.0), -size, size)


def _round(b: Builder, x: Value, *, decimals: float = 0) -> Value:
    scale = 10.0**decimals
    return _div(b, b.apply(Op.ROUND, _mul(b, x, scale)), scale) if decimals else b.apply(Op.ROUND, x)


def _quotient(b: Builder, x: Operand, y: Operand, *, rounding_mode: str | None = None) -> Value:
    whole = _div(b, x, y)
    if rounding_mode is None:
        return whole
    if rounding_mode == "trunc":
        return truncated(b, whole)
    return b.apply(Op.FLOOR, whole)


def _fmod(b: Builder, x: Operand, y: Operand) -> Value:
    """What is left of x, with its sign, after whole multiples of y."""
    size, unit = b.apply(Op.ABS, _value(b, x)), b.apply(Op.ABS, _value(b, y))
    left = _sub(b, size, _mul(b, b.apply(Op.FLOOR, _div(b, size, unit)), unit))
    # The quotient may have been rounded up, or down.
    left = where(b, b.apply(Op.LT, left, 0.0), _add(b, left, unit), left)
    left = where(b, b.apply(Op.GE, left, unit), _sub(b, left, unit), left)
    return where(b, b.apply(Op.LT, _value(b, x), 0.0), -left, left)


def _remainder(b: Builder, x: Operand, y: Operand) -> Value:
    """The same with the sign of y."""
    left = _fmod(b, x, y)
    other = b.apply(Op.NE, as_float(b, b.apply(Op.LT, left, 0.0)), as_float(b, b.apply(Op.LT, _value(b, y), 0.0)))
    return where(b, b.apply(Op.AND, other, b.apply(Op.NE, left, 0.0)), _add(b, left, y), left)


def _value(b: Builder, x: Operand) -> Value:
    found = as_float(b, x)
    return found if isinstance(found, Value) else b.constant(found)


def _raised(b: Builder, x: Operand, y: Operand) -> Value:
    """x to the power of y."""
    x, y = _value(b, x), _value(b, y)
    size = _exp(b, _mul(b, y, _log(b, b.apply(Op.ABS, x))))
    half = _mul(b, y, 0.5)
    odd = b.apply(Op.NE, b.apply(Op.FLOOR, half), half)
    whole = b.apply(Op.EQ, b.apply(Op.FLOOR, y), y)
    negative = where(b, whole, where(b, odd, -size, size), math.nan)
    result = where(b, b.apply(Op.LT, x, 0.0), negative, size)
    one = b.apply(Op.OR, _equal(b, y, 0.0), _equal(b, x, 1.0))
    return where(b, one, 1.0, result)


def _gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    if approximate == "tanh":
        inner = _mul(b, _add(b, x, _mul(b, _power(b, x, 3), 0.044715)), math.sqrt(2 / math.pi))
        return _mul(b, _mul(b, x, 0.5), _add(b, _tanh(b, inner), 1.0))
    return _mul(b, _mul(b, x, 0.5), _add(b, b.apply(Op.ERF, _mul(b, x, math.sqrt(0.5))), 1.0))


def _hypot(b: Builder, x: Operand, y: Operand) -> Value:
    # What is larger is taken out, so that no square is too large or too small.
    x, y = b.apply(Op.ABS, _value(b, x)), b.apply(Op.ABS, _value(b, y))
    large, small = _largest(b, x, y), _least(b, x, y)
    ratio = where(b, _equal(b, large, 0.0), 0.0, _div(b, small, large))
    length = _mul(b, large, _sqrt(b, _add(b, _mul(b, ratio, ratio), 1.0)))
    return where(b, b.apply(Op.OR, _equal(b, x, math.inf), _equal(b, y, math.inf)), math.inf, length)


def _hardshrink_backward(b: Builder, gradient: Operand, x: Value, bound: float) -> Value:
    return where(b, _Numbers(Op.LE)(b, b.apply(Op.ABS, x), bound), 0.0, gradient)


def _hardsigmoid_backward(b: Builder, gradient: Operand, x: Value) -> Value:
    # PyTorch's own kernel, and so the reference loop, has 1 / 6 in float32.
    inside = b.apply(Op.LT, b.apply(Op.ABS, x), 3.0)
    return where(b, inside, _mul(b, gradient, 0.1666666716337204), 0.0)


def _atan(b: Builder, x: Value) -> Value:
    return b.apply(Op.ATAN, x)


def _atan2(b: Builder, y: Operand, x: Operand) -> Value:
    """The angle of the point (x, y). At the origin it is that of a point on the axis of x."""
    y, x = _value(b, y), _value(b, x)
    half = where(b, _behind(b, y), -math.pi, math.pi)
    angle = _atan(b, _div(b, y, x))
    origin = b.apply(Op.AND, _equal(b, y, 0.0), _equal(b, x, 0.0))
    angle = where(b, origin, y, angle)
    return where(b, _behind(b, x), _add(b, angle, half), angle)


def _behind(b: Builder, x: Value) -> Value:
    """Whether a number has the sign of minus, also if it is a zero."""
    return b.apply(Op.LT, where(b, _equal(b, x, 0.0), _reciprocal(b, x), x), 0.0)


def _asinh(b: Builder, x: Value) -> Value:
    size = b.apply(Op.ABS, x)
    square = _mul(b, x, x)
    more = _div(b, square, _add(b, _sqrt(b, _add(b, square, 1.0)), 1.0))
    return _mul(b, _sign(b, x), _log1p(b, _add(b, size, more)))


def _acosh(b: Builder, x: Value) -> Value:
    above = _sub(b, x, 1.0)
    return _log1p(b, _add(b, above, _sqrt(b, _mul(b, above, _add(b, above, 2.0)))))


def _atanh(b: Builder, x: Value) -> Value:
    size = b.apply(Op.ABS, x)
    half = _mul(b, _log1p(b, _div(b, _add(b, size, size), _sub(b, 1.0, size))), 0.5)
    return _mul(b, _sign(b, x), half)


def _across(b: Builder, x: Value) -> Value:
    """The other side of a triangle whose long side is 1."""
    return _sqrt(b, _mul(b, _sub(b, 1.0, x), _add(b, x, 1.0)))


def _not_nan(b: Builder, op: Op, x: Operand, y: Operand) -> Value:
    x, y = _value(b, x), _value(b, y)
    found = where(b, b.apply(Op.NE, x, x), y, b.apply(op, x, y))
    return where(b, b.apply(Op.NE, y, y), x, found)


def _copysign(b: Builder, x: Operand, y: Operand) -> Value:
    size = b.apply(Op.ABS, _value(b, x))
    return where(b, _behind(b, _value(b, y)), -size, size)


def _sinh(b: Builder, x: Value) -> Value:
    less_one = _expm1(b, x)
    return _mul(b, _add(b, less_one, _div(b, less_one, _add(b, less_one, 1.0))), 0.5)


def _cosh(b: Builder, x: Value) -> Value:
    size = _exp(b, b.apply(Op.ABS, x))
    return _mul(b, _add(b, size, _reciprocal(b, size)), 0.5)


def _sign(b: Builder, x: Value) -> Value:
    return b.sign(x)


def _expm1(b: Builder, x: Value) -> Value:
    # exp(x) - 1 would be all rounding near 0.
    return _mul(b, _tanh(b, _mul(b, x, 0.5)), _add(b, _exp(b, x), 1.0))


def _log1p(b: Builder, x: Value) -> Value:
    # The error of 1 + x cancels between the logarithm and the quotient.
    u = _add(b, x, 1.0)
    near = _mul(b, _log(b, u), _div(b, x, _sub(b, u, 1.0)))
    return where(b, _above(b, x, 1.0), _log(b, u), where(b, _equal(b, u, 1.0), x, near))


def _log_sigmoid(b: Builder, x: Value) -> tuple[Value, Value]:
    # The second is what PyTorch keeps for its backward step.
    return b.apply(Op.LOG_SIGMOID, x), _exp(b, -b.apply(Op.ABS, x))


def _sigmoid_backward(b: Builder, gradient: Operand, y: Value) -> Value:
    return _mul(b, gradient, _mul(b, y, _sub(b, 1.0, y)))


def _tanh_backward(b: Builder, gradient: Operand, y: Value) -> Value:
    return _mul(b, gradient, _sub(b, 1.0, _square(b, y)))


def _threshold_backward(b: Builder, gradient: Operand, x: Value, threshold: float) -> Value:
    return where(b, _Numbers(Op.LE)(b, x, threshold), 0.0, gradient)


def _log_sigmoid_backward(b: Builder, gradient: Operand, x: Value, _: Any) -> Value:
    return _mul(b, gradient, _sigmoid(b, -x))


# Each takes the builder and the operation's own arguments, in which a tensor is a value. A packet stands for all of
# its overloads.
POINTWISE: dict[Any, Callable[..., Value | tuple[Value, ...]]] = {
    _aten.add: _sum,
    _aten.sub: _difference,
    _aten.rsub: _reverse_difference,
    _aten.mul: _mul,
    _aten.div: _quotient,
    _aten.fmod: _fmod,
    _aten.remainder: _remainder,
    _aten.neg: _Numbers(Op.NEG),
    _aten.abs: _Numbers(Op.ABS),
    _aten.exp: _exp,
    _aten.expm1: _expm1,
    _aten.log: _log,
    _aten.log1p: _log1p,
    _aten.tanh: _tanh,
    _aten.sigmoid: _sigmoid,
    _aten.relu: _relu,
    _aten.maximum: _largest,
    _aten.minimum: _least,
    _aten.clamp: _clamp,
    _aten.clamp_min: _clamp,
    _aten.clamp_max: lambda b, x, high: _clamp(b, x, None, high),
    _aten.pow.Tensor_Scalar: _power,
    _aten.pow.Tensor_Tensor: _raised,
    _aten.pow.Scalar: _raised,
    _aten.exp2: lambda b, x: _exp(b, _mul(b, x, math.log(2))),
    _aten.log2: lambda b, x: _mul(b, _log(b, x), 1 / math.log(2)),
    _aten.log10: lambda b, x: _mul(b, _log(b, x), 1 / math.log(10)),
    _aten.sin: _Numbers(Op.SIN),
    _aten.cos: _Numbers(Op.COS),
    _aten.tan: lambda b, x: _div(b, b.apply(Op.SIN, x), b.apply(Op.COS, x)),
    _aten.hypot: _hypot,
    _aten.hardsigmoid_backward: _hardsigmoid_backward,
    _aten.hardshrink_backward: _hardshrink_backward,
    _aten.softshrink_backward: _hardshrink_backward,
    _aten.sinh: _sinh,
    _aten.atan: _atan,
    _aten.atan2: _atan2,
    _aten.asin: lambda b, x: _atan(b, _div(b, x, _across(b, x))),
    _aten.acos: lambda b, x: _mul(b, _atan(b, _sqrt(b, _div(b, _sub(b, 1.0, x), _add(b, x, 1.0)))), 2.0),
    _aten.asinh: _asinh,
    _aten.acosh: _acosh,
    _aten.atanh: _atanh,
    _aten.fmax: lambda b, x, y: _not_nan(b, Op.MAXIMUM, x, y),
    _aten.fmin: lambda b, x, y: _not_nan(b, Op.MINIMUM, x, y),
    _aten.copysign: _copysign,
    _aten.signbit: _behind,
    _aten.cosh: _cosh,
    _aten.erf: _Numbers(Op.ERF),
    _aten.gelu: _gelu,
    _aten.floor: _Numbers(Op.FLOOR),
    _aten.ceil: lambda b, x: -b.apply(Op.FLOOR, -x),
    _aten.trunc: truncated,
    _aten.round: _round,
    _aten.isnan: lambda b, x: b.apply(Op.NE, x, x),
    _aten.isinf: lambda b, x: _equal(b, b.apply(Op.ABS, x), math.inf),
    _aten.sqrt: _Numbers(Op.SQRT),
    _aten.rsqrt: _rsqrt,
    _aten.reciprocal: _reciprocal,
    _aten.sign: _sign,
    _aten.sgn: _sign,
    _aten.where: where,
    _aten.masked_fill: _masked_fill,
    _aten.lt: _Numbers(Op.LT),
    _aten.le: _Numbers(Op.LE),
    _aten.gt: _above,
    _aten.ge: _Numbers(Op.GE),
    _aten.eq: _equal,
    _aten.ne: _Numbers(Op.NE),
    _aten.logical_and: _Truths(Op.AND),
    _aten.logical_or: _Truths(Op.OR),
    _aten.logical_not: _Truths(Op.NOT),
    _aten.logical_xor: lambda b, x, y: b.apply(Op.NE, _value(b, as_bool(b, x)), _value(b, as_bool(b, y))),
    _aten.bitwise_xor: lambda b, x, y: b.apply(Op.NE, _value(b, as_bool(b, x)), _value(b, as_bool(b, y))),
    _aten.bitwise_and: _Truths(Op.AND),
    _aten.bitwise_or: _Truths(Op.OR),
    _aten.bitwise_not: _Truths(Op.NOT),
    _aten.log_sigmoid_forward: _log_sigmoid,
    _aten.log_sigmoid_backward: _log_sigmoid_backward,
    _aten.sigmoid_backward: _sigmoid_backward,
    _aten.tanh_backward: _tanh_backward,
    _aten.threshold_backward: _threshold_backward,
}
