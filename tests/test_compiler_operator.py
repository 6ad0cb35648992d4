"""torch.compile around a Recurrent: one graph, an operator in it, and the numbers of the eager program.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import recurra
from recurra import Bidirectional, Recurrent, cells
from recurra.cell import Cell, leaves
from recurra.compiler import memory, operator
from recurra.errors import BackendError

# PyTorch's own modules still use what PyTorch has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

T, B, I, H = 7, 5, 3, 4


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """``function``, compiled without a graph break, with the graphs that came of it."""

    def __init__(self, function, backend="aot_eager", **options):
        self.graphs = []

        def record(graph, inputs):
            self.graphs.append(graph)
            return graph.forward if backend == "eager" else aot_eager(graph, inputs)

        self.function = torch.compile(function, backend=record, fullgraph=True, **options)

    def __call__(self, *arguments, **options):
        return self.function(*arguments, **options)

    @property
    def operators(self):
        """How often the last graph has the operator."""
        return sum("over_time" in str(node.target) for node in self.graphs[-1].graph.nodes)


def results(function, module, x, **options):
    """y, the final state and every gradient, from the same random numbers."""
    module.zero_grad()
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    out = leaves(function(x, **options))
    sum(leaf.sin().sum() for leaf in out if leaf.requires_grad).backward()
    return [*out, x.grad, *(parameter.grad for parameter in module.parameters())]


def agree(function, module, x, compiled=None, **options):
    compiled = Compiled(function) if compiled is None else compiled
    expected, got = (results(each, module, x, **options) for each in (function, compiled))
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.requires_grad == other.requires_grad
            torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    return compiled


def inputs(T=T, B=B):
    return torch.randn(T, B, I, dtype=torch.float64)


def two_layers():
    return cells.Stack(cells.LSTM(I, H), cells.GRU(H, H))


@pytest.mark.parametrize("backend", ["auto", "hoisted", "compiled"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_with_one_operator_gives_the_numbers_and_gradients_of_the_eager_program(compiler, backend):
    model = nn.Sequential(nn.Linear(I, I), Recurrent(two_layers(), backend=backend)).double()
    compiled = agree(model, model, inputs(), Compiled(model, compiler))
    assert len(compiled.graphs) == compiled.operators == 1


def test_lengths_resets_and_a_state_may_be_given():
    rnn = Recurrent(two_layers(), backend="compiled").double()
    state = tuple(recurra.detach(part) for part in rnn(inputs())[1])
    lengths, resets = torch.tensor([3, 7, 0, 2, 6]), torch.rand(T, B) < 0.3
    compiled = agree(rnn, rnn, inputs(), state=state, lengths=lengths, resets=resets)
    assert compiled.operators == 1
    agree(rnn, rnn, inputs(), state=state)
    agree(rnn, rnn, inputs(), lengths=lengths.tolist())


def test_both_directions():
    rnn = Bidirectional(cells.LSTM(I, H), cells.GRU(I, H), backend="compiled").double()
    lengths, resets = torch.tensor([3, 7, 0, 2, 6]), torch.rand(T, B) < 0.3
    assert agree(rnn, rnn, inputs(), lengths=lengths, resets=resets).operators == 2


@pytest.mark.parametrize("mode", ["recompute", "sqrt"])
def test_every_memory_mode(mode):
    rnn = Recurrent(cells.Zoneout(cells.LSTM(I, H), 0.3), backend="compiled", memory=mode).double()
    assert agree(rnn, rnn, inputs()).operators == 1


def test_masks_of_a_sequence_and_of_a_step_are_the_eager_ones():
    # 4 * H rows, as one of the weights that are dropped has entries.
    cell = cells.VariationalDropout(
        cells.WeightDrop(cells.Zoneout(cells.LSTM(I, H), 0.3), 0.3, ("cell.weight_hh",)), 0.2
    )
    rnn = Recurrent(cell, backend="compiled").double()
    compiled = agree(rnn, rnn, inputs(B=4 * H))
    assert "over_time_drawing" in str([node.target for node in compiled.graphs[-1].graph.nodes])
    rnn.eval()
    agree(rnn, rnn, inputs(), compiled)


class Conditioned(Cell):
    def __init__(self):
        super().__init__()
        self.input_size, self.output_size = I, H
        self.cell, self.inward = cells.LSTM(I, H), nn.Linear(6, I)
        self.scale, self.shift = 1.0, 0

    def initial_state(self, batch_size):
        return self.cell.initial_state(batch_size)

    def draw_context(self, batch_size, context=None):
        return self.inward(context["speaker"]), context["gain"]

    def step(self, state, x, context=None):
        shift, gain = context
        return self.cell(state, self.scale * gain * x + shift + self.shift)


def test_a_context_of_tensors_and_numbers():
    rnn = Recurrent(Conditioned(), backend="compiled").double()
    context = {"speaker": torch.randn(B, 6, dtype=torch.float64), "gain": 0.5}
    assert agree(rnn, rnn, inputs(), context=context).operators == 1


def test_an_attribute_that_changes_is_noticed():
    rnn = Recurrent(Conditioned(), backend="compiled").double()
    context = {"speaker": torch.randn(B, 6, dtype=torch.float64), "gain": 0.5}
    compiled = agree(rnn, rnn, inputs(), context=context)
    rnn.cell.scale = 0.25
    agree(rnn, rnn, inputs(), compiled, context=context)
    rnn.cell.shift = 2
    agree(rnn, rnn, inputs(), compiled, context=context)


def test_a_change_that_torch_compile_does_not_see_is_refused():
    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    agree(rnn, rnn, inputs())
    (site,) = rnn._path.sites.values()
    site.check()
    rnn.cell.table = {"scale": 2}
    with pytest.raises(BackendError, match=r"attribute or hook of LSTM was changed.*torch\.compiler\.reset"):
        site.check()


def test_a_hook_sees_every_step():
    rnn = Recurrent(cells.LSTM(I, H)).double()
    compiled = agree(rnn, rnn, inputs())
    seen = []
    rnn.cell.register_forward_hook(lambda *_: seen.append(1))
    torch._dynamo.reset()
    compiled(inputs())
    assert len(seen) == T
    assert compiled.operators == 0


def test_sizes_that_are_marked_as_dynamic_are_compiled_once():
    rnn = Recurrent(two_layers(), backend="compiled").double()
    compiled = Compiled(rnn)
    for time, batch in ((7, 5), (8, 6), (3, 9), (12, 2)):
        x, lengths = inputs(time, batch), torch.randint(0, time + 1, (batch,))
        torch._dynamo.mark_dynamic(x, (0, 1))
        torch._dynamo.mark_dynamic(lengths, 0)
        torch.testing.assert_close(compiled(x, lengths=lengths), rnn(x, lengths=lengths), rtol=0, atol=1e-12)
    assert len(compiled.graphs) == 1


def test_sizes_that_change_are_compiled_twice():
    rnn = Recurrent(two_layers(), backend="compiled").double()
    compiled = Compiled(rnn)
    for time, batch in ((7, 5), (8, 6), (3, 9), (12, 2)):
        agree(rnn, rnn, inputs(time, batch), compiled)
    assert len(compiled.graphs) == 2


def test_without_gradients_nothing_is_kept():
    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    compiled = Compiled(rnn)
    x = inputs()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(compiled(x), rnn(x), rtol=0, atol=1e-12)
    rnn.requires_grad_(False)
    assert not compiled(x)[0].requires_grad
    agree(rnn, rnn, x, compiled)


def test_training_is_the_eager_training():
    def train(compile):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(I, I), Recurrent(two_layers())).double()
        run, optimizer = compile(model), torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(4):
            run(inputs())[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    torch.testing.assert_close(train(Compiled), train(lambda model: model), rtol=0, atol=1e-12)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    agree(rnn, rnn, inputs(), torch.compile(rnn, fullgraph=True))


def test_lengths_beyond_the_steps_are_an_error():
    for backend in ("compiled", "loop"):
        compiled = Compiled(Recurrent(cells.LSTM(I, H), backend=backend).double())
        with pytest.raises(RuntimeError, match="expected lengths from 0 to T"):
            compiled(inputs(), lengths=torch.tensor([1, 2, T + 1, 4, 5]))


def test_the_operator_itself_reads_no_lengths_beyond_the_steps():
    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    agree(rnn, rnn, inputs(), lengths=torch.full((B,), T))
    (site,) = rnn._path.sites.values()
    tensors = [inputs(), *rnn.parameters(), *leaves(rnn.cell.initial_state(B)) * 2]
    with pytest.raises(ValueError, match=r"expected lengths from 0 to T=7, got \[8"):
        torch.ops.recurra.over_time(site.name, tensors, torch.full((B,), T + 1), None, False)


class Mixing(Cell):
    """Its rows meet, so that it runs in the reference loop alone."""

    input_size, output_size = I, H

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(I + H, H)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, H)

    def step(self, state, x, context=None):
        h = torch.tanh(self.inward(torch.cat([state, x], dim=1)))
        return h - h.mean(0), h


def test_a_cell_that_cannot_be_traced_takes_the_loop_or_is_refused():
    rnn = Recurrent(Mixing()).double()
    compiled = agree(rnn, rnn, inputs())
    assert (len(compiled.graphs), compiled.operators) == (1, 0)
    rnn = Recurrent(Mixing(), backend="compiled")
    with pytest.raises(Exception, match="the rows of a batch must not meet"):
        Compiled(rnn)(inputs().float())
    with pytest.raises(BackendError, match="the rows of a batch must not meet"):
        torch.compile(rnn, backend="eager")(inputs().float())


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_the_face_of_torch_nn_with_the_switch_of_torch_compile(name):
    model = getattr(recurra.nn, name)(I, H, bidirectional=True).double()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert agree(model, model, inputs()).operators == 2


# PyTorch itself looks at .grad where it breaks the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_face_of_torch_nn_without_the_switch_is_a_graph_of_its_own():
    model = nn.Sequential(nn.Linear(I, I), recurra.nn.LSTM(I, H)).double()
    agree(model, model, inputs(), torch.compile(model, backend="aot_eager"))


def test_a_model_may_be_gone_before_its_backward_pass():
    torch.manual_seed(0)
    x = inputs().requires_grad_()
    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    (expected,) = torch.autograd.grad(rnn(x)[0].sum(), x)
    y = torch.compile(rnn, backend="aot_eager")(x)[0]
    before = len(operator._SITES)
    del rnn
    torch._dynamo.reset()
    gc.collect()
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)
    operator._GONE.clear()
    gc.collect()
    assert len(operator._SITES) < before


def test_second_derivatives_where_torch_compile_has_them():
    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()

    def second(function):
        x = inputs().requires_grad_()
        (first,) = torch.autograd.grad(function(x)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), x)[0]

    torch.manual_seed(0)
    expected = second(rnn)
    torch.manual_seed(0)
    torch.testing.assert_close(second(Compiled(rnn, "eager")), expected, rtol=0, atol=1e-12)


def test_torch_export_has_the_loop():
    rnn, x = Recurrent(cells.LSTM(I, H)).double(), inputs()
    program = torch.export.export(rnn, (x,))
    torch.testing.assert_close(program.module()(x), rnn(x), rtol=0, atol=1e-12)
    with pytest.raises(BackendError, match=r"torch\.export cannot"):
        torch.export.export(Recurrent(cells.LSTM(I, H), backend="compiled"), (x.float(),))


# Mutants: what is wrong on purpose is told apart.


def test_a_backward_pass_that_is_a_little_off_is_told_apart(monkeypatch):
    right = memory.backward

    def wrong(*arguments):
        return [None if gradient is None else (1 + 1e-9) * gradient for gradient in right(*arguments)]

    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    loop = Recurrent(rnn.cell, backend="loop")
    agree(loop, rnn, inputs(), Compiled(rnn))
    monkeypatch.setattr(memory, "backward", wrong)
    with pytest.raises(AssertionError):
        agree(loop, rnn, inputs(), Compiled(rnn))


def test_a_forward_pass_that_keeps_the_wrong_values_is_told_apart(monkeypatch):
    right = memory.forward

    def wrong(*arguments):
        y, finals, saved = right(*arguments)
        return y, finals, [torch.zeros_like(value) for value in saved]

    rnn = Recurrent(cells.LSTM(I, H), backend="compiled").double()
    loop = Recurrent(rnn.cell, backend="loop")
    monkeypatch.setattr(memory, "forward", wrong)
    with pytest.raises(AssertionError):
        agree(loop, rnn, inputs(), Compiled(rnn))
