"""Cells as programs of the loop IR, and the same cells as plain numpy: one row at a time, from the published equations.

A cell here is the part inside the time loop: x is the input after its own matrix.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import numpy as np

from recurra.compiler.build import Builder, Value
from recurra.compiler.ir import Op, Program
from recurra.compiler.operands import Operands


def gates(z: Value, count: int) -> list[Value]:
    H = z.width // count
    return [z[k * H : (k + 1) * H] for k in range(count)]


def norm(b: Builder, x: Value) -> Value:
    centred = x - b.mean(x)
    return centred / b.sqrt(b.mean(centred * centred) + 1e-5)


def lstm(H: int) -> Program:
    b = Builder()
    h, c, x, w = b.carry(H), b.carry(H), b.input(4 * H), b.matrix(4 * H, H)
    i, f, g, o = gates(x + b.matmul(h, w, transposed=True), 4)
    c = b.sigmoid(f) * c + b.sigmoid(i) * b.tanh(g)
    h = b.sigmoid(o) * b.tanh(c)
    return b.finish([h], [h, c])


def peephole_lstm(H: int) -> Program:
    """With coupled gates, a context row in the candidate, and its gates kept."""
    b = Builder()
    h, c, x, w = b.carry(H), b.carry(H), b.input(3 * H), b.matrix(H, 3 * H)
    context, peep_f, peep_o = b.row(H), b.vector(H), b.vector(H)
    f, g, o = gates(x + b.matmul(h, w), 3)
    f = b.sigmoid(f + peep_f * c)
    c = f * c + (1.0 - f) * b.tanh(g + context)
    o = b.sigmoid(o + peep_o * c)
    h = o * b.tanh(c)
    return b.finish([f, h, c, o], [h, c])


def gru_after(H: int) -> Program:
    b = Builder()
    h, x, w, bias = b.carry(H), b.input(3 * H), b.matrix(3 * H, H), b.vector(H)
    xr, xz, xn = gates(x, 3)
    hr, hz, hn = gates(b.matmul(h, w, transposed=True), 3)
    r, z = b.sigmoid(xr + hr), b.sigmoid(xz + hz)
    n = b.tanh(xn + r * (hn + bias))
    new = (1.0 - z) * n + z * h
    return b.finish([new], [new])


def gru_before(H: int) -> Program:
    b = Builder()
    h, x, w, u = b.carry(H), b.input(3 * H), b.matrix(H, 2 * H), b.matrix(H, H)
    r, z = gates(b.sigmoid(x[: 2 * H] + b.matmul(h, w)), 2)
    n = b.tanh(x[2 * H :] + b.matmul(r * h, u))
    new = n + z * (h - n)
    return b.finish([new], [new])


def layer_norm_lstm(H: int) -> Program:
    b = Builder()
    h, c, x, w = b.carry(H), b.carry(H), b.input(4 * H), b.matrix(4 * H, H)
    scale, scale_c, bias_c = b.vector(4 * H), b.vector(H), b.vector(H)
    i, f, g, o = gates(x + scale * norm(b, b.matmul(h, w, transposed=True)), 4)
    c = b.sigmoid(f) * c + b.sigmoid(i) * b.tanh(g)
    h = b.sigmoid(o) * b.tanh(scale_c * norm(b, c) + bias_c)
    return b.finish([h], [h, c])


def exponential_gates(H: int) -> Program:
    """sLSTM: exponential gates, a normaliser and a running maximum."""
    b = Builder()
    h, c, n, m = (b.carry(H) for _ in range(4))
    x, w = b.input(4 * H), b.matrix(H, 4 * H)
    i, f, z, o = gates(x + b.matmul(h, w), 4)
    f = b.log_sigmoid(f)
    top = b.apply(Op.MAXIMUM, f + m, i)
    keep, add = b.exp(f + m - top), b.exp(i - top)
    c = keep * c + add * b.tanh(z)
    n = keep * n + add
    h = b.sigmoid(o) * c / n
    return b.finish([h, top], [h, c, n, top])


def projected(H: int) -> Program:
    """Carries of different sizes and chained products: h (B, P) is a product of a gated c (B, H)."""
    P = max(1, H // 2 - 1)
    b = Builder()
    h, c, x = b.carry(P), b.carry(H), b.input(4 * H)
    w, down = b.matrix(4 * H, P), b.matrix(P, H)
    i, f, g, o = gates(x + b.matmul(h, w, transposed=True), 4)
    c = b.sigmoid(f) * c + b.sigmoid(i) * b.tanh(g)
    h = b.matmul(b.sigmoid(o) * b.tanh(c), down, transposed=True)
    return b.finish([h], [h, c])


def attentive(H: int) -> Program:
    """Softmax over the features, joins, five products of three sources, and what is the same for all features."""
    b = Builder()
    h, x, score = b.carry(H), b.input(H + 1), b.row(1)
    u, v, w, s = b.matrix(H, 5 * H), b.matrix(H, H), b.matrix(2 * H + 1, H), b.matrix(H, 1)
    five = gates(b.matmul(h, u), 5)
    p = five[0] + five[1] * b.tanh(five[2]) - five[3] * b.sigmoid(five[4])
    e = b.exp(p - b.max(p))
    soft = e / b.sum(e)
    joined = b.concat([soft, x])
    fresh = b.tanh(b.matmul(joined, w) + b.matmul(h, v))
    gate = b.sigmoid(b.matmul(fresh, s) + score)
    chosen = b.apply(Op.WHERE, fresh > h, fresh * gate, b.clamp(h, -0.5, 0.5))
    return b.finish([joined, gate, chosen], [chosen])


def lstm_backward(H: int) -> Program:
    """The vector-Jacobian product of an LSTM's step: carries dh and dc, output the gradient before the gates."""
    b = Builder()
    dh, dc = b.carry(H), b.carry(H)
    kept, old_c, c, dy, w = b.input(4 * H), b.input(H), b.input(H), b.input(H), b.matrix(4 * H, H)
    i, f, g, o = gates(kept, 4)
    dh = dh + dy
    t = b.tanh(c)
    dc = dc + dh * o * (1.0 - t * t)
    before = b.concat(
        [dc * g * i * (1.0 - i), dc * old_c * f * (1.0 - f), dc * i * (1.0 - g * g), dh * t * o * (1.0 - o)]
    )
    return b.finish([before], [b.matmul(before, w), dc * f])


