"""Native products of matrices and sums over rows, against float64 products of PyTorch.

Legend: D any feature.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import fenced, guarded, guards
from recurra import Recurrent, cells
from recurra.compiler.llvm import gemm, gemm_emit
from recurra.compiler.llvm.code import Code
from recurra.compiler.llvm.gemm import Products, Workspace, grid
from recurra.compiler.llvm.target import Target, host
from recurra.compiler.writer import Writer

DTYPES = [torch.float32, torch.float64]
SIZES = [1, 2, 5, 7, 15, 16, 17, 33, 63, 64, 65, 100, 300]
OTHER_TARGETS = {"avx2": Target("haswell", "+avx2,+fma", 32, 16), "sse": Target("x86-64", "", 16, 16)}


def matrix(rows: int, columns: int, turned: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(columns, rows, dtype=dtype).T if turned else torch.randn(rows, columns, dtype=dtype)


def bound(a: torch.Tensor, b: torch.Tensor, extra: torch.Tensor | float = 0.0) -> torch.Tensor:
    """How far each number may be off: every rounding on the way to it as bad as can be."""
    K = a.shape[1]
    return (K + 2) * torch.finfo(a.dtype).eps * (a.double().abs() @ b.double().abs() + abs(extra))


def check(products, a, b, start=None, threads=1) -> torch.Tensor:
    """The product, calculated in memory full of NaN, is what it is to be."""
    members = grid(a.shape[0], -(-b.shape[1] // products.lanes), threads)
    workspace = products.workspace(members[0] * members[1])
    workspace.memory[:] = np.nan
    products._idle[:] = [workspace]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda size, dtype: torch.full(size, torch.nan, dtype=dtype))
        found = products.product(start, a, b, threads)
    true = a.double() @ b.double()
    offset = 0.0 if start is None else start.double()
    torch.testing.assert_close(found.shape, true.shape)
    off = (found.double() - true - offset).abs() - bound(a, b, offset)
    assert found.is_contiguous()
    assert found.dtype is a.dtype
    assert (off <= 0).all(), (*a.shape, b.shape[1], off.max())
    return found


@pytest.fixture(autouse=True)
def _divide_everything(monkeypatch):
    monkeypatch.setattr(gemm, "WAKE", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)))
def test_products_of_all_sizes_agree(turned, dtype):
    products = gemm.products(dtype)
    generator = np.random.default_rng(5)
    for M, N in itertools.product(SIZES, repeat=2):
        K = int(generator.choice([*SIZES, 513]))
        a, b = matrix(M, K, turned[0], dtype), matrix(K, N, turned[1], dtype)
        check(products, a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)))
def test_long_sums_and_wide_matrices_agree(turned, dtype):
    products = gemm.products(dtype)
    for M, K, N in [(7, 10_000, 100), (1030, 513, 70), (5, 1025, 900), (700, 40, 17), (65, 1, 130)]:
        check(products, matrix(M, K, turned[0], dtype), matrix(K, N, turned[1], dtype), torch.randn(N, dtype=dtype))


@given(*[st.integers(1, 80)] * 3, st.booleans(), st.booleans(), st.sampled_from(DTYPES), st.integers(1, 4))
def test_any_product_agrees(M, K, N, turned, turned_too, dtype, threads):
    a, b = matrix(M, K, turned, dtype), matrix(K, N, turned_too, dtype)
    check(gemm.products(dtype), a, b, torch.randn(M, N, dtype=dtype), threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_narrower_vectors_and_fewer_registers_agree_too(target, dtype):
    chosen = OTHER_TARGETS[target]
    if host().vector_bytes < 32 and target == "avx2":
        pytest.skip("this machine has not the instructions")
    products = Products(dtype, chosen)
    for M, K, N in [(1, 1, 1), (7, 17, 5), (33, 600, 65), (100, 63, 300)]:
        for turned in itertools.product([False, True], repeat=2):
            check(
                products, matrix(M, K, turned[0], dtype), matrix(K, N, turned[1], dtype), torch.randn(N, dtype=dtype), 3
            )
    a = torch.randn(1100, 300, dtype=dtype)
    torch.testing.assert_close(products.sums(a, 2), a.double().sum(0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_what_the_sum_begins_with_agrees(dtype):
    M, K, N = 37, 65, 100
    a, b = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype)
    whole = torch.randn(2 * N, 2 * N, dtype=dtype)
    for start in (
        whole[0, :N],
        whole[0, ::2],
        whole[:1, :N],
        whole[:M, :1],
        whole[: 2 * M : 2, 3 : N + 3],
        whole.T[:M, :N],
    ):
        check(gemm.products(dtype), a, b, start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_all_kinds_agree(dtype):
    whole = torch.randn(300, 300, dtype=dtype)
    for a in (whole[3:40, 5:70], whole.T[3:40, 5:70], whole[::3, ::2][:37, :65], whole[:37, :1].expand(37, 65)):
        for b in (whole[7:72, 1:101], whole.T[7:72, 1:101], whole[:130:2, ::3], whole[:1, :100].expand(65, 100)):
            check(gemm.products(dtype), a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 700, 128), (513, 1100, 100), (30, 65, 800), (2, 700, 16), (1, 40, 33)])
def test_the_number_of_threads_changes_no_bit(size, dtype):
    M, K, N = size
    a, b, start = matrix(M, K, True, dtype), matrix(K, N, False, dtype), torch.randn(N, dtype=dtype)
    alone = check(gemm.products(dtype), a, b, start)
    for threads in (2, 3, 4):
        assert torch.equal(check(gemm.products(dtype), a, b, start, threads), alone)


def test_parts_are_as_many_as_threads_and_none_is_empty():
    for M, vectors, threads in itertools.product([1, 2, 7, 512], [1, 2, 3, 7, 32], [1, 2, 3, 4, 6, 16]):
        down, across = grid(M, vectors, threads)
        assert 1 <= down <= M
        assert 1 <= across <= vectors
        assert down * across <= threads
        assert across == 1 or vectors // across >= 2
        if M == 512:
            assert down * across == threads


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_goes_where_it_goes_in_torch(dtype):
    a, b = torch.randn(100, 600, dtype=dtype), torch.randn(600, 70, dtype=dtype)
    a[3, 5], a[50, 599], b[300, 69], b[7, 0] = float("inf"), float("nan"), float("-inf"), 0.0
    expected, found = torch.mm(a, b), gemm.mm(a, b)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-3, atol=1e-3)
    assert found.isnan().any()
    assert found.isinf().any()


@pytest.mark.parametrize("beyond", [0, 1])
def test_nothing_is_read_beyond_the_end_of_a_matrix(beyond):
    """In a process of its own, which dies when it reads what is not there."""
    code = f"import test_compiler_gemm as here; here.run_fenced({beyond}); print('alive')"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.stdout == "alive\n" and done.returncode == 0) == (beyond == 0), done.stderr


def run_fenced(beyond: int) -> None:
    """Products and sums of matrices that end at fences, ``beyond`` numbers too early."""

    def fence(value: torch.Tensor) -> torch.Tensor:
        flat = fenced(value.numpy().ravel()[: value.numel() - beyond])
        return torch.from_numpy(np.lib.stride_tricks.as_strided(flat, value.shape, value.numpy().strides))

    for dtype, (M, K, N) in itertools.product(DTYPES, [(7, 33, 17), (13, 530, 100), (9, 40, 3)]):
        products = gemm.products(dtype)
        for turned in (False, True):
            a, b = (matrix(*size, turned, dtype) for size in ((M, K), (K, N)))
            a, b = (fence(each.T).T if turned else fence(each) for each in (a, b))
            products.product(fence(torch.randn(N, dtype=dtype)), a, b, 1)
        products.sums(fence(torch.randn(K, N, dtype=dtype)), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_beside_the_result_and_the_memory(dtype, monkeypatch):
    products = gemm.products(dtype)
    watched = []

    def empty(size, dtype):
        inner, whole = guarded(np.full(size, np.nan, str(dtype).removeprefix("torch.")))
        watched.append((whole, guards(whole)))
        return torch.from_numpy(inner)

    monkeypatch.setattr(torch, "empty", empty)
    for M, K, N in [(7, 33, 17), (50, 1030, 100), (5, 600, 900), (50, 1030, 3), (7, 5, 1)]:
        memory, whole = guarded(np.full(2 * products.memory, np.nan, products.numpy))
        watched.append((whole, guards(whole)))
        products._idle[:] = [Workspace(2, memory)]
        products.product(None, torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype).T, 2)
        products.sums(torch.randn(M, N, dtype=dtype), 2)
    products._idle.clear()
    assert len(watched) == 15
    assert all(guards(whole) == before for whole, before in watched)


# Sums over rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_rows_agree_to_the_bit_for_any_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr(gemm, "LEAST_SUMS", 0)
    products = gemm.products(dtype)
    for R, D in [(1, 16), (7, 17), (8, 100), (513, 33), (2048, 64), (60, 2100), (5000, 31), (5000, 3), (513, 1)]:
        whole = torch.randn(R, D + 3, dtype=dtype)
        for a in (whole[:, 3:], whole[:, 3:].contiguous()):
            found = products.sums(a, 1)
            allowed = (5 + R / 512 + 64) * torch.finfo(dtype).eps * a.double().abs().sum(0)
            assert ((found.double() - a.double().sum(0)).abs() <= allowed).all()
            for threads in (2, 3, 8):
                assert torch.equal(products.sums(a, threads), found)


def test_sums_of_many_rows_are_precise():
    for D in (16, 3):
        a = torch.rand(200_000, D)
        true = a.double().sum(0)
        assert ((gemm.products(a.dtype).sums(a, 1) - true).abs() <= 10 * torch.finfo(a.dtype).eps * true).all()


# The face of PyTorch


def used(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the native products from here on."""
    calls: list[tuple[int, ...]] = []
    for name in ("product", "sums"):
        native = getattr(Products, name)

        def noted(self, *arguments, native=native):
            calls.append(tuple(arguments[1 if native.__name__ == "product" else 0].shape))
            return native(self, *arguments)

        monkeypatch.setattr(Products, name, noted)
    product, total = Writer.product, Writer.total
    monkeypatch.setattr(Writer, "product", lambda self, c, a, b: calls.append(a.shape) or product(self, c, a, b))
    monkeypatch.setattr(Writer, "total", lambda self, a, R, D: calls.append((R, prod(D))) or total(self, a, R, D))
    return calls


