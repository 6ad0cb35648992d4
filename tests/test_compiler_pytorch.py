"""The traced paths as a part of PyTorch: transforms, autocast, rules of requires_grad, copies, checkpoints, hooks.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from around import TRACED, B, H, I, T, close, make
from recurra import Recurrent, cells
from recurra.cell import Cell, leaves, map_state
from recurra.errors import BackendError

# PyTorch's own modules still use what PyTorch has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def x():
    return torch.randn(T, B, I, dtype=torch.float64)


# torch.func


def _functional(rnn, p, x):
    return torch.func.functional_call(rnn, p, (x,))[0].sin().sum()


TRANSFORMS = {
    "grad": lambda rnn, x: torch.func.grad(lambda z: rnn(z)[0].sin().sum())(x),
    "vjp": lambda rnn, x: torch.func.vjp(lambda z: rnn(z)[0].sin().sum(), x)[1](x.new_ones(()))[0],
    "jvp": lambda rnn, x: torch.func.jvp(lambda z: rnn(z)[0], (x,), (x,))[1],
    "vmap": lambda rnn, x: torch.func.vmap(lambda z: rnn(z)[0])(torch.stack([x, 2 * x])),
    "jacrev": lambda rnn, x: torch.func.jacrev(lambda z: rnn(z)[0][-1, 0])(x),
    "weights": lambda rnn, x: torch.func.grad(lambda p: _functional(rnn, p, x))(
        {name: parameter.detach() for name, parameter in rnn.named_parameters()}
    )["cell.weight_hh"],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_go_through_the_loop(name, x):
    run, rnn = TRANSFORMS[name], make()
    close(run(rnn, x), run(make("loop"), x))
    assert rnn.explain().ran == "loop"
    assert "torch.func." in rnn.explain().why


@pytest.mark.parametrize("backend", ["compiled", "hoisted"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_by_name_where_another_path_was_asked_for(name, backend, x):
    kind = {"vmap": "vmap", "jvp": "jvp"}.get(name, "grad")
    with pytest.raises(BackendError, match=rf"backend='{backend}' .*torch\.func\.{kind}.*use backend='loop' there"):
        TRANSFORMS[name](make(backend), x)


def test_functional_call_without_a_transform_stays_compiled(x):
    rnn, loop = make("compiled"), make("loop")
    weights = {name: (2 * parameter).detach().requires_grad_() for name, parameter in rnn.named_parameters()}
    got, expected = (torch.autograd.grad(_functional(each, weights, x), [*weights.values()]) for each in (rnn, loop))
    close(got, expected)


def test_forward_mode_goes_through_the_loop(x):
    tangents = []
    for rnn in (make(), make("loop")):
        with forward_ad.dual_level(), torch.no_grad():
            tangents.append(forward_ad.unpack_dual(rnn(forward_ad.make_dual(x, x))[0]).tangent)
    close(*tangents)
    with forward_ad.dual_level(), pytest.raises(BackendError, match="forward-mode"):
        make("compiled")(x)


@pytest.mark.filterwarnings("ignore")
def test_tracers_record_the_loop_and_no_call_of_native_code(x):
    rnn = make()
    traced = torch.jit.trace(rnn, (x,), check_trace=False)
    close(traced(2 * x)[0], rnn(2 * x)[0])
    close(make_fx(lambda z: rnn(z)[0])(x)(2 * x), rnn(2 * x)[0])
    rnn = make("compiled")
    with pytest.raises(BackendError, match=r"torch\.jit\.trace cannot see into"):
        torch.jit.trace(rnn, (x,))
    with pytest.raises(BackendError, match=r"torch\.fx cannot see into"):
        make_fx(lambda z: rnn(z)[0])(x)


class Labelled(torch.Tensor):
    """A tensor of a kind of its own."""


def test_tensors_of_another_kind_go_through_the_loop(x):
    rnn = make()
    close(rnn(x.as_subclass(Labelled))[0].as_subclass(torch.Tensor), rnn(x)[0])
    with pytest.raises(BackendError, match="tensors of the type Labelled"):
        make("compiled")(x.as_subclass(Labelled))


# Precision


def test_autocast_gives_what_the_loop_gives_and_compiled_refuses(x):
    results = []
    for backend in ("auto", "loop"):
        rnn = make(backend).float()
        with torch.autocast("cpu", torch.bfloat16):
            y, state = rnn(x.float())
        y.float().sum().backward()
        results.append([y, state.c, rnn.cell.weight_hh.grad])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendError, match=r"bfloat16.*use backend='hoisted'"):
        make("compiled").float()(x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_run_hoisted_and_compiled_refuses(dtype, x):
    rnn, loop = make().to(dtype), make("loop").to(dtype)
    torch.testing.assert_close(rnn(x.to(dtype))[0], loop(x.to(dtype))[0], rtol=2e-2, atol=2e-2)
    assert rnn.explain().ran == "hoisted"
    assert str(dtype) in rnn.explain().why
    with pytest.raises(BackendError, match=f"{dtype}.*use backend='hoisted'"):
        make("compiled").to(dtype)(x.to(dtype))


def test_a_module_may_change_its_precision(x):
    rnn = make("compiled")
    y = rnn(x)[0]
    close(rnn.float()(x.float())[0].double(), y, 1e-5)
    close(rnn.double()(x)[0], y, 1e-5)


# requires_grad


class Counting(Cell):
    """With a whole number in its state, a parameter that it does not use, and a leaf that no gradient reaches."""

    input_size, output_size = I, H

    def __init__(self, detached):
        super().__init__()
        self.inward, self.unused, self.detached = nn.Linear(I + H, H), nn.Parameter(torch.ones(3)), detached

    def initial_state(self, batch_size):
        return self.zeros(batch_size, H), torch.zeros(batch_size, dtype=torch.int64), self.zeros(batch_size, 2)

    def step(self, state, x, context=None):
        h, count, time = state
        h = torch.tanh(self.inward(torch.cat([h, x], dim=1)))
        return (h, count + 1, time + 0.5), h.detach() if self.detached else h


@pytest.mark.parametrize("backend", TRACED)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("wanted", ["nothing", "x", "state", "bias", "all"])
def test_gradients_are_required_and_given_exactly_where_the_loop_does(wanted, detached, backend, x):
    def look(backend):
        torch.manual_seed(2)
        rnn = Recurrent(Counting(detached), backend=backend).double()
        state = rnn.cell.initial_state(B)
        rnn.requires_grad_(wanted == "all")
        rnn.cell.inward.bias.requires_grad_(wanted in ("bias", "all"))
        state[0].requires_grad_(wanted in ("state", "all"))
        leaf = x.clone().requires_grad_(wanted in ("x", "all"))
        # No leaf of the graph.
        y, final = rnn(leaf * 1, state)
        results = [y, *leaves(final)]
        required = [result.requires_grad for result in results]
        ends = [t for t in (leaf, state[0], *rnn.parameters()) if t.requires_grad]
        total = sum(result.sin().sum() for result in results if result.requires_grad)
        found = torch.autograd.grad(total, ends, allow_unused=True) if any(required) else ()
        return required, [gradient is None for gradient in found], [g for g in found if g is not None]

    expected, got = look("loop"), look(backend)
    assert got[:2] == expected[:2]
    close(got[2], expected[2])


@pytest.mark.parametrize("backend", TRACED)
@pytest.mark.parametrize("cell", [cells.LSTM, cells.GRU, cells.Vanilla])
@pytest.mark.parametrize("result", ["y", "state"])
def test_a_gradient_is_none_where_it_is_none_in_the_loop(result, cell, backend, x):
    def look(backend):
        rnn = make(backend, cell)
        fresh = cells.LearnedInitialState(rnn.cell).double()
        rnn = Recurrent(fresh, backend=backend)
        state = map_state(lambda leaf: leaf.detach().clone().requires_grad_(), rnn.cell.initial_state(B))
        y, final = rnn(x, state)
        total = y.sum() if result == "y" else leaves(final)[-1].sum()
        found = torch.autograd.grad(total, [*leaves(state), *rnn.parameters()], allow_unused=True)
        return [None if gradient is None else gradient.abs().sum().item() for gradient in found]

    for one, other in zip(look(backend), look("loop"), strict=True):
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, abs=1e-10)


@pytest.mark.parametrize("backend", [*TRACED, "loop"])
def test_the_modes_of_autograd(backend, x):
    rnn = make(backend)
    with torch.no_grad():
        assert not rnn(x)[0].requires_grad
        with torch.enable_grad():
            assert rnn(x)[0].requires_grad
    with torch.inference_mode():
        y, state = rnn(x)
        born = x * 1
    assert y.is_inference()
    with torch.no_grad():
        close(rnn(born, state)[0], rnn(x, map_state(torch.clone, state))[0])
    # As every module of torch.nn does.
    for refused in (lambda: rnn(born), lambda: rnn(x, state), lambda: nn.LSTM(I, H).double()(born)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            refused()
    rnn.requires_grad_(False)
    assert not rnn(born, state)[0].requires_grad


# The graph of autograd


def gradient(rnn, x, run=None):
    leaf = x.clone().requires_grad_()
    (run or (lambda z: rnn(z)[0].sin()))(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("backend", ["compiled", "hoisted"])
def test_hooks_on_the_output_and_a_graph_that_is_kept(backend, x):
    rnn, seen = make(backend), []

    def twice(z):
        y = rnn(z)[0]
        y.register_hook(lambda g: (seen.append(g.shape), 2 * g)[1])
        y.sin().sum().backward(retain_graph=True)
        return y.sin()

    close(gradient(rnn, x, twice), 4 * gradient(make("loop"), x))
    assert seen == [(T, B, H)] * 2
    y = rnn(x)[0].sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_weights_that_change_before_the_backward_pass_are_noticed(x):
    rnn = make("compiled")
    y = rnn(x)[0].sum()
    with torch.no_grad():
        rnn.cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_anomaly_mode_names_the_operation(x):
    rnn = make("compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            y = rnn(x)[0]
            with pytest.raises(RuntimeError, match="'OverTimeBackward' returned nan values"):
                y.backward(torch.full_like(y, torch.inf))


@pytest.mark.parametrize("backend", ["compiled", "hoisted"])
def test_what_is_saved_may_be_moved_elsewhere(backend, x):
    # From the first call on, while the step is traced.
    expected = gradient(make("loop"), x)

    def elsewhere(z):
        with torch.autograd.graph.save_on_cpu():
            return make(backend)(z)[0].sin()

    def counted(z):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(1), t.clone())[1], lambda t: t):
            return make(backend)(z)[0].sin()

    seen = []
    close(gradient(None, x, elsewhere), expected)
    close(gradient(None, x, counted), expected)
    assert seen


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["compiled", "hoisted"])
def test_checkpointing(backend, reentrant, x):
    rnn = make(backend)

    def run(z):
        return checkpoint(lambda z: rnn(z)[0].sin(), z, use_reentrant=reentrant)

    close(gradient(rnn, x, run), gradient(make("loop"), x))


def test_checkpointing_draws_the_same_masks_again(x):
    torch.manual_seed(1)
    rnn = Recurrent(cells.Zoneout(cells.LSTM(I, H), 0.5), backend="compiled").double()
    torch.manual_seed(2)
    expected = gradient(rnn, x)
    torch.manual_seed(2)
    close(gradient(rnn, x, lambda z: checkpoint(lambda z: rnn(z)[0].sin(), z, use_reentrant=False)), expected)


# Modules
