"""A cell is itself to every other thread while its step is traced, and a weight is found however the step reads it."""

import threading

import pytest
import torch
from torch import Tensor, nn

from recurra import Cell, Recurrent
from recurra.cells import LSTM, LayerNorm, Stack
from recurra.compiler.trace import trace
from recurra.compiler.twin import twin

paths = pytest.mark.parametrize("backend", ["hoisted", "compiled"])


class Watched(Cell):
    """Somebody else looks at its weight in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.output_size = 4
        self.weight = nn.Parameter(torch.randn(4, 4) / 4)
        self.seen: list[Tensor] = []

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, 4)

    def step(self, state: Tensor, x: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        stranger = threading.Thread(target=self.look)
        stranger.start()
        stranger.join()
        state = torch.tanh(x + state @ self.weight.T)
        return state, state

    def look(self) -> None:
        self.seen.append(WATCHED[0].weight)


WATCHED: list[Watched] = []


@paths
def test_other_threads_see_the_weights_of_a_cell_that_is_traced(backend):
    WATCHED[:] = [Watched()]
    weight = WATCHED[0].weight
    Recurrent(WATCHED[0], backend=backend)(torch.randn(3, 2, 4))
    assert WATCHED[0].seen
    assert all(seen is weight for seen in WATCHED[0].seen)


@paths
def test_other_threads_see_the_weights_of_a_cell_that_is_differentiated_twice(backend):
    WATCHED[:] = [Watched()]
    weight, x = WATCHED[0].weight, torch.randn(3, 2, 4, requires_grad=True)
    y, _ = Recurrent(WATCHED[0], backend=backend)(x)
    WATCHED[0].seen.clear()
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.sum().backward()
    assert WATCHED[0].seen
    assert all(seen is weight for seen in WATCHED[0].seen)


class Roundabout(Watched):
    """Reads its weights through functions and lists that know the cell itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.layers = [self.linear]
        self.bound = self.turn
        self.closed = lambda state: state @ self.weight.T

    def turn(self, state: Tensor) -> Tensor:
        return state @ self.weight

    def step(self, state: Tensor, x: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.closed(state) - self.bound(state) + self.layers[0](x))
        return state, state


def gradients(cell: Cell, backend: str) -> list[Tensor]:
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    y, _ = Recurrent(cell, backend=backend)(x)
    return list(torch.autograd.grad(y.square().sum(), list(cell.parameters())))


@paths
def test_a_weight_that_is_read_past_its_module_has_its_gradient(backend):
    cell = Roundabout()
    for found, expected in zip(gradients(cell, backend), gradients(cell, "loop"), strict=True):
        torch.testing.assert_close(found, expected)


@paths
def test_weights_that_are_read_past_their_module_have_second_derivatives(backend):
    cell = Roundabout()

    def second(backend: str) -> list[Tensor]:
        x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, _ = Recurrent(cell, backend=backend)(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(cell.parameters())))

    for found, expected in zip(second(backend), second("loop"), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_weight_read_past_its_module_is_no_constant():
    cell = Roundabout()
    assert trace(cell, torch.randn(2, 4), cell.initial_state(2)).constants == {}
    cell.closed = lambda state: state @ cell.weight.detach().T
    step = trace(cell, torch.randn(2, 4), cell.initial_state(2))
    assert step.constants == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@paths
def test_a_module_of_torchscript_has_its_gradients(backend):
    class Scripted(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.jit.script(nn.Linear(4, 4))

        def step(self, state: Tensor, x: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            state = torch.tanh(x + self.linear(state) @ self.weight)
            return state, state

    cell = Scripted()
    for _ in range(2):
        for found, expected in zip(gradients(cell, backend), gradients(cell, "loop"), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_twin_has_the_same_weights_in_modules_of_its_own():
    shared = LayerNorm(LSTM(3, 3))
    cell = Stack(shared, shared, LSTM(3, 3))
    same = twin(cell)
    assert [name for name, _ in same.named_modules()] == [name for name, _ in cell.named_modules()]
    assert not {*same.modules()} & {*cell.modules()}
    for (name, ours), (other, theirs) in zip(same.named_parameters(), cell.named_parameters(), strict=True):
        assert name == other
        assert ours is theirs
    before = dict(cell.named_parameters())
    for module in same.modules():
        module._parameters.clear()
    assert dict(cell.named_parameters()).keys() == before.keys()
