"""What PyTorch's pointwise operations are in the loop IR, and which of its operations are not taken apart for it."""

from __future__ import annotations

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
    _aten.div: _div,
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
    _aten.bitwise_and: _Truths(Op.AND),
    _aten.bitwise_or: _Truths(Op.OR),
    _aten.bitwise_not: _Truths(Op.NOT),
    _aten.log_sigmoid_forward: _log_sigmoid,
    _aten.log_sigmoid_backward: _log_sigmoid_backward,
    _aten.sigmoid_backward: _sigmoid_backward,
    _aten.tanh_backward: _tanh_backward,
    _aten.threshold_backward: _threshold_backward,
}