def test_large_products_are_native_and_the_others_torchs(monkeypatch):
    calls = used(monkeypatch)
    large, other = torch.randint(-9, 9, (200, 200)).float(), torch.randint(-9, 9, (200, 200)).float()
    expected = large @ other
    torch.testing.assert_close(gemm.mm(large, other), expected)
    torch.testing.assert_close(gemm.addmm(other[0], large, other), expected + other[0])
    torch.testing.assert_close(gemm.mm(large.T, other[:, :3]), large.T @ other[:, :3])
    native = 3
    assert len(calls) == native
    torch.testing.assert_close(gemm.addmm(other, large, other, beta=2, alpha=0.5), 2 * other + expected / 2)
    small = large[:5, :7]
    torch.testing.assert_close(gemm.mm(small, other[:7]), small @ other[:7])
    for a, b in [(large.bfloat16(), other.bfloat16()), (large.long(), other.long()), (large[:0], other)]:
        assert torch.equal(gemm.mm(a, b), torch.mm(a, b))
    assert torch.equal(gemm.mm(large[:, :0], other[:0]), torch.zeros(200, 200))
    negative = torch.complex(large, other).conj().imag
    assert negative.is_neg()
    assert torch.equal(gemm.mm(negative, large), torch.mm(negative, large))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        gemm.mm(large, other[:100])
    with pytest.raises(RuntimeError, match="dtype"):
        gemm.mm(large, other.double())
    asked = large.clone().requires_grad_()
    gemm.mm(asked, other).sum().backward()
    assert asked.grad is not None
    assert len(calls) == native


