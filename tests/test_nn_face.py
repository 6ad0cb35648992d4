"""What programs written for torch.nn's recurrent modules rely on beside the numbers; and what goes wrong.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_sequence

import recurra.nn
from oracles_torch import KINDS, a_state, close, everything, numbers, packed, pair, tensors
from recurra.errors import RecurraError

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.25, "batch_first": True},
    {"num_layers": 2, "bias": False, "bidirectional": True, "dtype": torch.float64},
]
ATTRIBUTES = [
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "mode",
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_module(kind: str, options: dict[str, Any]) -> None:
    name, more = KINDS[kind]
    made, after = [], []
    for module in (torch.nn, recurra.nn):
        torch.manual_seed(5)
        made.append(getattr(module, name)(3, 7, **more, **options))
        after.append(torch.get_rng_state())
    theirs, ours = made
    assert after[0].equal(after[1])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert a.equal(b)
    assert repr(ours) == repr(theirs)
    assert [getattr(ours, name) for name in ATTRIBUTES] == [getattr(theirs, name) for name in ATTRIBUTES]
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    assert list(ours.modules()) == [ours]
    assert isinstance(ours, type(theirs))


def test_arguments_may_come_by_position() -> None:
    assert repr(recurra.nn.RNN(2, 3, 2, "relu", False, True, 0.5, True)) == repr(
        nn.RNN(2, 3, 2, "relu", False, True, 0.5, True)
    )
    assert recurra.nn.RNN(2, 3, 2, "relu").nonlinearity == "relu"
    arguments = (2, 3, 2, False, True, 0.5, True)
    assert repr(recurra.nn.GRU(*arguments)) == repr(nn.GRU(*arguments))
    assert repr(recurra.nn.LSTM(*arguments, 2)) == repr(nn.LSTM(*arguments, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_both_ways(kind: str) -> None:
    ours, theirs = pair(kind, 3, 5, num_layers=2, bidirectional=True)
    ours.reset_parameters()
    x = numbers(4, 2, 3)
    assert not close(everything(ours, x), everything(theirs, x))
    theirs.load_state_dict(ours.state_dict())
    assert close(everything(ours, x), everything(theirs, x))


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_uniform_in_one_over_the_root_of_h(kind: str) -> None:
    name, more = KINDS[kind]
    weights = torch.cat([p.detach().flatten() for p in getattr(recurra.nn, name)(64, 64, **more).parameters()])
    assert weights.abs().max() <= 1 / 8
    assert weights.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_nn_does_none_of_the_arithmetic(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("this is torch.nn's own forward")

    for name in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
        monkeypatch.setattr(torch._VF, name, refuse)
    ours, theirs = pair(kind, 3, 5)
    ours(numbers(2, 1, 3))
    ours(packed([2, 1], True))
    with pytest.raises(AssertionError, match="own forward"):
        theirs(numbers(2, 1, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_stands_alone(kind: str) -> None:
    ours, _ = pair(kind, 3, 5, num_layers=2)
    x = numbers(4, 2, 3)
    other = copy.deepcopy(ours)
    assert close(everything(other, x), everything(ours, x))
    with torch.no_grad():
        other.weight_hh_l0.zero_()
    assert not close(everything(other, x), everything(ours, x))


def test_a_module_changes_its_dtype_and_back() -> None:
    ours, _ = pair("lstm", 3, 5)
    assert ours.to(torch.float32)(torch.randn(2, 1, 3))[1][1].dtype == torch.float32
    assert ours.double()(numbers(2, 1, 3))[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_weights_can_be_given_for_one_call(kind: str) -> None:
    ours, theirs = pair(kind, 3, 5, bidirectional=True)
    x = numbers(4, 2, 3)
    given = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    before = ours(x)[0]
    called = functional_call(ours, given, (x,))
    assert close(tensors(called), tensors(functional_call(theirs, given, (x,))))
    assert ours(x)[0].equal(before)


def test_gradients_of_each_row_alone() -> None:
    ours, _ = pair("gru", 3, 5, num_layers=2)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    x = numbers(4, 6, 3).detach()

    def loss(weights: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(ours, weights, (row,))[0].square().sum()

    by_row = vmap(grad(loss), (None, 1))(weights, x)
    for row in range(6):
        expected = grad(loss)(weights, x[:, row])
        assert close([by_row[name][row] for name in weights], [expected[name] for name in weights])


def test_frozen_weights_get_no_gradient_and_no_grad_records_nothing() -> None:
    ours, _ = pair("lstm", 3, 5)
    with torch.no_grad():
        assert not ours(numbers(2, 1, 3))[0].requires_grad
    ours.requires_grad_(False)
    ours.bias_hh_l0.requires_grad_()
    ours(numbers(2, 1, 3))[0].sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is not None] == ["bias_hh_l0"]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_its_own_dtype_and_near_numbers(kind: str) -> None:
    ours, _ = pair(kind, 3, 5, num_layers=2, bidirectional=True)
    x, hx = numbers(4, 2, 3), a_state(ours, 2)
    expected = tensors(ours(x, hx))
    ours.float()
    for dtype in (torch.float32, torch.bfloat16):
        state = [tensor.detach().to(dtype) for tensor in tensors(hx)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = tensors(ours(x.detach().to(dtype), tuple(state) if len(state) == 2 else state[0]))
        assert {tensor.dtype for tensor in got} == {torch.bfloat16}
        for a, b in zip(got, expected, strict=True):
            assert (a.double() - b).abs().max() < 0.05
        assert not close(got, expected)
    sum(tensor.float().sum() for tensor in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(tensors(ours.double()(x, hx)), expected, 1e-6)


def test_threads_may_share_a_module() -> None:
    ours, _ = pair("lstm", 3, 5, num_layers=2, bidirectional=True)
    xs = [numbers(4, 2, 3).detach() for _ in range(64)]
    with torch.no_grad():
        expected = [ours(x)[0] for x in xs]
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda x: _without_gradient(ours, x), xs))
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))


def test_each_call_uses_the_same_recurrents() -> None:
    ours, _ = pair("lstm", 3, 5)
    with ours._recurrent(0) as first:
        ours(numbers(2, 1, 3))
    ours(numbers(2, 1, 3))
    assert len(ours._free[0]) == 2
    assert first in ours._free[0]


def _without_gradient(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)[0]


def test_a_module_works_again_after_an_error_in_its_middle() -> None:
    ours, _ = pair("lstm", 3, 5, num_layers=2)
    x = numbers(4, 2, 3)
    expected = ours(x)[0]
    with pytest.raises(RuntimeError):
        functional_call(ours, {"weight_hh_l1": torch.ones(3, 3, dtype=torch.float64)}, (x,))
    assert ours(x)[0].equal(expected)


def test_explain_names_the_path() -> None:
    ours, _ = pair("gru", 3, 5, num_layers=2, bidirectional=True)
    assert ours.explain().asked == "auto"
    assert ours.explain().ran in str(ours.explain())


def test_weights_can_be_normalised_or_replaced() -> None:
    ours, theirs = pair("gru", 3, 5)
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    ours(numbers(2, 1, 3))[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    new = nn.Parameter(torch.randn_like(theirs.weight_ih_l0))
    ours.weight_ih_l0 = theirs.weight_ih_l0 = new
    x = numbers(2, 1, 3)
    assert close(tensors(ours(x)), tensors(theirs(x)))


def test_dropout_of_a_single_layer_warns_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="num_layers"):
        recurra.nn.LSTM(3, 5, dropout=0.5)


def test_flatten_parameters_changes_nothing() -> None:
    ours, theirs = pair("lstm", 3, 5)
    x = numbers(2, 1, 3)
    assert ours.flatten_parameters() is None
    assert close(everything(ours, x), everything(theirs, x))


# What goes wrong: (options, call), refused by torch.nn and by recurra.nn with an error of the same class.

Call = Callable[[nn.RNNBase, Callable[..., Any]], Any]


def f(*sizes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.ones(sizes, dtype=dtype)


def rows(*lengths: int, features: int = 3) -> Any:
    return pack_sequence([f(length, features) for length in lengths], enforce_sorted=False)


WRONG: dict[str, tuple[Call, str]] = {
    "one axis": (lambda m, s: m(f(3)), r"\(T, B, 3\).*\(3,\)"),
    "four axes": (lambda m, s: m(f(1, 2, 3, 3)), r"\(T, B, 3\).*\(1, 2, 3, 3\)"),
    "too many features": (lambda m, s: m(f(2, 2, 4)), r"input_size=3.*\b4\b"),
    "too many features, packed": (lambda m, s: m(rows(1, 2, features=4)), r"input_size=3.*\b4\b"),
    "packed rows of three axes": (lambda m, s: m(pack_sequence([f(2, 1, 3)])), r"packed.*\(2, 1, 3\)"),
    "no time step": (lambda m, s: m(f(0, 2, 3)), r"at least 1 time step.*\(0, 2, 3\)"),
    "no time step, no batch": (lambda m, s: m(f(0, 3)), r"at least 1 time step.*\(0, 3\)"),
    "single precision": (lambda m, s: m(f(2, 2, 3, dtype=torch.float32)), r"float64.*float32.*input\.to"),
    "whole numbers": (lambda m, s: m(f(2, 2, 3, dtype=torch.int64)), r"float64.*int64.*input\.to"),
    "state too wide": (lambda m, s: m(f(2, 2, 3), s(4, 2, 6)), r"\(4, 2, 5\).*\(4, 2, 6\)"),
    "state of another batch": (lambda m, s: m(f(2, 2, 3), s(4, 1, 5)), r"\(4, 2, 5\).*\(4, 1, 5\)"),
    "state of too few layers": (lambda m, s: m(f(2, 2, 3), s(2, 2, 5)), r"\(4, 2, 5\).*\(2, 2, 5\)"),
    "state without batch": (lambda m, s: m(f(2, 2, 3), s(4, 5)), r"\(4, 2, 5\).*\(4, 5\)"),
    "batch in the state only": (lambda m, s: m(f(2, 3), s(4, 1, 5)), r"\(4, 5\).*\(4, 1, 5\)"),
    "state too wide, unbatched": (lambda m, s: m(f(2, 3), s(4, 6)), r"\(4, 5\).*\(4, 6\)"),
    "state too wide, packed": (lambda m, s: m(rows(1, 2), s(4, 2, 6)), r"\(4, 2, 5\).*\(4, 2, 6\)"),
    "state of other dtype": (
        lambda m, s: m(f(2, 2, 3), s(4, 2, 5, dtype=torch.float32)),
        r"float64.*float32.*\.to",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["tanh", "relu", "lstm", "gru"])
def test_wrong_input_is_refused_as_torch_does_it(kind: str, wrong: str) -> None:
    call, words = WRONG[wrong]
    ours, theirs = pair(kind, 3, 5, num_layers=2, bidirectional=True)

    def state(*sizes: int, **options: Any) -> Any:
        return (f(*sizes, **options), f(*sizes, **options)) if kind == "lstm" else f(*sizes, **options)

    with pytest.raises((ValueError, RuntimeError)) as theirs_says:
        call(theirs, state)
    with pytest.raises(theirs_says.type, match=words) as ours_says:
        call(ours, state)
    assert isinstance(ours_says.value, RecurraError)
    assert not issubclass(ours_says.type, ValueError) or theirs_says.type is ValueError


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_more_wrong_input_is_refused_than_torch_names(kind: str) -> None:
    ours, _ = pair(kind, 3, 5)
    h = f(1, 2, 5)
    with pytest.raises(RuntimeError, match=r"Tensor or a PackedSequence.*list"):
        ours([1.0, 2.0])
    other = h if kind == "lstm" else (h, h)
    for x in (f(3, 2, 3), rows(3, 2)):
        with pytest.raises(RuntimeError, match=r"h_0 \(1, 2, 5\)"):
            ours(x, other)
        with pytest.raises(RuntimeError, match=r"h_0 \(1, 2, 5\)"):
            ours(x, (h, h, h))
    # Three rows of state for two packed sequences: torch.nn would pick two of them.
    state = f(1, 3, 5)
    with pytest.raises(RuntimeError, match=r"\(1, 2, 5\).*\(1, 3, 5\)"):
        ours(rows(1, 2), (state, state) if kind == "lstm" else state)
    with pytest.raises(RuntimeError, match=r"cpu.*meta.*input\.to\('cpu'\)"):
        ours(f(3, 2, 3).to("meta"))


def test_the_message_gives_the_axes_in_the_callers_order() -> None:
    ours, _ = pair("gru", 3, 5, batch_first=True)
    with pytest.raises(ValueError, match=r"\(B, T, 3\)"):
        ours(f(3))
    with pytest.raises(RuntimeError, match="at least 1 time step"):
        ours(f(2, 0, 3))
    assert ours(f(0, 2, 3))[0].shape == (0, 2, 5)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_state_of_the_lstm_is_a_plain_pair(as_list: bool) -> None:
    ours, theirs = pair("projected", 3, 5)
    hx = list(a_state(ours, 2)) if as_list else a_state(ours, 2)
    x = numbers(4, 2, 3)
    y, state = ours(x, hx)
    assert type(state) is tuple
    assert close([y, *state], tensors(theirs(x, hx)))
    assert close(tensors(ours(x, state)), tensors(theirs(x, state)))
