"""Programs run by numpy, node by node: what each operation means, and the oracle of every backend.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from recurra.compiler.ir import Node, Op, Program
from recurra.compiler.operands import Array, Operands


def interpret(program: Program, operands: Operands) -> tuple[list[Array], list[Array]]:
    """The outputs (T, B, D) each, zero beyond a row's length, and each carry (B, D) after the row's last step."""
    T, B = operands.T, operands.B
    dtype = next((each.dtype for each in (*operands.state, *operands.inputs)), np.dtype(np.float64))
    outputs = [np.zeros((T, B, program.nodes[place].width), dtype) for place in program.outputs]
    state = [leaf.copy() for leaf in operands.state]
    for t in reversed(range(T)) if operands.reverse else range(T):
        active = np.ones(B, bool) if operands.lengths is None else t < operands.lengths
        if operands.resets is not None and operands.fresh is not None:
            start = (operands.resets[t] & active)[:, None]
            state = [np.where(start, fresh, old) for fresh, old in zip(operands.fresh, state, strict=True)]
        values = _step(program, operands, state, t)
        for kept, place in zip(outputs, program.outputs, strict=True):
            kept[t] = np.where(active[:, None], values[place], 0)
        state = [np.where(active[:, None], values[n], old) for n, old in zip(program.new, state, strict=True)]
    return outputs, state


def _step(program: Program, operands: Operands, state: list[Array], t: int) -> list[Array]:
    values: list[Array] = []
    with np.errstate(all="ignore"):
        for node in program.nodes:
            values.append(_value(node, [values[arg] for arg in node.args], operands, state, t))
    return values


def _value(node: Node, args: list[Array], operands: Operands, state: list[Array], t: int) -> Array:
    B = operands.B
    dtype = next((each.dtype for each in (*operands.state, *operands.inputs)), np.dtype(np.float64))
    match node.op:
        case Op.CARRY:
            return state[node.index]
        case Op.INPUT:
            return np.asarray(operands.inputs[node.index][t])
        case Op.ROW:
            return operands.rows[node.index]
        case Op.VECTOR:
            return np.broadcast_to(operands.vectors[node.index], (B, node.width))
        case Op.CONST:
            return np.full((B, 1), node.number, dtype)
        case Op.MATMUL:
            matrix = operands.matrices[node.index]
            matrix = matrix.T if node.transposed else matrix
            rows = matrix[node.top : node.top + args[0].shape[1]]
            return np.asarray(args[0] @ rows[:, node.start : node.start + node.width])
        case Op.SLICE:
            return np.asarray(args[0][:, node.start : node.start + node.width])
        case Op.GATHER:
            return np.asarray(args[0][:, list(node.features)])
        case Op.CONCAT:
            return np.asarray(np.concatenate(args, axis=1))
        case Op.BROADCAST:
            outer, many = args[0].shape[1] // node.inner, node.width // args[0].shape[1]
            return np.asarray(args[0].reshape(B, outer, 1, node.inner).repeat(many, axis=2).reshape(B, node.width))
        case Op.SUM | Op.MAX:
            outer, many = node.width // node.inner, args[0].shape[1] // node.width
            apart = args[0].reshape(B, outer, many, node.inner)
            found = apart.sum(axis=2) if node.op is Op.SUM else apart.max(axis=2)
            return np.asarray(found.reshape(B, node.width))
        case Op.POW:
            return np.asarray(np.power(args[0], np.asarray(node.number, dtype)))
        case _:
            return np.asarray(FUNCTIONS[node.op](*args))


def _sigmoid(x: Array) -> Array:
    tail = np.exp(-np.abs(x))
    return np.where(x < 0, tail / (1 + tail), 1 / (1 + tail))


def _log_sigmoid(x: Array) -> Array:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[float])(x), np.asarray(x).dtype)


FUNCTIONS: dict[Op, Callable[..., Array]] = {
    Op.ADD: np.add,
    Op.SUB: np.subtract,
    Op.MUL: np.multiply,
    Op.DIV: np.divide,
    Op.MAXIMUM: np.maximum,
    Op.MINIMUM: np.minimum,
    Op.NEG: np.negative,
    Op.ABS: np.abs,
    Op.SQRT: np.sqrt,
    Op.EXP: np.exp,
    Op.LOG: np.log,
    Op.TANH: np.tanh,
    Op.SIGMOID: _sigmoid,
    Op.LOG_SIGMOID: _log_sigmoid,
    Op.SIN: np.sin,
    Op.COS: np.cos,
    Op.ATAN: np.arctan,
    Op.ERF: _erf,
    Op.ROUND: np.round,
    Op.FLOOR: np.floor,
    Op.LT: np.less,
    Op.LE: np.less_equal,
    Op.GT: np.greater,
    Op.GE: np.greater_equal,
    Op.EQ: np.equal,
    Op.NE: np.not_equal,
    Op.AND: np.logical_and,
    Op.OR: np.logical_or,
    Op.NOT: np.logical_not,
    Op.WHERE: np.where,
}
