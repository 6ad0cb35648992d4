"""The side of JAX: the same cells in a scan, compiled whole, each training step timed here.

Runs in the virtual environment of ``make peers``; imports nothing of recurra.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

from clock import repeated
from lines import serve

Weights = dict[str, Any]


def normalise(v: Any) -> Any:
    centred = v - v.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)


def vanilla(w: Weights, h: Any, x: Any) -> tuple[Any, Any]:
    h = jnp.tanh(x @ w["weight_ih"].T + h @ w["weight_hh"].T + w["bias"])
    return h, h


def gru(w: Weights, h: Any, x: Any) -> tuple[Any, Any]:
    xr, xz, xn = jnp.split(x @ w["weight_ih"].T + w["bias"], 3, 1)
    hr, hz, hn = jnp.split(h @ w["weight_hh"].T, 3, 1)
    z = sigmoid(xz + hz)
    n = jnp.tanh(xn + sigmoid(xr + hr) * (hn + w["bias_hn"]))
    h = (1 - z) * n + z * h
    return h, h


def lstm(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
    h, c = state
    i, f, g, o = jnp.split(x @ w["weight_ih"].T + h @ w["weight_hh"].T + w["bias"], 4, 1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gated(w: Weights, h: Any, x: Any) -> tuple[Any, Any]:
    xr, xz, xn = jnp.split(x @ w["weight_ih"].T + w["bias"], 3, 1)
    hr, hz = jnp.split(h @ w["weight_hh"].T, 2, 1)
    kept = sigmoid(xr + hr) * h
    h = h + sigmoid(xz + hz) * (jnp.tanh(xn + kept @ w["weight_hn"].T) - kept)
    return h, h


def normed(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
    h, c = state
    from_h = normalise(h @ w["weight_hh"].T) * w["scale_h"]
    i, f, g, o = jnp.split(x @ w["weight_ih"].T + from_h + w["bias"], 4, 1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(normalise(c) * w["scale_c"])
    return (h, c), h


STEPS = {"vanilla": vanilla, "GRU": gru, "LSTM": lstm, "own gated": gated, "own normed": normed}


class Side:
    """Answers two questions: take this task's first step, and time so many more."""

    def __init__(self) -> None:
        self.call: Callable[[], Any] = lambda: None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if "count" in request:
            return {"seconds": repeated(self.call)(request["count"])}
        jax.clear_caches()
        step = STEPS[request["kind"]]
        with np.load(request["given"], allow_pickle=False) as found:
            arrays = {name: jnp.asarray(found[name]) for name in found.files}
        x, r = arrays.pop("x"), arrays.pop("r")

        def forward(weights: Weights, x: Any) -> Any:
            for k in range(request["layers"]):
                w = {name[2:]: weight for name, weight in weights.items() if name.startswith(f"{k}.")}
                zeros = jnp.zeros((x.shape[1], w["weight_hh"].shape[1]))
                begin = (zeros, zeros) if step in (lstm, normed) else zeros
                x = jax.lax.scan(lambda state, row, w=w: step(w, state, row), begin, x)[1]
            return x

        @jax.jit
        def train(weights: Weights, x: Any, r: Any) -> Any:
            y, back = jax.vjp(forward, weights, x)
            return y, *back(r)

        self.call = lambda: jax.block_until_ready(train(arrays, x, r))
        y, gradients, into_x = self.call()
        np.savez(request["made"], y=y, x=into_x, **gradients)
        return {}


if __name__ == "__main__":
    serve(Side())