def test_large_sums_are_native_and_the_others_torchs(monkeypatch):
    calls = used(monkeypatch)
    a = torch.randn(2000, 300)
    expected = a.double().sum(0).float()
    torch.testing.assert_close(gemm.total(a, [0]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gemm.total(a, [0], True), expected[None], rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    for dim, keepdim in [([1], False), ([0, 1], True), (None, False), ([-1], True)]:
        assert torch.equal(gemm.total(a, dim, keepdim), torch.sum(a, dim, keepdim))
    assert torch.equal(gemm.total(a[:5], [0]), a[:5].sum(0))
    assert torch.equal(gemm.total(a.long(), [0]), a.long().sum(0))
    assert gemm.total(a, [0], dtype=torch.float64).dtype is torch.float64
    assert torch.equal(gemm.column_sums(a.T), a.T.sum(0))
    assert len(calls) == 2


def test_what_is_outside_of_compiled_loops_is_native(monkeypatch):
    calls = used(monkeypatch)
    T, B, I, H = 40, 16, 33, 65
    cell, x = cells.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    rows = T * B
    monkeypatch.setattr(gemm, "LEAST_SUMS", 0)
    results = []
    for backend in ("compiled", "loop"):
        y, _ = Recurrent(cell, backend=backend)(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *cell.parameters()])])
    for found, true in zip(*results, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
    assert {(rows, I), (rows, 4 * H), (T, B * 4 * H)} <= {*calls}
    assert calls.count((4 * H, rows)) == 2


# Mutants


def survives(products: Products) -> bool:
    generator = torch.Generator().manual_seed(3)
    cases = [(13, 1100, 100, False, 1), (13, 1100, 100, True, 1), (8, 40, 65, True, 2), (9, 16, 128, False, 2)]
    try:
        for M, K, N, turned, threads in cases:
            a, b = (matrix(*size, turned, products.dtype) for size in ((M, K), (K, N)))
            check(products, a, b, torch.randn(N, generator=generator, dtype=products.dtype), threads)
        a = torch.randn(601, 100, generator=generator, dtype=products.dtype)
        torch.testing.assert_close(products.sums(a, 2), a.double().sum(0).to(a.dtype), rtol=1e-5, atol=1e-4)
    except AssertionError:
        return False
    return True


def changed(monkeypatch, right: str, wrong: str) -> Products:
    """Native code with the assembly changed, in each place where it says what is right."""
    genuine = gemm_emit.emit

    def emit(dtype, target):
        assembly, memory = genuine(dtype, target)
        assembly, count = re.subn(right, wrong, assembly)
        assert count
        return assembly, memory

    monkeypatch.setattr(gemm, "emit", emit)
    return Products(torch.float32)


def test_no_change_survives(monkeypatch):
    assert survives(changed(monkeypatch, "fmuladd", "fmuladd"))


CHANGES = {
    "sums that begin anew in every block": (r'(%"first_block" = icmp) eq', r"\1 uge"),
    "sums that never begin with what they should": (r'(%"first_block" = icmp) eq', r"\1 ult"),
    "a block of K skipped": (r'(?s)(@"part".*?phi  i64 \[)0', r"\g<1>1"),
    "a part that nobody takes": (r'(?s)(@"product".*?atomicrmw.*?atomicrmw[^\n]*) 1 ', r"\1 2 "),
    "a pack of half the columns": (r'(?s)(@"pack".*?phi  i64 \[)0', r"\g<1>1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_code_is_told_apart(change, monkeypatch):
    assert not survives(changed(monkeypatch, *CHANGES[change]))


def test_numbers_that_are_packed_in_the_wrong_order_are_told_apart(monkeypatch):
    monkeypatch.setattr(gemm_emit, "transpose", lambda code, lines: lines)
    assert not survives(Products(torch.float32))


@pytest.mark.parametrize("by", [-1, -2])
def test_a_last_vector_in_the_wrong_place_is_told_apart(by, monkeypatch):
    right = Code.smaller
    monkeypatch.setattr(Code, "smaller", lambda code, one, other: right(code, one, code.plus(other, by)))
    assert not survives(Products(torch.float32))


@pytest.mark.parametrize("heights", [(6, 3, 2), (6, 3), (6, 2)])
def test_rows_that_no_tile_takes_are_told_apart(heights, monkeypatch):
    monkeypatch.setattr(gemm_emit, "HEIGHTS", heights)
    assert not survives(Products(torch.float32))


def test_one_long_sum_is_not_precise_enough(monkeypatch):
    monkeypatch.setattr(gemm_emit, "TURNS", 10**9)
    wrong = Products(torch.float32)
    monkeypatch.setattr(gemm, "products", lambda dtype: wrong)
    with pytest.raises(AssertionError):
        test_sums_of_many_rows_are_precise()
