"""Products of large matrices, and sums over rows, as native code: what is outside the time loops.

Legend: D any feature.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from recurra.compiler.llvm.gemm_emit import PRODUCT, SUMS, WORDS, emit
from recurra.compiler.llvm.kernel import aligned_empty
from recurra.compiler.llvm.target import Engine, Target, host
from recurra.compiler.llvm.team import Team
from recurra.compiler.pool import POOL

_SHARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DTYPES = frozenset([torch.float32, torch.float64])
# Subclasses may mean something else.
_PLAIN = frozenset([Tensor, nn.Parameter])
# Measured, see docs/lab-notes.md. Multiplications below which PyTorch's product is as fast; rows for which packing the
# other matrix does not pay; numbers below which PyTorch's sum is as fast, and there a second thread gains nothing,
# either; multiplications below which it gains nothing in a product.
LEAST = 500_000
ROWS = 24
LEAST_SUMS = 200_000
WAKE = 800_000


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N), as ``torch.mm``, which it calls for what is not here or is faster there.

    Here is what is float32 or float64 on the CPU and needs no gradient, with any strides. The numbers are the same to
    the bit for any number of threads.
    """
    if _is_worth(a, b) and _is_plain(a) and _is_plain(b):
        return products(a.dtype).product(None, a, b, torch.get_num_threads())
    return torch.mm(a, b)


