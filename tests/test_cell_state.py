"""The verbs of a state: any nesting of tensors with the batch in front.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recurra.cell import (
    Cell,
    describe,
    detach,
    from_flat,
    leaves,
    map_state,
    select_rows,
    to_flat,
    where_rows,
)
from recurra.cells import LSTM, LSTMState
from recurra.errors import ShapeError


class Pair(NamedTuple):
    left: object
    right: object


@st.composite
def states(draw):
    """A state of random structure, its leaves numbered so that no two entries are the same."""
    B = draw(st.integers(0, 4))
    count = iter(range(10**6))

    def leaf(sizes):
        values = [next(count) for _ in range(B * torch.Size(sizes).numel())]
        return torch.tensor(values, dtype=torch.float64).reshape(B, *sizes)

    shapes = st.lists(st.integers(0, 3), max_size=2)
    nested = st.recursive(
        shapes,
        lambda part: st.one_of(
            st.lists(part, min_size=1, max_size=3).map(tuple), st.tuples(part, part).map(lambda p: Pair(*p))
        ),
        max_leaves=6,
    )

    def build(shape):
        if isinstance(shape, list):
            return leaf(shape)
        parts = [build(part) for part in shape]
        return Pair(*parts) if isinstance(shape, Pair) else tuple(parts)

    return build(draw(nested))


def structure(state):
    if isinstance(state, torch.Tensor):
        return tuple(state.shape), state.dtype
    return type(state), [structure(part) for part in state]


def same(one, other) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return structure(one) == structure(other) and all(torch.equal(a, b) for a, b in pairs)


@given(states())
def test_to_flat_and_back_is_the_same_state(state):
    flat = to_flat(state)
    assert flat.shape == (len(leaves(state)[0]), sum(leaf.shape[1:].numel() for leaf in leaves(state)))
    assert same(from_flat(flat, state), state)


@given(states(), st.data())
def test_from_flat_takes_structure_and_dtype_from_its_model_and_rows_from_the_tensor(state, data):
    B = len(leaves(state)[0])
    numbers = data.draw(st.lists(st.integers(0, B - 1), max_size=5) if B else st.just([]))
    rows = torch.tensor(numbers, dtype=torch.int64)
    like = map_state(lambda leaf: leaf.float(), state)
    got = from_flat(to_flat(state)[rows], like)
    assert same(got, map_state(lambda leaf: leaf.float(), select_rows(state, rows)))


@given(states())
def test_leaves_are_in_the_order_of_the_structure(state):
    firsts = [leaf.flatten()[0].item() for leaf in leaves(state) if leaf.numel()]
    assert firsts == sorted(firsts)


@given(states())
def test_map_state_keeps_the_structure_and_meets_each_leaf_with_its_like(state):
    doubled = map_state(lambda leaf: 2 * leaf, state)
    assert structure(doubled) == structure(state)
    back = map_state(lambda twice, once: twice - once, doubled, state)
    assert same(back, state)


@given(states(), st.data())
def test_where_rows_takes_whole_rows_from_one_or_the_other(state, data):
    B = len(leaves(state)[0])
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)), dtype=torch.bool)
    other = map_state(lambda leaf: -1 - leaf, state)
    mixed = where_rows(mask, state, other)
    assert structure(mixed) == structure(state)
    assert same(select_rows(mixed, mask), select_rows(state, mask))
    assert same(select_rows(mixed, ~mask), select_rows(other, ~mask))


@given(states(), st.data())
def test_select_rows_takes_a_mask_or_numbers(state, data):
    B = len(leaves(state)[0])
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)), dtype=torch.bool)
    assert same(select_rows(state, mask), select_rows(state, mask.nonzero()[:, 0]))


@given(states())
def test_detach_keeps_the_numbers_and_drops_the_graph(state):
    grown = map_state(lambda leaf: leaf * torch.ones((), dtype=leaf.dtype, requires_grad=True), state)
    assert all(leaf.requires_grad for leaf in leaves(grown))
    cut = detach(grown)
    assert same(cut, state)
    assert not any(leaf.requires_grad for leaf in leaves(cut))


@given(states())
def test_describe_shows_every_shape(state):
    text = describe(state)
    for leaf in leaves(state):
        assert str(tuple(leaf.shape)) in text
    assert text.count("left=") == text.count("right=") == text.count("Pair(")


def test_describe_reads_like_the_state():
    assert describe(LSTM(2, 8).initial_state(5)) == "LSTMState(h=(5, 8), c=(5, 8))"
    assert describe((torch.zeros(1, 2),)) == "((1, 2),)"
    assert describe(torch.zeros(3)) == "(3,)"
    assert describe([torch.zeros(3)]) == "list"


def test_gradients_pass_through_flat_states_and_chosen_rows():
    state = LSTMState(torch.randn(3, 2, requires_grad=True), torch.randn(3, 4, requires_grad=True))
    mask = torch.tensor([True, False, True])
    chosen = where_rows(mask, from_flat(to_flat(state), state), map_state(torch.zeros_like, state))
    sum(leaf.sum() for leaf in leaves(chosen)).backward()
    for leaf in state:
        assert torch.equal(leaf.grad, mask[:, None].expand_as(leaf).float())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 1), (torch.zeros(2, 1),)),
        ((torch.zeros(2, 1),), torch.zeros(2, 1)),
        ((torch.zeros(2, 1), torch.zeros(2, 1)), (torch.zeros(2, 1),)),
        ((torch.zeros(2, 1),), [torch.zeros(2, 1)]),
        (None, (torch.zeros(2, 1),)),
    ],
)
def test_states_of_different_structure_do_not_meet(one, other):
    with pytest.raises(ShapeError, match=r"differ in structure: .* and .*a step returns a state of the structure"):
        map_state(lambda a, b: a, one, other)


def test_what_is_no_state_is_refused():
    with pytest.raises(ShapeError, match="a tensor or a tuple of states, got list"):
        leaves([torch.zeros(2)])
    with pytest.raises(ShapeError, match="got NoneType"):
        leaves((torch.zeros(2), None))


def test_a_flat_state_of_another_width_is_refused():
    like = LSTM(2, 3).initial_state(4)
    with pytest.raises(ShapeError, match=r"expected a flat state \(B, 6\), got \(4, 7\)"):
        from_flat(torch.zeros(4, 7), like)
    with pytest.raises(ShapeError, match=r"expected a flat state \(B, 6\), got \(6,\)"):
        from_flat(torch.zeros(6), like)


def test_a_cell_says_what_it_lacks():
    class Empty(Cell):
        pass

    with pytest.raises(NotImplementedError, match="Empty has no initial_state"):
        Empty().initial_state(1)
    with pytest.raises(NotImplementedError, match="Empty has no step"):
        Empty().step(None, torch.zeros(1, 1))


def test_zeros_follow_the_cell():
    assert LSTM(2, 3).double().zeros(4, 5, 6).dtype == torch.float64
    assert LSTM(2, 3).zeros(4, 5, 6).shape == (4, 5, 6)
    assert LSTM(2, 3).to(torch.bfloat16).initial_state(2).c.dtype == torch.bfloat16

    class Bare(Cell):
        pass

    assert Bare().zeros(2).dtype == torch.float32
    bare = Bare()
    bare.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    bare.register_buffer("scale", torch.zeros(1, dtype=torch.float64))
    assert bare.zeros(2).dtype == torch.float64


def test_hooks_see_every_step_of_a_cell():
    from recurra.unroll import Recurrent

    cell = LSTM(2, 3)
    seen = []
    cell.register_forward_hook(lambda module, arguments, result: seen.append(result[1]))
    y, _ = Recurrent(cell)(torch.randn(4, 2, 2))
    assert torch.equal(torch.stack(seen), y)
