"""What the proof is made of: a case, the record of a run, and the checks that compare two runs.

A check takes a case and raises AssertionError where two paths disagree, so that a test can also ask whether
it fails on a cell or loop that is wrong on purpose.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call

import plain
from catalogue import Entry
from paths import Case, Path, by_plain, by_recurrent, seeded, truncated, truncated_by_hand
from recurra import unroll
from recurra.cell import Cell, leaves, map_state


def draw(entry: Entry, T: int, B: int, inputs: int, H: int, *options: str, seed: int = 5) -> Case:
    """A random case in float64 that float32 holds exactly.

    Options: "state", "lengths", "resets", "reverse".
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double().requires_grad_()

    cell = entry.build(inputs, H, seed)
    context = normal(B, 3, H) if entry.memory else None
    state = None
    if "state" in options:
        # One that the cell can reach: a normaliser below zero, for one, is no state of any cell.
        state = cell.initial_state(B)
        with torch.no_grad():
            for _ in range(2):
                state, _ = cell.step(state, 1.5 * normal(B, inputs), context)
        state = map_state(round_to_float32, state)
    lengths = None
    if "lengths" in options:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        # One row of full length, one of none, wherever there is room for them.
        lengths[-1:] = T
        lengths[1:2] = 0
    resets = None
    if "resets" in options:
        resets = torch.rand(T, B, generator=generator) < 0.3
    return Case(
        entry,
        cell,
        normal(T, B, inputs),
        state,
        lengths,
        resets,
        "reverse" in options,
        context,
    )


def draw_in_training(make: Callable[[int, int], Cell], *options: str) -> Case:
    """A case of a wrapper around an LSTM of four units, in training mode, so that it draws."""
    case = draw(Entry("training", make, plain.lstm), 6, 3, 3, 4, *options)
    case.cell.train()
    return case


def round_to_float32(leaf: Tensor) -> Tensor:
    return leaf.float().double().requires_grad_() if leaf.is_floating_point() else leaf


def values(path: Path, case: Case) -> dict[str, Tensor]:
    """y and the final state of one run, by name."""
    y, final = path(case)
    return {"y": y} | {f"final {k}": leaf for k, leaf in enumerate(leaves(final))}


def record(path: Path, case: Case, weigh: Callable[[str, Tensor], Tensor] = lambda _, w: w) -> dict[str, Tensor]:
    """Everything one run gives: outputs, final state, and every gradient of a random weighing of both."""
    run = values(path, case)
    total = case.x.new_zeros(())
    for k, (name, value) in enumerate(run.items()):
        if value.is_floating_point():
            weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(k)).to(value.dtype)
            total = total + (value * weigh(name, weights)).sum()
    wanted = case.wanted
    for value in wanted.values():
        value.requires_grad_()
    given = (
        torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
        if total.requires_grad
        else [torch.zeros_like(value) for value in wanted.values()]
    )
    run = {name: value.detach() for name, value in run.items()}
    return run | {f"gradient of {name}": g for name, g in zip(wanted, given, strict=True)}