def addmm(start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta start + alpha a b, as ``torch.addmm``; ``start`` is (M, N) or what can be expanded to it."""
    if beta == alpha == 1 and start.dtype is a.dtype and _is_worth(a, b) and all(map(_is_plain, (start, a, b))):
        return products(a.dtype).product(start, a, b, torch.get_num_threads())
    return torch.addmm(start, a, b, beta=beta, alpha=alpha)


def column_sums(a: Tensor) -> Tensor:
    """The sums over the rows of a (R, D), as ``a.sum(0)``, which it calls for what is not here or is faster there."""
    if a.dim() == 2 and a.numel() >= LEAST_SUMS and a.stride(1) == 1 and a.shape[1] >= 16 and _is_plain(a):
        return products(a.dtype).sums(a, torch.get_num_threads())
    return a.sum(0)


def total(a: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.sum(a, dim, keepdim, dtype=dtype)``."""
    if a.dim() == 2 and dim is not None and list(dim) == [0] and dtype in (None, a.dtype) and a.is_floating_point():
        found = column_sums(a)
        return found[None] if keepdim else found
    return torch.sum(a, dim, keepdim, dtype=dtype)


def _is_worth(a: Tensor, b: Tensor) -> bool:
    """Whether native code is the faster one."""
    if a.dim() != 2 or b.dim() != 2 or a.dtype not in _DTYPES or a.dtype is not b.dtype:
        return False
    (M, K), (length, N) = a.shape, b.shape
    lanes = host().vector_bytes // a.itemsize
    if length != K or M < ROWS or N == 1:
        return False
    if lanes > N:
        # MKL is fast at a few columns only where both matrices lie along K, else it takes up to five times as long.
        return M * K * lanes >= LEAST and not (a.stride(1) == 1 and b.stride(0) == 1)
    return M * K * N >= LEAST


def _is_plain(a: Tensor) -> bool:
    """Whether the numbers are where ``data_ptr`` and the strides say, and nobody asks how they came about."""
    plain = type(a) in _PLAIN and a.dtype in _DTYPES and a.is_cpu and a.layout is torch.strided and not a.is_neg()
    return plain and not (a.requires_grad and torch.is_grad_enabled())


class Products:
    """The native code for ``dtype``, float32 or float64. What it is given must fit; nothing is checked."""

    def __init__(self, dtype: torch.dtype, target: Target | None = None) -> None:
        self.dtype = dtype
        self.numpy = np.dtype(str(dtype).removeprefix("torch."))
        self.target = host() if target is None else target
        self.lanes = self.target.vector_bytes // self.numpy.itemsize
        self.assembly, self.memory = emit(self.numpy, self.target)
        self._engine = Engine(self.assembly, self.target)
        self.addresses = tuple(self._engine.address(name) for name in ("product", "sums"))
        self._native = {address: _SHARE(address) for address in self.addresses}
        # Counters begin at zero.
        self._words, self._sum_words = (
            struct.Struct(f"={len(names)}q{8 * (WORDS - len(names))}x") for names in (PRODUCT, SUMS)
        )
        # What a product begins with that begins with nothing.
        self._zeros = torch.zeros(64, dtype=dtype)
        self.zeros = self._zeros.data_ptr()
        self._idle: list[Workspace] = []

    def product(self, start: Tensor | None, a: Tensor, b: Tensor, threads: int) -> Tensor:
        """start + a b, (M, N). K and N are not 0."""
        M, K = a.shape
        N = b.shape[1]
        b_row, b_column = b.stride()
        if b_row != 1 and b_column != 1:
            b = b.contiguous()
            b_row, b_column = N, 1
        if start is None:
            begin = (self.zeros, 0, 0)
        else:
            start = start.expand(M, N)
            if start.stride(1) != 1:
                start = start.contiguous()
            begin = (start.data_ptr(), start.stride(0), 1)
        c = POOL.empty((M, N), self.dtype)
        row_parts, column_parts = grid(M, -(-N // self.lanes), threads if M * K * N >= WAKE else 1)
        members = row_parts * column_parts
        workspace = self._workspace(members)
        self._words.pack_into(
            workspace.buffer,
            0,
            *(M, N, K, a.data_ptr(), *a.stride(), b.data_ptr(), b_row, b_column, c.data_ptr(), N),
            *begin,
            *(row_parts, column_parts, workspace.memory_address, self.memory),
        )
        self._run(self.addresses[0], workspace, members)
        return c

    def sums(self, a: Tensor, threads: int) -> Tensor:
        """The sums over the rows of a (R, D), each row's numbers side by side."""
        R, D = a.shape
        parts = min(threads, -(-D // self.lanes)) if R * D >= LEAST_SUMS else 1
        out = torch.empty(D, dtype=self.dtype)
        workspace = self._workspace(parts)
        self._sum_words.pack_into(workspace.buffer, 0, R, D, a.data_ptr(), a.stride(0), out.data_ptr(), parts, 0)
        self._run(self.addresses[1], workspace, parts)
        return out

    def workspace(self, members: int) -> Workspace:
        """Memory for calls on up to ``members`` threads."""
        return Workspace(members, aligned_empty(self.memory * members, self.numpy))

    def _workspace(self, members: int) -> Workspace:
        try:
            found = self._idle.pop()
        except IndexError:
            return self.workspace(members)
        return found if found.members >= members else self.workspace(members)

    def _run(self, address: int, workspace: Workspace, members: int) -> None:
        if members == 1:
            self._native[address](workspace.address)
        else:
            Team(members).run(address, workspace.address, members)
        self._idle.append(workspace)


class Workspace:
    """What a call on up to ``members`` threads works in. Contents do not matter."""

    def __init__(self, members: int, memory: np.ndarray) -> None:
        self.members, self.memory = members, memory
        self.memory_address = memory.ctypes.data
        self._words = aligned_empty(WORDS, np.dtype(np.int64))
        self.address, self.buffer = self._words.ctypes.data, self._words.data


@lru_cache(4096)
def grid(M: int, vectors: int, threads: int) -> tuple[int, int]:
    """How many parts C is cut into by rows, and by columns: the division that gives each thread the least to do."""
    options = []
    for across in range(1, threads + 1):
        # A last vector that is moved back needs its neighbour in its own part.
        if threads % across == 0 and (across == 1 or vectors // across >= 2):
            down = min(threads // across, M)
            width = -(-vectors // across)
            # Packing a vector costs as much as multiplying it by two rows.
            options.append(((-(-M // down) + 2) * width, down, across))
    _, down, across = min(options)
    return down, across


@cache
def products(dtype: torch.dtype) -> Products:
    """The native code for this machine, made at first use."""
    return Products(dtype)
