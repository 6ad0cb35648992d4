"""Named values inside a step: what is seen is what the step had, on every path, and nobody watching they are not there.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest
import torch

from recurra import Bidirectional, Cell, Recurrent, cells, tap, truncated, watch
from recurra import taps as taps_module
from recurra.errors import TapError
from tapped import CASES, B, H, I, T, Tapped, Untapped, agree, by_hand, doubled, every_path, numbers, seen_by


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