def distances(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far off each kind of number is, as a share of the largest of its kind, or of one."""
    assert got.keys() == expected.keys()
    far = {}
    for name, right in expected.items():
        assert got[name].shape == right.shape, f"{name}: {tuple(got[name].shape)} is not {tuple(right.shape)}"
        if right.numel():
            off = (got[name].double() - right.double()).abs().max().item()
            far[name] = off / max(1.0, right.abs().max().item())
    return far


def assert_agree(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every number within ``tolerance``; none missing, none NaN."""
    wrong = {name: far for name, far in distances(got, expected).items() if not far <= tolerance}
    assert not wrong, f"off by more than {tolerance}: {wrong}"


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Not one bit differs."""
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert torch.equal(got[name], right), name


def check_oracle(case: Case) -> dict[str, Tensor]:
    """Recurrent in float64 gives what the oracle gives, gradients included."""
    expected = record(by_plain, case)
    assert all(torch.isfinite(value).all() for value in expected.values()), "the oracle itself is not finite"
    assert_agree(record(by_recurrent, case), expected, 1e-12)
    return expected


def check_float32(case: Case, expected: dict[str, Tensor]) -> None:
    """Recurrent in float32 is within 1e-5 of the oracle in float64.

    Only the one degenerate size that ``loses_in_float32`` names gets ten times what the oracle itself loses there.
    """
    single = case.to(torch.float32)
    far = distances(record(by_recurrent, single), expected)
    lost = distances(record(by_plain, single), expected) if loses_in_float32(case) else dict.fromkeys(far, 0.0)
    wrong = {name: off for name, off in far.items() if not off <= max(1e-5, 10 * lost[name])}
    assert not wrong, f"off in float32: {wrong}; the oracle loses {lost}"


def loses_in_float32(case: Case) -> bool:
    """Whether float32 cannot compute the published equations to 1e-5: a normalisation of one to four features."""
    return case.entry.name == "LayerNormLSTM" and case.cell.output_size == 1


def check_same(path: Path, case: Case) -> None:
    """Another path gives what one shot of Recurrent gives, gradients included."""
    assert_agree(record(path, case), record(by_recurrent, case), 1e-12)


def check_streamed(path: Path, case: Case) -> None:
    """A path without gradients gives the outputs and the final state of one shot."""
    got = values(path, case)
    assert not any(value.requires_grad for value in got.values())
    with torch.no_grad():
        assert_agree(got, values(by_recurrent, case), 1e-12)


def check_training(by_hand: Path, case: Case) -> None:
    """From one seed, a wrapper in training mode does what is done by hand around the oracle."""
    assert_agree(record(seeded(by_recurrent), case), record(seeded(by_hand), case), 1e-12)


def check_truncated(case: Case, window: int) -> None:
    """Truncation is the oracle's windows, each from a state cut off by hand."""
    assert_agree(record(truncated(window), case), record(truncated_by_hand(window), case), 1e-12)


def check_seam(case: Case, window: int) -> None:
    """What comes after the seam of a truncation sends no gradient to what was before it; whole, it would."""

    def only_later(name: str, weights: Tensor) -> Tensor:
        return weights * (torch.arange(len(weights)) >= window)[:, None, None] if name == "y" else 0 * weights

    cut, whole = record(truncated(window), case, only_later), record(by_recurrent, case, only_later)
    for early in (lambda run: run["gradient of x"][:window], lambda run: run["gradient of state 0"]):
        assert early(whole).any(), "this case cannot tell"
        assert not early(cut).any()
    assert cut["gradient of x"][window:].any()


def check_padding(case: Case) -> None:
    """NaN in the padding changes no bit of anything, and no gradient goes there."""
    padding = torch.arange(case.x.shape[0])[:, None] >= case.lengths
    assert padding.any()
    spoilt = replace(case, x=case.x.detach().masked_fill(padding[:, :, None], torch.nan).requires_grad_())
    clean = record(by_recurrent, case)
    assert all(torch.isfinite(value).all() for value in clean.values())
    assert_identical(record(by_recurrent, spoilt), clean)
    assert not clean["gradient of x"][padding].any()
    assert not clean["y"][padding].any()


def check_neighbour(case: Case, spoilt_row: int = 1) -> None:
    """A row of nothing but NaN changes no bit of another row, forward or backward."""
    rows = torch.arange(case.x.shape[1]) != spoilt_row

    def spoil(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        leaf = leaf.detach().clone()
        leaf[spoilt_row] = torch.nan
        return leaf.requires_grad_()

    x = case.x.detach().clone()
    x[:, spoilt_row] = torch.nan
    spoilt = replace(
        case,
        x=x.requires_grad_(),
        state=None if case.state is None else map_state(spoil, case.state),
        context=None if case.context is None else spoil(case.context),
    )

    def others(run: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: value for name, value in run.items() if not name.startswith("gradient of weight")}
        return {n: v[:, rows] if n in ("y", "gradient of x") else v[rows] for n, v in kept.items()}

    clean = others(record(by_recurrent, case))
    assert all(torch.isfinite(value).all() for value in clean.values())
    assert_identical(others(record(by_recurrent, spoilt)), clean)


def check_gradients(case: Case) -> None:
    """PyTorch's numerical differentiation agrees with the gradient of everything that has one."""
    rnn = unroll.Recurrent(case.cell, reverse=case.reverse, backend="loop")
    names, inputs = zip(*case.wanted.items(), strict=True)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        weights = {f"cell.{name}": given[f"weight {name}"] for name in case.parameters}
        state = case.state
        if state is not None:
            numbers = iter(range(len(leaves(state))))
            state = map_state(lambda leaf: given.get(f"state {next(numbers)}", leaf), state)
        options = {"lengths": case.lengths, "resets": case.resets, "context": given.get("context")}
        y, final = functional_call(rnn, weights, (given["x"], state), options)
        return y, *(leaf for leaf in leaves(final) if leaf.is_floating_point())

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in inputs), fast_mode=True)


def killed(check: Callable[..., Any], *arguments: Any) -> None:
    """The check notices: without this, one that cannot fail would pass for ever."""
    with pytest.raises((AssertionError, GradcheckError)):
        check(*arguments)