def matrix_memory(H: int) -> Program:
    """A memory of two heads of five vectors; sums and maxima along them, across them, of all of them."""
    heads, rows = 2, 5
    wide, tall, size = heads * H, heads * rows, heads * rows * H
    b = Builder()
    m, k, v, rate = b.carry(size), b.input(wide), b.input(tall), b.input(heads)
    keys = b.broadcast(b.tanh(k), size, H)
    error = v - b.sum(m * keys, tall)
    m = 0.7 * m + b.broadcast(b.sigmoid(rate), size) * b.broadcast(error, size) * keys / H
    read = b.sum(m * b.broadcast(v, size), wide, H)
    top, all_, one = b.max(m, wide, H), b.sum(m * m, heads), b.max(m)
    back = b.apply(Op.WHERE, b.broadcast(top, size, H) > m, m, one)
    return b.finish([read, top, all_, one, b.sum(back, tall), b.max(back, heads), m], [m])


PROGRAMS = {
    make.__name__: make
    for make in (
        lstm,
        peephole_lstm,
        gru_after,
        gru_before,
        layer_norm_lstm,
        exponential_gates,
        projected,
        attentive,
        lstm_backward,
        matrix_memory,
    )
}


def random_operands(
    program: Program,
    T: int,
    B: int,
    seed: int = 0,
    *,
    lengths: bool = False,
    resets: bool = False,
    reverse: bool = False,
) -> Operands:
    """float64 operands of everyday size; what lies beyond a row's length is NaN."""
    random = np.random.default_rng(seed)
    inputs = [random.normal(size=(T, B, width)) for width in program.inputs]
    counts = random.integers(0, T + 1, B) if lengths else None
    if counts is not None:
        for array in inputs:
            array[np.arange(T)[:, None] >= counts] = np.nan
    return Operands(
        T=T,
        B=B,
        inputs=inputs,
        rows=[random.normal(size=(B, width)) for width in program.rows],
        vectors=[random.normal(size=width) for width in program.vectors],
        matrices=[random.normal(size=shape) / np.sqrt(max(shape)) for shape in program.matrices],
        state=[0.1 + random.random((B, width)) for width in program.carries],
        fresh=[0.1 + random.random((B, width)) for width in program.carries] if resets else None,
        lengths=counts,
        resets=random.random((T, B)) < 0.3 if resets else None,
        reverse=reverse,
    )


