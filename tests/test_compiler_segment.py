"""A pass as one native call gives what its calls give one by one, on memory full of NaN, at any size and in any thread.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import pytest
import torch
from torch import nn

from agreement import assert_agree, draw, killed, record
from catalogue import BY_NAME, CATALOGUE, Entry
from faster import by, fill_memory_with_nan
from paths import by_recurrent
from recurra import cells
from recurra.cell import Cell
from recurra.compiler import native, pieces, script, segment, writer
from recurra.compiler.llvm import kernel
from recurra.compiler.llvm.kernel import kernel_for
from recurra.compiler.segment import Segment
from recurra.compiler.writer import Writer
from recurra.unroll import Recurrent

# In float64 and float32, rows that fill no vector and sums of few numbers included.
SIZES = [(9, 4), (30, 1), (1, 3), (9, 5), (40, 2)]


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def segments_of(rnn: Recurrent) -> list[Segment]:
    plan = rnn._path._last
    nodes = [node for part in (plan.ahead, plan.back) for node in part.whole.function.__self__.graph.nodes]
    found = [getattr(node.target, "__self__", None) for node in nodes]
    return [each for each in found if isinstance(each, Segment)]


def scripts_of(rnn: Recurrent) -> list[bool]:
    """Of every size of every segment, whether it was written down."""
    return [each is not None for part in segments_of(rnn) for each in part._scripts.values()]


def compiled(case) -> tuple[Recurrent, object]:
    rnn = Recurrent(case.cell, backend="compiled")
    return rnn, by(rnn)


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.name != "user: Counting"], ids=str)
def test_one_call_gives_what_the_loop_gives(entry):
    """One Recurrent serves all sizes, so that each finds the memory of the one before."""
    first = draw(entry, 1, 1, 19, 24)
    _, path = compiled(first)
    for number, (T, B) in enumerate(SIZES):
        options = [*(["state"] if number % 2 else []), *(["reverse"] if number % 3 else [])]
        case = replace(draw(entry, T, B, 19, 24, *options), cell=first.cell)
        assert_agree(record(path, case), record(by_recurrent, case), 1e-11)


@pytest.mark.parametrize(
    "name", ["Vanilla", "LSTM", "GRU", "GRUResetBefore", "PeepholeLSTM", "CoupledLSTM", "Residual"]
)
@pytest.mark.parametrize("inputs", [19, 3])
def test_the_usual_cells_are_one_call_each_way(name, inputs):
    case = draw(BY_NAME[name], 9, 4, inputs, 24)
    rnn, path = compiled(case)
    record(path, case)
    assert [len(part._scripts) for part in segments_of(rnn)] == [1, 1]
    assert scripts_of(rnn) == [True, True]


def test_what_is_only_summed_is_summed_in_the_loop():
    case = draw(BY_NAME["LayerNormLSTM"], 9, 4, 19, 24)
    rnn, path = compiled(case)
    record(path, case)
    (loop,) = [stage.native for stage in rnn._path._last.back.stages if stage.native is not None]
    (kernel,) = loop.kernels
    assert len(kernel.program.outputs) < len(loop.program.outputs)
    assert len(kernel.program.carries) > len(loop.program.carries)
    # Rows that begin afresh would lose what they have added up.
    record(path, replace(case, resets=torch.zeros(9, 4, dtype=torch.bool)))
    assert any(len(each.program.carries) == len(loop.program.carries) for each in loop.kernels)


@pytest.mark.parametrize("options", [("lengths",), ("resets",), ("lengths", "resets", "reverse")])
def test_rows_that_end_or_begin_afresh_go_call_by_call(options):
    case = draw(BY_NAME["LSTM"], 9, 4, 19, 24, *options)
    rnn, path = compiled(case)
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert scripts_of(rnn) == []


def test_tensors_that_lie_otherwise_are_taken():
    cell = BY_NAME["GRU"].build(19, 24)
    x = torch.randn(4, 9, 19, dtype=torch.float64).transpose(0, 1).requires_grad_()
    found = {}
    for backend in ("loop", "compiled"):
        y, last = Recurrent(cell, backend=backend)(x)
        # A sum's gradient is one number in every place.
        found[backend] = [y, last, *torch.autograd.grad(y.sum() + last.mean(), [x, *cell.parameters()])]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_written_on_y_is_not_read_by_the_backward_pass(reverse):
    cell = BY_NAME["LSTM"].build(19, 24)
    x = torch.randn(9, 4, 19, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("loop", "compiled"):
        y, (h, c) = Recurrent(cell, reverse, backend=backend)(x)
        total = (y * 1.0).sin().sum() + h.sum() + c.sum()
        with torch.no_grad():
            for each in (y, h, c):
                each.fill_(torch.nan)
        found.append(torch.autograd.grad(total, [x, *cell.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_two_threads_of_the_team_give_the_numbers_of_one(monkeypatch):
    for module in (kernel, writer.gemm):
        monkeypatch.setattr(module, "WAKE", 1)
    case = draw(BY_NAME["GRU"], 9, 5, 19, 24)
    rnn, path = compiled(case)
    with threads(1):
        one = record(path, case)
    with threads(2):
        two = record(path, case)
    assert all(torch.equal(one[name], two[name]) for name in one)
    written = [form for part in segments_of(rnn) for form in part._scripts.values()]
    assert {form.members for form in written} == {1, 2}


def test_without_a_team_several_threads_go_call_by_call(monkeypatch):
    for module in (kernel, writer.gemm):
        monkeypatch.setattr(module, "WAKE", 1)
    monkeypatch.setattr(pieces, "team", lambda: 0)
    case = draw(BY_NAME["GRU"], 9, 5, 19, 24)
    rnn, path = compiled(case)
    with threads(2):
        assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert not any(scripts_of(rnn))


def test_long_calls_go_call_by_call(monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 1000)
    case = draw(BY_NAME["LSTM"], 9, 4, 19, 24)
    rnn, path = compiled(case)
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert not any(scripts_of(rnn))


@pytest.mark.parametrize("first", [True, False])
def test_a_pass_can_be_one_call_and_the_other_many(monkeypatch, first):
    """What the one keeps in one tensor, the other takes apart; or takes as a tensor each."""
    limits = [pieces.MOST, 1000]
    case = draw(BY_NAME["LSTM"], 9, 4, 19, 24)
    rnn = Recurrent(case.cell, backend="compiled")
    found = []
    for path in (rnn, Recurrent(case.cell, backend="loop")):
        monkeypatch.setattr(pieces, "MOST", limits[not first])
        y, _ = path(case.x)
        monkeypatch.setattr(pieces, "MOST", limits[first])
        found.append(torch.autograd.grad(y.square().sum(), [case.x, *case.cell.parameters()]))
    assert scripts_of(rnn) == [first, not first]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_what_is_kept_is_one_tensor():
    case = draw(BY_NAME["LSTM"], 9, 4, 19, 24)
    _, path = compiled(case)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        path(case)
    inputs = [case.x, *case.cell.parameters()]
    sizes = [t.numel() for t in kept if not any(t is given for given in inputs) and t.numel() > 4 * 24]
    assert len(sizes) == 1
    assert sizes[0] >= 9 * 4 * 24 * 6


def test_as_many_sizes_are_remembered(monkeypatch):
    monkeypatch.setattr(segment, "_KEPT", 2)
    case = draw(BY_NAME["Vanilla"], 9, 4, 19, 24)
    rnn, _ = compiled(case)
    for T in (3, 4, 5, 6):
        rnn(case.x[:T])
    assert [len(part._scripts) for part in segments_of(rnn)][:1] == [2]


def test_several_threads_may_call_at_once(monkeypatch):
    # What fills memory with NaN would do so while another thread works in it.
    monkeypatch.undo()
    cell = BY_NAME["LSTM"].build(19, 24)
    rnn = Recurrent(cell, backend="compiled")
    inputs = [torch.randn(9, 1 + k, 19, dtype=torch.float64, requires_grad=True) for k in range(4)]

    def run(x):
        y, _ = rnn(x)
        return torch.autograd.grad(y.square().sum(), x)[0]

    expected = [run(x) for x in inputs]
    wrong = []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.equal(run(inputs[k]), expected[k]):
                wrong.append(k)

    workers = [Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


class Between(Cell):
    """A sum over the features that no native code is asked for, between two layers' products."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.one, self.two = cells.Vanilla(input_size, hidden_size), cells.Vanilla(hidden_size, hidden_size)
        self.between = nn.Linear(hidden_size, hidden_size)

    def initial_state(self, batch_size):
        return self.one.initial_state(batch_size), self.two.initial_state(batch_size)

    def step(self, state, x, context=None):
        one, y = self.one(state[0], x)
        y = self.between(torch.special.erf(torch.cumsum(self.between(y), 1)))
        two, y = self.two(state[1], y)
        return (one, two), y


