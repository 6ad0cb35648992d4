"""Memory that is used again: never by two at once, never lost, and given back.

Legend: D any feature.
"""

from __future__ import annotations

import gc
import pickle
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurra.compiler import pool
from recurra.compiler.pool import Pool


@pytest.fixture
def small(monkeypatch):
    """A pool that also keeps small values."""
    monkeypatch.setattr(pool, "LEAST", 0)
    return Pool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_is_a_tensor_of_its_own(dtype):
    made = Pool().empty((300, 1001), dtype)
    assert (made.shape, made.dtype, made.is_contiguous(), made._is_view()) == ((300, 1001), dtype, True, False)
    assert made.data_ptr() % 64 == 0
    assert not made.requires_grad
    made.fill_(2.0)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again, made)


def test_memory_comes_back_when_the_last_who_holds_it_goes(small):
    made = small.empty((10, 30), torch.float32)
    address, part = made.data_ptr(), made[3:5].t()
    del made
    assert small.idle == 0
    assert small.empty((10, 30), torch.float32).data_ptr() != address
    del part
    assert small.empty((20, 15), torch.float32).data_ptr() == address


def test_a_value_that_is_a_little_smaller_takes_it_and_one_that_is_much_smaller_does_not(small, monkeypatch):
    made = []

    class Noted(pool.Block):
        def __init__(self, size):
            made.append(size // 4)
            super().__init__(size)

    monkeypatch.setattr(pool, "Block", Noted)
    held = [small.empty((1000,), torch.float32) for _ in range(3)]
    del held[:]
    held = [small.empty((size,), torch.float32) for size in (800, 790, 1001)]
    assert made == [1000, 1000, 1000, 790, 1001]
    assert [value.numel() for value in held] == [800, 790, 1001]


def test_what_has_waited_longest_goes_back_before_there_would_be_more_than_was_ever_held(small, monkeypatch):
    """Floats of four bytes: 300 at a time and no more, in whatever pieces."""
    monkeypatch.setattr(pool, "SPARE", 1)
    held = [small.empty((100,), torch.float32) for _ in range(3)]
    held.pop()
    held.pop()
    assert small.idle == 800
    held.append(small.empty((150,), torch.float32))
    assert small.idle == 0
    del held[:]
    assert small.idle == 1000
    held = [small.empty((40,), torch.float32), small.empty((10,), torch.float32)]
    assert small.idle == 1000
    more = small.empty((1,), torch.float32)
    assert small.idle == 600
    del held[:], more
    held = [small.empty((1000,), torch.float32)]
    assert small.idle == 0


def test_what_is_held_briefly_may_take_what_is_much_larger(small):
    """Else it and a larger value that comes after it would take turns in having each other's memory given up."""
    held = [small.empty((100,), torch.float32)]
    del held[:]
    brief = small.empty((30,), torch.float32, brief=True)
    assert (brief.shape, small.idle) == ((30,), 0)
    del brief
    assert small.idle == 400
    held = [small.empty((30,), torch.float32)]
    assert small.idle == 0


def test_clear_gives_back_what_nobody_holds(small):
    held = small.empty((10,), torch.float32)
    small.empty((10,), torch.float32)
    small.clear()
    assert small.idle == 0
    held.fill_(1.0)
    del held
    assert small.idle == 40
    # Of what was held before nothing is remembered.
    small.empty((5,), torch.float32)
    assert small.idle == 20


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
@settings(deadline=None, max_examples=60)
def test_it_never_has_much_more_than_was_held(steps):
    least, pool.LEAST = pool.LEAST, 0
    try:
        mine, held, most = Pool(), [], 0
        for take, size in steps:
            if take or not held:
                held.append(mine.empty((size,), torch.float32))
            else:
                held.pop(size % len(held))
            most = max(most, sum(loan.block.size for loan in mine._lent.values()))
            assert mine.idle + sum(loan.block.size for loan in mine._lent.values()) <= pool.SPARE * most
    finally:
        pool.LEAST = least


def test_a_loop_that_keeps_its_last_results_needs_no_new_memory(small, monkeypatch):
    made = []
    new = Pool._new
    monkeypatch.setattr(Pool, "_new", lambda self, size: made.append(size) or new(self, size))

    y = None
    for _ in range(5):
        made.clear()
        result, kept = small.empty((100,), torch.float32), small.empty((530,), torch.float32)
        small.empty((310,), torch.float32, brief=True)
        y = result
        del result
        gradient, brief = small.empty((26,), torch.float32), small.empty((640,), torch.float32, brief=True)
        del kept, gradient, brief
    assert y is not None
    assert not made


def test_small_values_are_none_of_its_business():
    mine = Pool()
    mine.empty((10,), torch.float32)
    mine.empty((0, 5), torch.float64)
    assert mine.idle == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
@settings(deadline=None, max_examples=60)
def test_no_two_values_share_memory(steps):
    least, pool.LEAST = pool.LEAST, 0
    try:
        mine, held = Pool(), []
        for number, (take, size) in enumerate(steps):
            if take or not held:
                held.append((mine.empty((size, 3), torch.float32).fill_(number), number))
            else:
                held.pop(size % len(held))
            assert all(bool((value == number).all()) for value, number in held)
    finally:
        pool.LEAST = least


def test_threads_get_memory_of_their_own(small):
    wrong = []

    def work(number: int) -> None:
        for turn in range(300):
            value = small.empty((16, 16), torch.float32).fill_(number + turn)
            other = small.empty((16, 16), torch.float32).fill_(-1)
            if not bool((value == number + turn).all()) or not bool((other == -1).all()):
                wrong.append(number)

    threads = [Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert not small._lent
