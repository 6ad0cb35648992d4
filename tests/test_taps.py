"""Named values inside a step: what is seen is what the step had, on every path, and nobody watching they are not there.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from recurra import Bidirectional, Cell, Recurrent, Stream, cells, detach, tap, truncated, watch
from recurra import taps as taps_module
from recurra.errors import BackendError, ShapeError, TapError

PATHS = [("loop", "store"), ("hoisted", "store"), ("compiled", "store"), ("compiled", "recompute"), ("hoisted", "sqrt")]
every_path = pytest.mark.parametrize(("backend", "memory"), PATHS, ids=[" ".join(path) for path in PATHS])
T, B, I, H = 7, 3, 5, 4


class Pair(NamedTuple):
    h: Tensor
    level: Tensor


class Tapped(Cell):
    """Two leaves, and taps of several shapes: before, in and after the loop, of the input and of a truth value."""

    taps = True

    def __init__(self, input_size: int = I, hidden_size: int = H) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inner = torch.nn.Linear(input_size + hidden_size, hidden_size)
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, hidden_size))

    def initial_state(self, batch_size):
        return Pair(self.zeros(batch_size, self.output_size), self.zeros(batch_size) + 0.5)

    def step(self, state, x, context=None):
        see = tap if self.taps else (lambda name, value: value)
        before = see("drive", x.square().sum(1))
        h = see("h", torch.tanh(self.inner(torch.cat([x, state.h], dim=1))))
        level = see("level", 0.9 * state.level + 0.1 * h.mean(1) * before)
        see("outer", h[:, :, None] * level[:, None, None] + x[:, None, :2])
        see("positive", h > 0)
        see("gain", torch.sigmoid(self.gain).expand(len(x), -1))
        return Pair(h, level), see("y", h * self.gain)


class Untapped(Tapped):
    taps = False


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def doubled(cell: Cell, seed: int = 1) -> Cell:
    cell = cell.double().eval()
    with torch.no_grad():
        for k, parameter in enumerate(cell.parameters()):
            parameter.copy_(0.6 * numbers(*parameter.shape, seed=seed + k))
    return cell


def by_hand(cell: Cell, x: Tensor, lengths=None, resets=None, reverse=False) -> dict[str, Tensor]:
    """The values of the taps of ``Tapped``, by its equations, row by row, with no tap and no loop of the house."""
    steps, rows = x.shape[:2]
    names: dict[str, Tensor] = {}

    def put(name: str, t: int, b: int, value: Tensor) -> None:
        names.setdefault(name, torch.zeros(steps, rows, *value.shape, dtype=value.dtype))[t, b] = value

    for b in range(rows):
        h, level = torch.zeros(H, dtype=x.dtype), torch.tensor(0.5, dtype=x.dtype)
        valid = range(steps if lengths is None else lengths[b])
        for t in reversed(valid) if reverse else valid:
            if resets is not None and resets[t, b]:
                h, level = torch.zeros_like(h), torch.full_like(level, 0.5)
            drive = (x[t, b] ** 2).sum()
            h = torch.tanh(cell.inner.weight @ torch.cat([x[t, b], h]) + cell.inner.bias)
            level = 0.9 * level + 0.1 * h.mean() * drive
            for name, value in {
                "drive": drive,
                "h": h,
                "level": level,
                "outer": h[:, None] * level + x[t, b, :2],
                "positive": h > 0,
                "gain": torch.sigmoid(cell.gain),
                "y": h * cell.gain,
            }.items():
                put(name, t, b, value.detach())
    return names


MARKS = torch.zeros(T, B, dtype=torch.bool)
MARKS[3, 0] = MARKS[4, 2] = MARKS[0, 1] = True
CASES = {
    "plain": {},
    "lengths": {"lengths": [7, 0, 4]},
    "resets": {"resets": MARKS},
    "both": {"lengths": [5, 1, 7], "resets": MARKS},
}


def seen_by(rnn: Recurrent, x: Tensor, **options) -> dict[str, Tensor]:
    with watch(rnn) as seen:
        rnn(x, **options)
    return {name: seen[name] for name in seen}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@every_path
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_seen_is_what_the_equations_give(backend, memory, reverse, case):
    cell, x = doubled(Tapped()), numbers(T, B, I)
    rnn = Recurrent(cell, reverse=reverse, backend=backend, memory=memory)
    agree(seen_by(rnn, x, **CASES[case]), by_hand(cell, x, **CASES[case], reverse=reverse))


@pytest.mark.parametrize("backend", ["loop", "hoisted", "compiled"])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (2, 5), (63, 2), (4, 0)])
def test_any_sizes(backend, steps, rows):
    cell, x = doubled(Tapped()), numbers(steps, rows, I)
    found = seen_by(Recurrent(cell, backend=backend), x)
    if rows:
        agree(found, by_hand(cell, x))
    assert found["outer"].shape == (steps, rows, H, 2)


@every_path
def test_watching_changes_no_output_no_state_and_no_gradient(backend, memory):
    rnn = Recurrent(doubled(cells.Stack(cells.LSTM(I, H), Tapped(H))), backend=backend, memory=memory)
    x = numbers(T, B, I).requires_grad_()
    results = []
    for _ in range(2):
        y, (lstm, pair) = rnn(x, lengths=[7, 2, 5])
        loss = y.sin().sum() + lstm.c.sum() + pair.level.sum()
        results.append([y, lstm.c, pair.level, *torch.autograd.grad(loss, [x, *rnn.parameters()])])
        with watch(rnn) as seen:
            y, (lstm, pair) = rnn(x, lengths=[7, 2, 5])
            loss = y.sin().sum() + lstm.c.sum() + pair.level.sum()
            for name in seen:
                assert not seen[name].requires_grad
                # They are nobody else's: what is written on them reaches nothing.
                seen[name].zero_()
        results.append([y, lstm.c, pair.level, *torch.autograd.grad(loss, [x, *rnn.parameters()])])
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=0, atol=1e-12)


# --- the house's gates, and names ---


@pytest.mark.parametrize("backend", ["loop", "hoisted", "compiled"])
def test_the_gates_of_an_lstm_make_its_state(backend):
    rnn = Recurrent(doubled(cells.LSTM(I, H)), backend=backend)
    x = numbers(T, B, I)
    with watch(rnn) as seen:
        y, state = rnn(x)
    assert seen.names == ("input_gate", "forget_gate", "output_gate", "cell")
    assert len(seen) == 4
    assert "(7, 3, 4)" in repr(seen)
    torch.testing.assert_close(seen["output_gate"] * torch.tanh(seen["cell"]), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen["cell"][-1], state.c, rtol=0, atol=1e-12)
    weights, h = rnn.cell, torch.cat([torch.zeros(1, B, H, dtype=x.dtype), y[:-1]])
    z = x @ weights.weight_ih.T + h @ weights.weight_hh.T + weights.bias
    for name, part in zip(("input_gate", "forget_gate", "output_gate"), (0, 1, 3), strict=True):
        torch.testing.assert_close(seen[name], torch.sigmoid(z.chunk(4, 2)[part]).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["loop", "hoisted", "compiled"])
def test_the_gates_of_a_gru(backend):
    rnn = Recurrent(doubled(cells.GRU(I, H)), backend=backend)
    x = numbers(T, B, I)
    with watch(rnn) as seen:
        y, _ = rnn(x)
    h, cell = torch.cat([torch.zeros(1, B, H, dtype=x.dtype), y[:-1]]), rnn.cell
    z = torch.sigmoid(x @ cell.weight_ih.T + h @ cell.weight_hh.T + cell.bias[None])
    assert seen.names == ("reset_gate", "update_gate")
    torch.testing.assert_close(seen["reset_gate"], z.chunk(3, 2)[0].detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen["update_gate"], z.chunk(3, 2)[1].detach(), rtol=0, atol=1e-12)


def deep() -> Cell:
    return cells.Stack(
        cells.VariationalDropout(cells.WeightDrop(cells.LSTM(I, H), 0.3), input=0.2),
        cells.Residual(cells.LayerNorm(cells.Zoneout(cells.LSTM(H, H), (0.2, 0.1)))),
        cells.Readout(cells.GRU(H, 3), 2),
    )


@pytest.mark.parametrize("backend", ["hoisted", "compiled"])
@pytest.mark.parametrize("training", [False, True])
def test_taps_inside_of_wrappers(backend, training):
    cell = doubled(deep())
    if training:
        # Masks of each step would be drawn in another order.
        cell.train()
        cell.cells[1].eval()
    results = []
    for path in ("loop", backend):
        torch.manual_seed(3)
        results.append(seen_by(Recurrent(cell, backend=path), numbers(T, B, I), lengths=[2, 7, 6]))
    gates = [name for name in results[0] if name.endswith(("forget_gate", "reset_gate"))]
    assert gates == ["0.forget_gate", "1.forget_gate", "2.reset_gate"]
    agree(results[1], results[0])


@pytest.mark.parametrize("backend", ["loop", "compiled"])
def test_both_directions_are_seen(backend):
    rnn = Bidirectional(doubled(cells.LSTM(I, H)), doubled(cells.GRU(I, H), 5), backend=backend)
    x, lengths = numbers(T, B, I), [7, 3, 5]
    with watch(rnn) as seen:
        rnn(x, lengths=lengths)
    assert seen.names[0] == "ahead.input_gate"
    assert seen.names[-1] == "back.update_gate"
    agree(
        {name: seen[f"back.{name}"] for name in ("reset_gate", "update_gate")},
        seen_by(Recurrent(rnn.back.cell, reverse=True, backend="loop"), x, lengths=lengths),
    )
    assert seen["update_gate"].equal(seen["back.update_gate"])


def test_a_name_is_found_by_its_end_and_a_wrong_or_ambiguous_one_is_refused():
    rnn = Recurrent(cells.Stack(cells.LSTM(I, H), cells.GRU(H, H), cells.LSTM(H, H)))
    with watch(rnn) as seen:
        with pytest.raises(TapError, match="'cell' was not seen: no Recurrent in Recurrent has been called"):
            _ = seen["cell"]
        rnn(numbers(T, B, I).float())
    assert seen["reset_gate"].equal(seen["1.reset_gate"])
    with pytest.raises(TapError, match=r"'forget_gate' may be any of 0\.forget_gate, 2\.forget_gate: name one of them"):
        _ = seen["forget_gate"]
    with pytest.raises(TapError, match=r"Recurrent has no tap '1.rest_gate': did you mean '1.reset_gate'\?"):
        _ = seen["1.rest_gate"]
    assert "reset_gate" in seen
    assert "2.cell" in seen
    assert "forget_gate" not in seen
    assert "nothing" not in seen
    rnn = Recurrent(cells.Vanilla(I, H))
    with watch(rnn) as seen:
        rnn(numbers(T, B, I).float())
    with pytest.raises(TapError, match="Recurrent has no tap 'h': none was reached"):
        _ = seen["h"]


class Twice(Cell):
    """Taps one name again and again, with a cell of its own in two places."""

    input_size = output_size = 2

    def __init__(self):
        super().__init__()
        self.low = cells.GRU(2, 2)
        self.high = self.low

    def initial_state(self, batch_size):
        return self.low.initial_state(batch_size)

    def step(self, state, x, context=None):
        for k in range(3):
            x = tap("x", x + k)
        state, x = self.low(state, x)
        return self.high(state, x)


@pytest.mark.parametrize("backend", ["loop", "compiled"])
def test_a_name_that_comes_again_is_numbered(backend):
    x = torch.randn(4, 3, 2)
    found = seen_by(Recurrent(Twice(), backend=backend), x)
    assert list(found) == [
        "x",
        "x#2",
        "x#3",
        "low.reset_gate",
        "low.update_gate",
        "low.reset_gate#2",
        "low.update_gate#2",
    ]
    torch.testing.assert_close(found["x#3"], x + 3)


def test_a_module_is_watched_with_every_recurrent_in_it_and_each_shows_its_last_call():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Recurrent(cells.GRU(2, 3)), Recurrent(cells.LSTM(3, 2), backend="loop")

        def forward(self, x):
            return self.decoder(self.encoder(x)[0])[0]

    model = Model()
    other = Recurrent(cells.GRU(2, 3))
    with watch(model) as seen, watch(model.encoder) as inner:
        model(torch.randn(6, 3, 2))
        model(torch.randn(5, 4, 2))
        other(torch.randn(2, 2, 2))
        assert seen["decoder.cell"].shape == (5, 4, 2)
        assert seen["encoder.reset_gate"].equal(inner["reset_gate"])
        model.encoder(torch.randn(0, 4, 2))
        assert inner.names == ()
    assert [name.partition(".")[0] for name in seen.names] == ["decoder"] * 4


def test_windows_of_a_truncated_run_show_the_last_one():
    rnn, x = Recurrent(doubled(cells.GRU(I, H)), backend="compiled"), numbers(7, B, I)
    with watch(rnn) as seen:
        parts = [seen["update_gate"] for _ in truncated(rnn, x, 3)]
    torch.testing.assert_close(torch.cat(parts), seen_by(rnn, x)["update_gate"], rtol=0, atol=1e-12)


# --- nobody watching ---


def test_a_tap_is_the_identity_outside_of_a_cell_and_where_nobody_watches():
    value = torch.randn(3)
    assert tap("anything", value) is value
    rnn = Recurrent(Tapped())
    with watch(rnn):
        assert tap("anything", value) is value
        cell = cells.LSTM(I, H)
        cell(cell.initial_state(2), torch.randn(2, I))
    assert taps_module.recording() is None


@pytest.mark.parametrize("backend", ["hoisted", "compiled"])
def test_off_the_traced_step_is_that_of_a_cell_without_taps(backend):
    programs = []
    for kind in (Tapped, Untapped):
        rnn = Recurrent(doubled(kind()), backend=backend)
        x = numbers(T, B, I)
        rnn(x)
        before = text_of(rnn)
        with watch(rnn) as seen:
            rnn(x)
        assert (text_of(rnn) != before) == (kind is Tapped) == bool(seen.names)
        rnn(x)
        assert text_of(rnn) == before
        programs.append(before)
    assert programs[0] == programs[1]


def text_of(rnn: Recurrent) -> str:
    """The stages of the last call, and the native programs, without the lines of the code."""
    plan = rnn._path._last
    lines = [line.partition("  # ")[0] for line in str(plan).splitlines()]
    natives = [stage.native.program for stage in (*plan.ahead.stages, *plan.back.stages) if stage.native is not None]
    return "\n".join([*lines, *map(str, natives)])


# --- where it must end ---


class Fails(Tapped):
    fails = True

    def step(self, state, x, context=None):
        found = super().step(state, x, context)
        if self.fails:
            raise ArithmeticError("in the step")
        return found


def watched_then_failing(rnn, x, seen):
    rnn(x)
    assert len(seen)
    rnn.cell.fails = True
    rnn(x)


@pytest.mark.parametrize("backend", ["loop", "auto"])
def test_an_exception_leaves_nothing_switched_on(backend):
    rnn = Recurrent(Fails(), backend=backend)
    x = torch.randn(T, B, I)
    rnn.cell.fails = False
    with pytest.raises(ArithmeticError) as raised, watch(rnn) as seen:
        watched_then_failing(rnn, x, seen)
    assert str(raised.value) == "in the step"
    assert not len(seen)
    assert taps_module.recording() is None
    assert taps_module._here.watches == ()
    rnn.cell.fails = False
    rnn(x)
    assert not len(seen)


def test_a_tap_that_fits_no_batch_or_not_every_step_is_refused():
    class Wrong(Tapped):
        what = "features"

        def step(self, state, x, context=None):
            found = super().step(state, x, context)
            tap("wrong", {"features": self.gain, "number": x.sum(), "list": [x]}[self.what])
            return found

    for backend in ("loop", "hoisted", "compiled", "auto"):
        rnn = Recurrent(Wrong(I, 9), backend=backend)
        for what, got in {"features": r"\(9,\)", "number": r"\(\)", "list": "list"}.items():
            rnn.cell.what = what
            rnn(torch.randn(T, B, I))
            with pytest.raises(ShapeError, match=rf"'wrong' in Wrong needs a value \(B, ...\).*got {got}"), watch(rnn):
                rnn(torch.randn(T, B, I))

    class Sometimes(Tapped):
        def step(self, state, x, context=None):
            if x.sum() > 0:
                tap("sometimes", x)
            return super().step(state, x, context)

    rnn = Recurrent(Sometimes(), backend="loop")
    with pytest.raises(ShapeError, match="'sometimes' in Sometimes is not reached in every step"), watch(rnn):
        rnn(torch.stack([torch.ones(B, I), -torch.ones(B, I)]))
    with pytest.raises(ShapeError, match="watch takes a Recurrent, or a module that has some, got int"), watch(3):
        pass


def test_where_a_step_cannot_be_traced_the_loop_is_watched():
    class Branches(Tapped):
        def step(self, state, x, context=None):
            return super().step(state, x if x.sum() > 0 else -x, context)

    cell, x = doubled(Branches()), numbers(T, B, I)
    rnn = Recurrent(cell, backend="auto")
    found = seen_by(rnn, x)
    assert rnn.explain().ran == "loop"
    agree(found, seen_by(Recurrent(cell, backend="loop"), x))
    with pytest.raises(BackendError), watch(rnn):
        Recurrent(cell, backend="compiled")(x)


def test_watching_in_one_thread_taps_no_other():
    rnn = Recurrent(doubled(cells.Stack(cells.LSTM(I, H), Tapped(H))), backend="auto")
    x = [numbers(T, B, I, seed=k) for k in range(4)]
    expected = [seen_by(rnn, each) for each in x]
    found: dict[int, dict[str, Tensor]] = {}
    begin, problems = threading.Barrier(4), []

    def work(number: int) -> None:
        begin.wait()
        try:
            for _ in range(5):
                if number % 2:
                    found[number] = seen_by(rnn, x[number])
                else:
                    rnn(x[number])
                    assert taps_module._here.watches == ()
                    assert not rnn._path._plans or taps_module.recording() is None
        except Exception as error:
            problems.append(error)

    with watch(rnn) as seen:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    assert not len(seen)
    for number in (1, 3):
        agree(found[number], expected[number])


def test_a_recurrent_in_a_step_is_not_the_one_that_is_watched():
    class Nested(Cell):
        input_size = output_size = 2

        def __init__(self):
            super().__init__()
            self.within = Recurrent(cells.GRU(2, 2), backend="loop")

        def initial_state(self, batch_size):
            return self.zeros(batch_size, 2)

        def step(self, state, x, context=None):
            _, h = self.within(torch.stack([x, x]), state)
            return tap("h", h), h

    rnn, x = Recurrent(Nested(), backend="loop"), torch.randn(4, 3, 2)
    found = seen_by(rnn, x)
    assert list(found) == ["h"]
    torch.testing.assert_close(found["h"], rnn(x)[0].detach())


def test_a_stream_and_second_derivatives_run_beside_a_watch():
    rnn = Recurrent(doubled(cells.LSTM(I, 2)), backend="compiled")
    x = numbers(3, 2, I).requires_grad_()
    with watch(rnn) as seen:
        Stream(rnn.cell, 2).push(x[0].detach())
        y, state = rnn(x)
        before = {name: seen[name].clone() for name in seen}
        (gradient,) = torch.autograd.grad(y.square().sum() + detach(state).c.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        agree({name: seen[name] for name in seen}, before)


# --- the checks can tell ---


def test_values_a_step_late_or_with_something_in_the_padding_are_told_apart(monkeypatch):
    cell, x, options = doubled(Tapped()), numbers(T, B, I), {"lengths": [7, 0, 4]}
    expected = by_hand(cell, x, **options)
    over_time = taps_module.Record.over_time

    def late(self, lengths, reverse):
        return {name: value.roll(1, 0) for name, value in over_time(self, lengths, reverse).items()}

    def padded(self, lengths, reverse):
        return over_time(self, None, reverse)

    def turned(self, lengths, reverse):
        return over_time(self, lengths, not reverse)

    for mutant, backends in ((late, ("loop", "compiled")), (padded, ("loop", "compiled")), (turned, ("loop",))):
        monkeypatch.setattr(taps_module.Record, "over_time", mutant)
        for backend in backends:
            with pytest.raises(AssertionError):
                agree(seen_by(Recurrent(cell, backend=backend), x, **options), expected)
