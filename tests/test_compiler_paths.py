"""The hoisted loop and native code against the published equations, and against the reference loop.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agreement import assert_agree, assert_identical, distances, draw, loses_in_float32, record, values
from catalogue import BY_NAME, CATALOGUE
from faster import BACKENDS, MODES, by, fill_memory_with_nan, path_of
from paths import Case, by_plain, by_recurrent, in_chunks
from recurra.cell import leaves
from recurra.compiler import door
from recurra.errors import BackendError
from recurra.unroll import Bidirectional, Recurrent

both = pytest.mark.parametrize("backend", BACKENDS)
every_cell = pytest.mark.parametrize("entry", CATALOGUE, ids=str)

# T, B, options. Every option meets every other. Only one is without a state, as that is another plan.
SIZES = [
    (2, 5, "state lengths resets"),
    (7, 5, "state lengths resets reverse"),
    (6, 3, "lengths"),
    (1, 1, "state reverse"),
    (2, 0, "state lengths resets"),
]
# T, B, inputs, H, options.
MORE = [
    (63, 5, 3, 7, "state lengths resets reverse"),
    (63, 1, 5, 100, "state resets"),
]
SOME = ["LSTM", "GRU", "MinGRU", "SLSTM heads", "MLSTM heads", "deep", "user: Attending", "user: Leaky"]


def takes(backend: str, name: str) -> bool:
    """Whether a path takes a cell: native code takes none that counts in whole numbers."""
    return (backend, name) != ("compiled", "user: Counting")


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


@both
@every_cell
def test_both_paths_agree_with_the_published_equations(entry, backend):
    """In float64, and in float32 within 1e-5 of the same, gradients included. One Recurrent serves all sizes."""
    if not takes(backend, entry.name):
        with pytest.raises(BackendError, match=r"torch\.int64"):
            path_of(backend)(draw(entry, 2, 3, 3, 4))
        return
    first = draw(entry, 1, 1, 3, 7)
    rnn = Recurrent(first.cell, backend=backend)
    for T, B, options in SIZES:
        case = replace(draw(entry, T, B, 3, 7, *options.split()), cell=rnn.cell)
        expected = record(by_plain, case)
        assert_agree(record(by(rnn), case), expected, 1e-12)
    assert rnn.explain().ran == backend
    case = draw(entry, 5, 3, 3, 7, "state", "lengths", "reverse")
    check_float32(path_of(backend), case, record(by_plain, case))


def check_float32(path, case: Case, expected) -> None:
    single = case.to(torch.float32)
    far = distances(record(path, single), expected)
    lost = distances(record(by_recurrent, single), expected) if loses_in_float32(case) else dict.fromkeys(far, 0.0)
    assert all(off <= max(1e-5, 10 * lost[name]) for name, off in far.items()), far


@both
@pytest.mark.parametrize(("T", "B", "inputs", "H", "options"), MORE)
@pytest.mark.parametrize("name", SOME[1:5])
def test_at_sizes_that_are_empty_long_or_wide(name, T, B, inputs, H, options, backend):
    case = draw(BY_NAME[name], T, B, inputs, H, *options.split())
    assert_agree(record(path_of(backend), case), record(by_recurrent, case), 1e-11)


@every_cell
def test_one_unit_is_enough(entry):
    if takes("compiled", entry.name):
        case = draw(entry, 3, 2, 2, 1, "state", "lengths", "resets")
        assert_agree(record(path_of("compiled"), case), record(by_recurrent, case), 1e-11)


@both
@pytest.mark.parametrize("name", ["LSTM", "MinGRU", "LayerNormLSTM", "Zoneout", "user: Attending"])
def test_without_gradients_the_numbers_are_the_same(name, backend):
    """To the bit in the hoisted loop; native code may calculate in the loop what nobody keeps, by its own formulas."""
    case = draw(BY_NAME[name], 5, 3, 3, 4, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend=backend)
    learnt = {name: value.detach() for name, value in values(by(rnn), case).items()}
    assert_agree(learnt, values(by_recurrent, case), 1e-12)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = values(by(rnn), case)
        if backend == "hoisted":
            assert_identical(found, learnt)
        assert_agree(found, learnt, 1e-15)


@both
@pytest.mark.parametrize("name", SOME)
def test_nan_in_the_padding_changes_no_bit(name, backend):
    case = draw(BY_NAME[name], 6, 4, 3, 4, "state", "lengths", "resets")
    padding = torch.arange(6)[:, None] >= case.lengths
    path = by(Recurrent(case.cell, backend=backend))
    for reverse in (False, True):
        case = replace(case, reverse=reverse)
        spoilt = replace(case, x=case.x.detach().masked_fill(padding[:, :, None], torch.nan).requires_grad_())
        clean = record(path, case)
        assert_identical(record(path, spoilt), clean)
        assert not clean["gradient of x"][padding].any()


@pytest.mark.parametrize("name", ["MLSTM heads", "LayerNormLSTM", "user: Direction"])
@pytest.mark.parametrize(("backend", "memory"), [("hoisted", "store"), *(("compiled", mode) for mode in MODES)])
def test_rows_that_end_early_or_never_begin_leave_every_gradient_finite(name, backend, memory):
    """Zeros in place of a value that somebody divides by would make NaN of a gradient of zero."""
    case = draw(BY_NAME[name], 7, 4, 3, 4, "state")
    case = replace(case, lengths=torch.tensor([0, 7, 1, 4]))
    rnn = Recurrent(case.cell, backend=backend, memory=memory)
    for reverse in (False, True):
        case = replace(case, reverse=reverse)
        assert_agree(record(by(rnn), case), record(by_recurrent, case), 1e-12)


@pytest.mark.parametrize("memory", MODES[1:])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("hoisted", "LSTM"),
        ("hoisted", "deep"),
        *(("compiled", n) for n in ["LSTM", "MLSTM heads", "deep", "LearnedInitialState"]),
    ],
)
def test_memory_may_be_saved_and_the_numbers_stay(name, memory, backend):
    first = draw(BY_NAME[name], 1, 1, 3, 4)
    rnn = Recurrent(first.cell, backend=backend, memory=memory)
    for T, B, options in [(1, 2, "state"), (17, 5, "state lengths resets"), (10, 3, "state lengths resets reverse")]:
        case = replace(draw(BY_NAME[name], T, B, 3, 4, *options.split()), cell=rnn.cell)
        assert_agree(record(by(rnn), case), record(by_recurrent, case), 1e-12)
    assert rnn.explain().ran == backend


@pytest.mark.parametrize("memory", MODES)
def test_less_memory_is_kept_where_less_is_asked_for(memory):
    case = draw(BY_NAME["LSTM"], 400, 8, 3, 16)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # As much as a run keeps that asks for nothing else.
    sizes = {}
    for mode in ("store", memory):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = Recurrent(case.cell, backend="compiled", memory=mode)(case.x)
        assert held[0].requires_grad
        sizes[mode] = sum(kept.values())
    share = {"store": 1.0, "recompute": 0.5, "sqrt": 0.25}[memory]
    assert sizes[memory] <= share * sizes["store"]


@both
def test_one_trace_serves_every_length_batch_and_weight(backend):
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4, "state")
    rnn = Recurrent(case.cell, backend=backend)
    rnn(case.x)
    plans = dict(rnn._path._plans)
    for T, B in ((1, 1), (9, 2), (3, 12), (2, 0)):
        other = draw(BY_NAME["LSTM"], T, B, 3, 4, seed=T)
        rnn.load_state_dict(Recurrent(other.cell).state_dict())
        other = replace(other, cell=case.cell)
        assert_agree(record(by(rnn), other), record(by_plain, other), 1e-12)
    assert rnn._path._plans == plans


@both
def test_only_so_many_kinds_of_input_are_remembered(backend, monkeypatch):
    monkeypatch.setattr(door, "_KEPT", 2)
    case = draw(BY_NAME["Zoneout"], 2, 2, 3, 4)
    rnn = Recurrent(case.cell, backend=backend)
    for k in range(4):
        case.cell.shares = (k / 100, 0.5)
        rnn(case.x)
    assert len(rnn._path._plans) == len(rnn._path._analyses) == 2


@both
def test_chunks_and_both_directions(backend):
    case = draw(BY_NAME["Stack"], 7, 4, 3, 4, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend=backend)
    first, state = rnn(case.x[:3], case.state, lengths=case.lengths.clamp(max=3), resets=case.resets[:3])
    second, final = rnn(case.x[3:], state, lengths=(case.lengths - 3).clamp(min=0), resets=case.resets[3:])
    expected, expected_final = in_chunks()(case)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(leaves(final), leaves(expected_final), rtol=0, atol=1e-12)
    other = draw(BY_NAME["Stack"], 1, 1, 3, 4, seed=9).cell
    found = [
        Bidirectional(case.cell, other, backend=each)(case.x, lengths=case.lengths, resets=case.resets)[0]
        for each in (backend, "loop")
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["LSTM", "SLSTM heads", "deep", "user: Attending"])
def test_the_number_of_threads_changes_no_bit(name, monkeypatch):
    """Native code is divided among them by rows or by features, whatever the work is worth."""
    from recurra.compiler.llvm import kernel

    monkeypatch.setattr(kernel, "WAKE", 0)
    case = draw(BY_NAME[name], 5, 5, 3, 12, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend="compiled")
    before, found = torch.get_num_threads(), []
    try:
        for threads, meet in ((1, 1 << 60), (2, 1 << 60), (2, 0), (3, 0)):
            monkeypatch.setattr(kernel, "MEET", meet)
            torch.set_num_threads(threads)
            found.append(record(by(rnn), case))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert_agree(each, found[0], 1e-12)
        assert_identical({"y": each["y"]}, {"y": found[0]["y"]})
