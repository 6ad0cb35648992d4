"""The oracle: every cell's published equations a second time, for one row, and the plainest unrolling.

Nothing of recurra is called here. A row's state is a tensor or a tuple of tensors without the batch axis;
``p`` holds the parameters by name. Exponential gates have no stabiliser, normalisation is spelt out.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Plain(NamedTuple):
    """``first(p)`` is a row's state before any step; ``step(p, state, x, context)`` gives (state, y)."""

    first: Callable[..., Any]
    step: Callable[..., Any]


def row(state, b):
    """Row b of a batch of states."""
    return state[b] if isinstance(state, torch.Tensor) else tuple(row(part, b) for part in state)


def together(rows):
    """The batch that a list of rows' states makes."""
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows)
    return tuple(together(list(parts)) for parts in zip(*rows, strict=True))


def nobody(state):
    """A batch of no rows, for states such as this."""
    return state.new_zeros(0, *state.shape) if isinstance(state, torch.Tensor) else tuple(map(nobody, state))


def unroll(cell, p, x, output_size, *, state=None, lengths=None, resets=None, reverse=False, context=None):
    """y (T, B, O) and the final state: row by row, step by step."""
    T, B, _ = x.shape
    ys, finals = [], []
    for b in range(B):
        h = cell.first(p) if state is None else row(state, b)
        steps = list(range(T if lengths is None else int(lengths[b])))
        outputs = [x.new_zeros(output_size) for _ in range(T)]
        for t in reversed(steps) if reverse else steps:
            if resets is not None and resets[t, b]:
                h = cell.first(p)
            h, outputs[t] = cell.step(p, h, x[t, b], None if context is None else context[b])
        ys.append(torch.stack(outputs))
        finals.append(h)
    if B == 0:
        return x.new_zeros(T, 0, output_size), nobody(cell.first(p))
    return torch.stack(ys, dim=1), together(finals)


def sigmoid(a):
    return 1 / (1 + torch.exp(-a))


def tanh(a):
    return (torch.exp(a) - torch.exp(-a)) / (torch.exp(a) + torch.exp(-a))


def relu(a):
    return a * (a > 0)


def part(tensor, k, size):
    """Block number k of ``size`` rows."""
    return tensor[k * size : (k + 1) * size]


def gate(p, k, H, x, h):
    """Block k of W_ih x + W_hh h + b."""
    return part(p["weight_ih"], k, H) @ x + part(p["weight_hh"], k, H) @ h + part(p["bias"], k, H)


def zeros(p, *sizes):
    return next(iter(p.values())).new_zeros(sizes)


def normalise(a):
    mean = a.sum() / a.numel()
    variance = ((a - mean) ** 2).sum() / a.numel()
    return (a - mean) / torch.sqrt(variance + 1e-5)


def vanilla(activation):
    def step(p, h, x, _):
        H = h.numel()
        h = activation(gate(p, 0, H, x, h))
        return h, h

    return Plain(lambda p: zeros(p, p["bias"].numel()), step)