# Plain numpy. One row: x is (D,), state a list of (D,).


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def plain_lstm(x, state, matrices, vectors):
    h, c = state
    i, f, g, o = np.split(x + matrices[0] @ h, 4)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(c)
    return h, [h, c]


def plain_gru_after(x, state, matrices, vectors):
    (h,) = state
    xr, xz, xn = np.split(x, 3)
    hr, hz, hn = np.split(matrices[0] @ h, 3)
    r, z = _sigmoid(xr + hr), _sigmoid(xz + hz)
    h = (1 - z) * np.tanh(xn + r * (hn + vectors[0])) + z * h
    return h, [h]


def plain_gru_before(x, state, matrices, vectors):
    (h,) = state
    xr, xz, xn = np.split(x, 3)
    hr, hz = np.split(h @ matrices[0], 2)
    r, z = _sigmoid(xr + hr), _sigmoid(xz + hz)
    h = (1 - z) * np.tanh(xn + (r * h) @ matrices[1]) + z * h
    return h, [h]


def plain_layer_norm_lstm(x, state, matrices, vectors):
    h, c = state
    i, f, g, o = np.split(x + vectors[0] * _norm(matrices[0] @ h), 4)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(vectors[1] * _norm(c) + vectors[2])
    return h, [h, c]


def plain_exponential_gates(x, state, matrices, vectors):
    h, c, n, m = state
    i, f, z, o = np.split(x + h @ matrices[0], 4)
    # Without the running maximum: what it stands for cancels. Only n and c carry its scale.
    f = np.log(_sigmoid(f))
    top = np.maximum(f + m, i)
    c = (np.exp(f) * c * np.exp(m) + np.exp(i) * np.tanh(z)) / np.exp(top)
    n = (np.exp(f) * n * np.exp(m) + np.exp(i)) / np.exp(top)
    h = _sigmoid(o) * c / n
    return h, [h, c, n, top]


def plain_projected(x, state, matrices, vectors):
    h, c = state
    i, f, g, o = np.split(x + matrices[0] @ h, 4)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = matrices[1] @ (_sigmoid(o) * np.tanh(c))
    return h, [h, c]


PLAIN = {
    "lstm": plain_lstm,
    "gru_after": plain_gru_after,
    "gru_before": plain_gru_before,
    "layer_norm_lstm": plain_layer_norm_lstm,
    "exponential_gates": plain_exponential_gates,
    "projected": plain_projected,
}


def plain_run(step, operands: Operands, width: int):
    """Row by row: only a row's own steps, in their order, from its own starts."""
    y = np.zeros((operands.T, operands.B, width))
    ends = [leaf.copy() for leaf in operands.state]
    for row in range(operands.B):
        state = [leaf[row] for leaf in operands.state]
        own = list(range(operands.T if operands.lengths is None else int(operands.lengths[row])))
        for t in own[::-1] if operands.reverse else own:
            if operands.resets is not None and operands.resets[t, row]:
                state = [leaf[row] for leaf in operands.fresh]
            y[t, row], state = step(operands.inputs[0][t, row], state, operands.matrices, operands.vectors)
        for end, leaf in zip(ends, state, strict=True):
            end[row] = leaf
    return y, ends
