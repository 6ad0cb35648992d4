"""Threads for native code: PyTorch's own, where they can be had.

PyTorch's OpenMP threads keep spinning for a while after each of its operations. A second pool of threads would
fight them for the cores, so the kernel runs on the same team.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Team:
    """``threads`` threads: the one that asks, and the others."""

    threads: int

    def run(self, function: int, argument: int, threads: int) -> None:
        """Calls the native ``function(argument)`` once on each of ``threads`` threads, and waits for all."""
        if threads == 1:
            _FUNCTION(function)(argument)
            return
        library = openmp()
        if library is not None:
            library.GOMP_parallel(function, argument, threads, 0)
            return
        native = _FUNCTION(function)
        others = [_pool(threads - 1).submit(native, argument) for _ in range(threads - 1)]
        native(argument)
        for other in others:
            other.result()


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch has loaded, if it is GNU's."""
    import torch

    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="recurra")
