"""The side of ONNX Runtime: one step of its LSTM or GRU operator, the state fed back from outside.

Runs in the virtual environment of ``make peers``; imports nothing of recurra.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from clock import one_by_one
from lines import serve

# ONNX's order of the gates, in PyTorch's: i o f c of i f g o, and z r h of r z n.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def build(kind: str, arrays: dict[str, Any], threads: int) -> Any:
    """A session of one step: X (1, 1, I) and the state (1, 1, H) to the new state."""
    H = arrays["weight_hh"].shape[1]

    def gates(name: str) -> Any:
        blocks = np.split(arrays[name], len(ORDER[kind]))
        return np.concatenate([blocks[k] for k in ORDER[kind]])[None]

    second = np.zeros_like(arrays["bias"])
    if kind == "GRU":
        second[2 * H :] = arrays["bias_hn"]
    bias = np.concatenate([gates("bias"), second[None]], axis=1)
    constants = {"W": gates("weight_ih"), "R": gates("weight_hh"), "B": bias}
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    options = {"linear_before_reset": 1} if kind == "GRU" else {}
    inputs = ["X", "W", "R", "B", "", *states]
    node = helper.make_node(kind, inputs, ["", *(f"{s}_new" for s in states)], hidden_size=H, **options)
    numbers = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "step",
        [helper.make_tensor_value_info("X", numbers, [1, 1, arrays["weight_ih"].shape[1]])]
        + [helper.make_tensor_value_info(s, numbers, [1, 1, H]) for s in states],
        [helper.make_tensor_value_info(f"{s}_new", numbers, [1, 1, H]) for s in states],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    with np.load(request["given"], allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    rows = list(arrays.pop("rows")[:, None])
    session = build(request["cell"], arrays, request["threads"])
    names = ["h", "c"] if request["cell"] == "LSTM" else ["h"]
    H = arrays["weight_hh"].shape[1]
    state = [np.zeros((1, 1, H), dtype=np.float32) for _ in names]

    def push(row: Any) -> Any:
        nonlocal state
        state = session.run(None, {"X": row, **dict(zip(names, state, strict=True))})
        return state[0]

    np.savez(request["made"], y=np.stack([push(row)[0] for row in rows]))
    return one_by_one(push, rows, request["steps"], request["seconds"])


if __name__ == "__main__":
    serve(answer)