def lstm_first(gates):
    return lambda p: (zeros(p, p["weight_hh"].shape[1]), zeros(p, p["bias"].numel() // gates))


def lstm_step(p, state, x, _):
    h, c = state
    H = c.numel()
    i, f, g, o = (gate(p, k, H, x, h) for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(c)
    return (h, c), h


def peephole_step(p, state, x, _):
    h, c = state
    H = c.numel()
    i = sigmoid(gate(p, 0, H, x, h) + p["weight_ci"] * c)
    f = sigmoid(gate(p, 1, H, x, h) + p["weight_cf"] * c)
    new = f * c + i * tanh(gate(p, 2, H, x, h))
    o = sigmoid(gate(p, 3, H, x, h) + p["weight_co"] * new)
    h = o * tanh(new)
    return (h, new), h


def coupled_step(p, state, x, _):
    h, c = state
    H = c.numel()
    f = sigmoid(gate(p, 0, H, x, h))
    c = f * c + (1 - f) * tanh(gate(p, 1, H, x, h))
    h = sigmoid(gate(p, 2, H, x, h)) * tanh(c)
    return (h, c), h


def projected_step(p, state, x, context):
    (_, c), m = lstm_step(p, state, x, context)
    h = p["weight_hr"] @ m
    return (h, c), h


def layer_norm_lstm_step(p, state, x, _):
    h, c = state
    H = c.numel()
    z = p["scale_x"] * normalise(p["weight_ih"] @ x) + p["scale_h"] * normalise(p["weight_hh"] @ h) + p["bias"]
    i, f, g, o = (part(z, k, H) for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(p["scale_c"] * normalise(c) + p["bias_c"])
    return (h, c), h


def gru_step(p, h, x, _):
    H = h.numel()
    r = sigmoid(gate(p, 0, H, x, h))
    z = sigmoid(gate(p, 1, H, x, h))
    from_h = part(p["weight_hh"], 2, H) @ h + p["bias_hn"]
    n = tanh(part(p["weight_ih"], 2, H) @ x + part(p["bias"], 2, H) + r * from_h)
    h = n - z * n + z * h
    return h, h


def gru_reset_before_step(p, h, x, _):
    H = h.numel()
    r = sigmoid(gate(p, 0, H, x, h))
    z = sigmoid(gate(p, 1, H, x, h))
    n = tanh(gate(p, 2, H, x, r * h))
    h = n - z * n + z * h
    return h, h


def highway_step(p, h, x, _):
    H = h.numel()
    for layer in range(p["bias"].shape[0]):
        both = p["weight_hh"][layer] @ h + p["bias"][layer]
        if layer == 0:
            both = both + p["weight_ih"] @ x
        candidate, transform = tanh(part(both, 0, H)), sigmoid(part(both, 1, H))
        h = transform * candidate + (1 - transform) * h
    return h, h


def min_gru_step(p, h, x, _):
    H = h.numel()
    z = sigmoid(part(p["weight_ih"], 0, H) @ x + part(p["bias"], 0, H))
    candidate = part(p["weight_ih"], 1, H) @ x + part(p["bias"], 1, H)
    h = (1 - z) * h + z * candidate
    return h, h


def min_lstm_step(p, h, x, _):
    H = h.numel()
    f, i, candidate = (part(p["weight_ih"], k, H) @ x + part(p["bias"], k, H) for k in range(3))
    f, i = sigmoid(f), sigmoid(i)
    h = f / (f + i) * h + i / (f + i) * candidate
    return h, h


def slstm_first(p):
    H = p["bias"].numel() // 4
    return zeros(p, H), zeros(p, H), zeros(p, H), zeros(p, H) - 1e4


def slstm_step(p, state, x, _):
    h, c, n, m = state
    heads, _, D = p["weight_hh"].shape
    H = heads * D

    def pre(k):
        from_h = [part(p["weight_hh"][head], k, D) @ part(h, head, D) for head in range(heads)]
        return part(p["weight_ih"], k, H) @ x + torch.cat(from_h) + part(p["bias"], k, H)

    i, f, g, o = torch.exp(pre(0)), sigmoid(pre(1)), tanh(pre(2)), sigmoid(pre(3))
    top = torch.maximum(torch.log(f) + m, pre(0))
    # The state is kept in units of exp(m): undo that, step without any stabiliser, and do it again.
    c, n = f * torch.exp(m) * c + i * g, f * torch.exp(m) * n + i
    h = o * c / n
    return (h, c * torch.exp(-top), n * torch.exp(-top), top), h


def mlstm_first(p):
    heads = p["bias_gates"].numel() // 2
    D = p["bias"].numel() // 4 // heads
    return zeros(p, heads, D, D), zeros(p, heads, D), zeros(p, heads)


def mlstm_step(p, state, x, _):
    C, n, m = state
    heads, D = n.shape
    z = p["weight_ih"] @ x + p["bias"]
    gates = p["weight_gates"] @ x + p["bias_gates"]
    new, hs = [], []
    for k in range(heads):
        query, key, value, out = (part(part(z, block, heads * D), k, D) for block in range(4))
        key = key / D**0.5
        i, f = torch.exp(gates[k]), sigmoid(gates[heads + k])
        memory = f * torch.exp(m[k]) * C[k] + i * torch.outer(value, key)
        total = f * torch.exp(m[k]) * n[k] + i * key
        found = (memory @ query) / torch.maximum((total @ query).abs(), torch.ones_like(gates[k]))
        hs.append(sigmoid(out) * found)
        top = torch.maximum(torch.log(f) + m[k], gates[k])
        new.append((memory * torch.exp(-top), total * torch.exp(-top), top))
    return together(new), torch.cat(hs)


def inside(p, prefix):
    """The parameters below a prefix."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def around(inner):
    """A wrapper that adds nothing, as those that regularise do where all shares are zero."""
    return Plain(
        lambda p: inner.first(inside(p, "cell.")),
        lambda p, state, x, context: inner.step(inside(p, "cell."), state, x, context),
    )


def stack(*cells):
    def first(p):
        return tuple(cell.first(inside(p, f"cells.{k}.")) for k, cell in enumerate(cells))

    def step(p, state, x, context):
        new = []
        for k, cell in enumerate(cells):
            after, x = cell.step(inside(p, f"cells.{k}."), state[k], x, context)
            new.append(after)
        return tuple(new), x

    return Plain(first, step)


def residual(inner):
    def step(p, state, x, context):
        state, y = around(inner).step(p, state, x, context)
        return state, x + y

    return Plain(around(inner).first, step)


def readout(inner):
    def step(p, state, x, context):
        state, y = around(inner).step(p, state, x, context)
        return state, p["linear.weight"] @ y + p["linear.bias"]

    return Plain(around(inner).first, step)


def learned_first_state(inner):
    def first(p):
        h, _ = around(inner).first(p)
        return p["first"][: h.numel()], p["first"][h.numel() :]

    return Plain(first, around(inner).step)


def layer_norm(inner):
    def step(p, state, x, context):
        return around(inner).step(p, state, p["scale"] * normalise(x) + p["bias"], context)

    return Plain(around(inner).first, step)


def expected_zoneout(inner, *shares):
    """Zoneout in evaluation, around a cell whose output is the first leaf of its state."""

    def step(p, state, x, context):
        new, _ = around(inner).step(p, state, x, context)
        mixed = tuple(s * old + (1 - s) * fresh for s, old, fresh in zip(shares, state, new, strict=True))
        return mixed, mixed[0]

    return Plain(around(inner).first, step)


lstm = Plain(lstm_first(4), lstm_step)
peephole_lstm = Plain(lstm_first(4), peephole_step)
coupled_lstm = Plain(lstm_first(3), coupled_step)
projected_lstm = Plain(lstm_first(4), projected_step)
layer_norm_lstm = Plain(lstm_first(4), layer_norm_lstm_step)
gru = Plain(lambda p: zeros(p, p["bias_hn"].numel()), gru_step)
gru_reset_before = Plain(lambda p: zeros(p, p["bias"].numel() // 3), gru_reset_before_step)
highway = Plain(lambda p: zeros(p, p["weight_hh"].shape[2]), highway_step)
min_gru = Plain(lambda p: zeros(p, p["bias"].numel() // 2), min_gru_step)
min_lstm = Plain(lambda p: zeros(p, p["bias"].numel() // 3), min_lstm_step)
slstm = Plain(slstm_first, slstm_step)
mlstm = Plain(mlstm_first, mlstm_step)
