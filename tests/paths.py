"""A case of the proof, and every path that can run one.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

import plain
from catalogue import Entry
from recurra import unroll
from recurra.cell import Cell, State, leaves, map_state
from recurra.stream import Stream


@dataclass(frozen=True)
class Case:
    """A cell and everything one run of it takes. ``state`` None is the cell's own."""

    entry: Entry
    cell: Cell
    x: Tensor
    state: State = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    context: Tensor | None = None

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.cell.named_parameters())

    @property
    def wanted(self) -> dict[str, Tensor]:
        """Everything that a gradient is asked for, by name."""
        wanted = {"x": self.x} | {f"weight {name}": value for name, value in self.parameters.items()}
        for k, leaf in enumerate([] if self.state is None else leaves(self.state)):
            if leaf.is_floating_point():
                wanted[f"state {k}"] = leaf
        return wanted if self.context is None else wanted | {"context": self.context}

    def to(self, dtype: torch.dtype) -> Case:
        """The same case in another precision, its leaves afresh."""

        def move(leaf: Tensor) -> Tensor:
            return leaf.detach().to(dtype).requires_grad_() if leaf.is_floating_point() else leaf

        return replace(
            self,
            cell=copy.deepcopy(self.cell).to(dtype),
            x=move(self.x),
            state=None if self.state is None else map_state(move, self.state),
            context=None if self.context is None else move(self.context),
        )


Path = Callable[[Case], tuple[Tensor, State]]


def by_recurrent(case: Case) -> tuple[Tensor, State]:
    """The path under test: looked up in its module at each call, so that a mutant can stand in."""
    rnn = unroll.Recurrent(case.cell, reverse=case.reverse, backend="loop")
    return rnn(case.x, case.state, lengths=case.lengths, resets=case.resets, context=case.context)


def by_hoisted(case: Case) -> tuple[Tensor, State]:
    """The carry's part of a step in a loop, the rest for all steps at once."""
    rnn = unroll.Recurrent(case.cell, reverse=case.reverse, backend="hoisted")
    return rnn(case.x, case.state, lengths=case.lengths, resets=case.resets, context=case.context)


def by_compiled(case: Case) -> tuple[Tensor, State]:
    """The carry's part of a step as native code, the rest for all steps at once."""
    rnn = unroll.Recurrent(case.cell, reverse=case.reverse, backend="compiled")
    return rnn(case.x, case.state, lengths=case.lengths, resets=case.resets, context=case.context)


def by_plain(case: Case) -> tuple[Tensor, State]:
    """The oracle."""
    return plain.unroll(
        case.entry.oracle,
        case.parameters,
        case.x,
        case.cell.output_size,
        state=case.state,
        lengths=case.lengths,
        resets=case.resets,
        reverse=case.reverse,
        context=case.context,
    )


def by_pieces(case: Case) -> tuple[Tensor, State]:
    """Each row alone at its own length, and each piece between two resets alone from a fresh state."""
    rnn = unroll.Recurrent(case.cell, reverse=case.reverse, backend="loop")
    T, B, _ = case.x.shape
    ys, finals = [], []
    for b in range(B):
        n = T if case.lengths is None else int(case.lengths[b])
        marks = [] if case.resets is None else [t for t in range(n) if case.resets[t, b]]
        if case.reverse:
            cuts = [0, *(t + 1 for t in marks), n]
        else:
            cuts = [0, *marks, n]
        spans = [slice(low, high) for low, high in pairwise(cuts)]
        state = None if case.state is None else map_state(lambda leaf, b=b: leaf[b : b + 1], case.state)
        context = None if case.context is None else case.context[b : b + 1]
        y = {}
        for k, span in enumerate(reversed(spans) if case.reverse else spans):
            y[span.start, span.stop], state = rnn(case.x[span, b : b + 1], state if k == 0 else None, context=context)
        padding = case.x.new_zeros(T - n, 1, case.cell.output_size)
        ys.append(torch.cat([*(y[span.start, span.stop] for span in spans), padding]))
        finals.append(state)
    return torch.cat(ys, dim=1), map_state(lambda *rows: torch.cat(rows), *finals)


def in_chunks(*cuts: int) -> Path:
    """One chunk after another, the state carried from each into the next, with its gradient."""

    def path(case: Case) -> tuple[Tensor, State]:
        rnn = unroll.Recurrent(case.cell, reverse=case.reverse, backend="loop")
        edges = [0, *sorted(cuts), case.x.shape[0]]
        spans = [slice(low, high) for low, high in pairwise(edges)]
        ys: list[Tensor] = []
        state = case.state
        for span in reversed(spans) if case.reverse else spans:
            y, state = rnn(
                case.x[span],
                state,
                lengths=None if case.lengths is None else (case.lengths - span.start).clamp(0, span.stop - span.start),
                resets=None if case.resets is None else case.resets[span],
                context=case.context,
            )
            ys.append(y)
        return torch.cat(ys[::-1] if case.reverse else ys), state

    return path