def test_what_stands_between_two_native_calls_parts_them():
    case = draw(Entry("between", Between, None), 9, 4, 19, 24)
    rnn, path = compiled(case)
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert all(scripts_of(rnn))


# --- scripts that are wrong on purpose ---


def without_copies(right, self, *rest):
    return None


def in_the_order_of_time(right, self, loop, operands, state, reverse, *rest):
    return right(self, loop, operands, state, not reverse, *rest)


def sums_of_one_row_less(right, self, value, R, shape):
    return right(self, value, max(1, R - 1), shape)


def without_zeros(right, self, when, value):
    return None


def last_instead_of_sum(right, self, loop, summed, *rest):
    kernel = loop.kernel
    loop.kernel = lambda every_state=False, summed=frozenset(): (
        kernel(every_state, summed) if not summed else kernel_for(_without_sums(loop.program, summed), "float64")
    )
    try:
        return right(self, loop, summed, *rest)
    finally:
        del loop.kernel


def _without_sums(program, summed):
    """Its outputs are carries that take each step's value alone."""
    whole = native._summed(program, summed)
    new = [whole.nodes[place].args[1] if k >= len(program.carries) else place for k, place in enumerate(whole.new)]
    return replace(whole, new=tuple(new))


def values_over_each_other(right, self, values, into):
    size = right(self, values, into)
    self.places.update(dict.fromkeys(values, (into, 0)))
    return size


