"""RNN, LSTM and GRU as ONNX defines them, run by ONNX's own reference evaluator in float64.

Legend: T time, B batch, I input, H hidden, O output, D any feature.

Weights come gate by gate, ``{"i": Gate(...), "o": ..., ...}``, so that no order of gates is taken over from
the code under test. The evaluator ignores ``sequence_lens``: ``row_by_row`` runs each row alone instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_rnn import RNN_14

OPSET = 22


@dataclass(frozen=True)
class Gate:
    """What one gate has: W (H, I), R (H, H), the biases beside them (H,), its peephole (H,)."""

    W: np.ndarray
    R: np.ndarray
    Wb: np.ndarray
    Rb: np.ndarray
    P: np.ndarray


def random_gates(names: str, input_size: int, hidden_size: int, seed: int = 0) -> dict[str, Gate]:
    """A gate of normal numbers for each letter of ``names``."""
    rng = np.random.default_rng(seed)
    sizes = ((hidden_size, input_size), (hidden_size, hidden_size), *[(hidden_size,)] * 3)
    return {name: Gate(*(rng.standard_normal(size) for size in sizes)) for name in names}


class RNN(RNN_14):
    """The evaluator's RNN with the Relu that ONNX lists among its activations and the evaluator lacks."""

    op_domain = ""
    _schema = onnx.defs.get_schema("RNN", OPSET)

    def choose_act(self, name: str, alpha: float | None, beta: float | None) -> Callable:
        return (lambda x: np.maximum(x, 0.0)) if name == "Relu" else super().choose_act(name, alpha, beta)


def onnx_rnn(gates: dict[str, Gate], x, h, activation: str = "Tanh", reverse: bool = False) -> tuple:
    """One gate, ``a``. x (T, B, I), h (B, H) -> Y (T, B, H), Y_h (B, H)."""
    return _run("RNN", gates, "a", x, (h,), reverse, activations=[activation])


def onnx_lstm(gates: dict[str, Gate], x, h, c, peepholes: bool = False, reverse: bool = False) -> tuple:
    """ONNX's order i o f c, peepholes i o f. x (T, B, I), h and c (B, H) -> Y (T, B, H), Y_h, Y_c (B, H)."""
    P = np.concatenate([gates[gate].P for gate in "iof"])[None] if peepholes else None
    return _run("LSTM", gates, "iofc", x, (h, c), reverse, P)


def onnx_gru(gates: dict[str, Gate], x, h, linear_before_reset: int, reverse: bool = False) -> tuple:
    """ONNX's order z r h. x (T, B, I), h (B, H) -> Y (T, B, H), Y_h (B, H)."""
    return _run("GRU", gates, "zrh", x, (h,), reverse, linear_before_reset=linear_before_reset)


def row_by_row(oracle: Callable[..., tuple], x, lengths: list[int], *states) -> tuple:
    """``oracle(x, *states)`` for rows of unequal length: each alone, cut to its length, then zeros in Y."""
    Y, finals = None, []
    for row, length in enumerate(lengths):
        own = [state[row : row + 1] for state in states]
        if length == 0:
            finals.append(own)
            continue
        y, *final = oracle(x[:length, row : row + 1], *own)
        Y = np.zeros((*x.shape[:2], y.shape[2])) if Y is None else Y
        Y[:length, row] = y[:, 0]
        finals.append(final)
    return Y, *(np.concatenate(rows) for rows in zip(*finals, strict=True))


def _run(op: str, gates: dict[str, Gate], order: str, x, states: tuple, reverse: bool, P=None, **attributes) -> tuple:
    W = np.concatenate([gates[gate].W for gate in order])[None]
    R = np.concatenate([gates[gate].R for gate in order])[None]
    B = np.concatenate([gates[gate].Wb for gate in order] + [gates[gate].Rb for gate in order])[None]
    feeds = {"X": x, "W": W, "R": R, "B": B}
    feeds |= {name: state[None] for name, state in zip(("initial_h", "initial_c"), states, strict=False)}
    if P is not None:
        feeds["P"] = P
    slots = ["X", "W", "R", "B", "", "initial_h", "initial_c", "P"][: 5 + len(states) + (P is not None)]
    outputs = {"Y": 4, "Y_h": 3} | ({"Y_c": 3} if op == "LSTM" else {})
    direction = "reverse" if reverse else "forward"
    node = helper.make_node(op, slots, list(outputs), hidden_size=R.shape[2], direction=direction, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [None] * axes) for name, axes in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    onnx.checker.check_model(model)
    Y, *finals = ReferenceEvaluator(model, new_ops=[RNN]).run(None, feeds)
    return Y[:, 0], *(final[0] for final in finals)