def truncated(window: int) -> Path:
    """Windows of that many steps, no gradient from one into the one before."""

    def path(case: Case) -> tuple[Tensor, State]:
        rnn = unroll.Recurrent(case.cell, backend="loop")
        options = {"lengths": case.lengths, "resets": case.resets, "context": case.context}
        windows = list(unroll.truncated(rnn, case.x, window, case.state, **options))
        assert torch.cat([torch.arange(len(case.x))[span] for span, _, _ in windows]).tolist() == [*range(len(case.x))]
        return torch.cat([y for _, y, _ in windows]), windows[-1][2]

    return path


def truncated_by_hand(window: int) -> Path:
    """The oracle of truncation: the plain unrolling of each window, from a state cut off by hand."""

    def path(case: Case) -> tuple[Tensor, State]:
        ys, state, T = [], case.state, len(case.x)
        for start in range(0, T, window):
            stop = min(start + window, T)
            if start:
                state = map_state(lambda leaf: leaf.clone().detach(), state)
            piece = replace(
                case,
                x=case.x[start:stop],
                state=state,
                lengths=None if case.lengths is None else (case.lengths - start).clamp(0, stop - start),
                resets=None if case.resets is None else case.resets[start:stop],
            )
            y, state = by_plain(piece)
            ys.append(y)
        return torch.cat(ys), state

    return path


def streamed(case: Case) -> tuple[Tensor, State]:
    """Pushed one step at a time, all rows side by side; resets are the stream's own."""
    stream = Stream(case.cell, case.x.shape[1], case.context)
    if case.state is not None:
        stream.restore(case.state)
    ys = []
    for t, x in enumerate(case.x):
        if case.resets is not None:
            stream.reset(case.resets[t])
        ys.append(stream.push(x))
    return torch.stack(ys), stream.snapshot()


def as_one_row_streams(case: Case) -> tuple[Tensor, State]:
    """Each row in a stream of its own."""
    rows = []
    for b in range(case.x.shape[1]):
        only = slice(b, b + 1)
        rows.append(
            streamed(
                replace(
                    case,
                    x=case.x[:, only],
                    state=None if case.state is None else map_state(lambda leaf, b=only: leaf[b], case.state),
                    resets=None if case.resets is None else case.resets[:, only],
                    context=None if case.context is None else case.context[only],
                )
            )
        )
    return torch.cat([y for y, _ in rows], dim=1), map_state(lambda *r: torch.cat(r), *(s for _, s in rows))


def seeded(path: Path, seed: int = 11) -> Path:
    """The path, with the random numbers of ``seed``."""

    def run(case: Case) -> tuple[Tensor, State]:
        torch.manual_seed(seed)
        return path(case)

    return run


def dropout_by_hand(case: Case) -> tuple[Tensor, State]:
    """Masks drawn as the cell draws them, then the oracle of the bare cell between them."""
    cell = case.cell
    on_x, on_y, _ = cell.draw_context(case.x.shape[1])
    for mask, share in ((on_x, cell.input), (on_y, cell.output)):
        assert set(mask.unique().tolist()) <= {0.0, 1 / (1 - share)}
    inner = plain.inside(case.parameters, "cell.")
    y, final = plain.unroll(
        plain.lstm, inner, case.x * on_x, 4, state=case.state, lengths=case.lengths, reverse=case.reverse
    )
    return y * on_y, final


def zoneout_by_hand(case: Case) -> tuple[Tensor, State]:
    """Masks of each step drawn as the cell draws them; LSTM steps of the oracle between them."""
    shares = case.cell.shares
    inner = plain.inside(case.parameters, "cell.")
    T, B, _ = case.x.shape
    rows = [plain.lstm.first(inner) if case.state is None else plain.row(case.state, b) for b in range(B)]
    ys = []
    for t in range(T):
        masks = [torch.rand(B, 4, dtype=torch.float64) < share if share else None for share in shares]
        for b in range(B):
            (h, c), _ = plain.lstm.step(inner, rows[b], case.x[t, b], None)
            kept = [
                new if mask is None else torch.where(mask[b], old, new)
                for mask, old, new in zip(masks, rows[b], (h, c), strict=True)
            ]
            rows[b] = tuple(kept)
        ys.append(torch.stack([h for h, _ in rows]))
    return torch.stack(ys), plain.together(rows)


def weights_dropped_by_hand(case: Case) -> tuple[Tensor, State]:
    """Weights dropped as the cell drops them, then the oracle of the bare LSTM with them."""
    cell = case.cell
    dropped, _ = cell.draw_context(case.x.shape[1])
    p = plain.inside(case.parameters, "cell.")
    for name in cell.names:
        ratio = (dropped[name] / p[name]).detach()
        kept = (ratio - 1 / (1 - cell.share)).abs() < 1e-12
        assert (kept | (ratio == 0)).all()
        assert kept.any()
        assert not kept.all()
        p[name] = p[name] * ratio
    return plain.unroll(plain.lstm, p, case.x, 4, state=case.state, lengths=case.lengths, reverse=case.reverse)