WRONG = {
    "values over each other": (script._Layout, "pack", values_over_each_other),
    "no copies": (Writer, "copy", without_copies),
    "against the order of time": (Writer, "loop", in_the_order_of_time),
    "sums of one row less": (Writer, "total", sums_of_one_row_less),
    "sums that do not begin at zero": (Writer, "fill", without_zeros),
    "the last step's value as the sum": (Writer, "backward", last_instead_of_sum),
}


def told_apart(monkeypatch, case, owner, method, wrong):
    """With ``wrong`` in the place of a method, which it is given first, no results agree."""
    expected = record(by_recurrent, case)
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda self, *rest, **options: wrong(right, self, *rest, **options))
    _, path = compiled(case)
    killed(lambda: assert_agree(record(path, case), expected, 1e-11))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_script_is_told_apart(name, monkeypatch):
    told_apart(monkeypatch, draw(BY_NAME["LayerNormLSTM"], 9, 4, 19, 24, "state"), *WRONG[name])


def test_a_state_that_is_not_where_it_is_said_to_be_is_told_apart(monkeypatch):
    case = draw(BY_NAME["LSTM"], 9, 4, 19, 24, "state")
    expected = record(by_recurrent, case)
    monkeypatch.setattr(writer, "moved", lambda value, skip: value)
    killed(lambda: assert_agree(record(compiled(case)[1], case), expected, 1e-11))


def test_y_without_memory_of_its_own_is_told_apart(monkeypatch):
    case = draw(BY_NAME["LSTM"], 9, 4, 19, 24)
    expected = record(by_recurrent, case)
    monkeypatch.setattr(pieces, "_shared", lambda *_: [])
    killed(lambda: assert_agree(record(compiled(case)[1], case), expected, 1e-11))
