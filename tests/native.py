"""Native kernels of the programs in loop_programs.py, and the check that they agree with the interpreter.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from functools import cache

import numpy as np

from loop_programs import PROGRAMS, random_operands
from recurra.compiler.interpret import interpret
from recurra.compiler.ir import Program
from recurra.compiler.llvm.kernel import Kernel, Workspace, addresses
from recurra.compiler.operands import Operands
from recurra.compiler.passes import optimise

TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}


@cache
def program_of(name: str, H: int) -> Program:
    return optimise(PROGRAMS[name](H))


@cache
def kernel_of(name: str, H: int, dtype: type) -> Kernel:
    return Kernel(program_of(name, H), dtype)


def cast(operands: Operands, dtype: type) -> Operands:
    def each(arrays):
        return None if arrays is None else [array.astype(dtype) for array in arrays]

    names = ("inputs", "rows", "vectors", "matrices", "state", "fresh")
    return replace(operands, **{name: each(getattr(operands, name)) for name in names})


GUARD = 67


def guarded(array: np.ndarray, fill: float = np.nan) -> tuple[np.ndarray, np.ndarray]:
    """A copy in the middle of a larger array, and that larger array. No alignment is kept."""
    whole = np.full(array.size + 2 * GUARD, fill, array.dtype)
    inner = whole[GUARD : GUARD + array.size].reshape(array.shape)
    inner[...] = array
    return inner, whole


def guards(whole: np.ndarray) -> bytes:
    return whole[:GUARD].tobytes() + whole[-GUARD:].tobytes()


def agree(kernel: Kernel, operands: Operands, ranges=None, threads: int = 1) -> None:
    """The kernel, on memory full of NaN between guards, gives what the interpreter gives, and writes nothing else."""
    dtype = kernel.dtype.type
    program, T, B = kernel.program, operands.T, operands.B
    given = cast(operands, dtype)
    expected = interpret(program, cast(given, np.float64))
    watched: list[np.ndarray] = []

    def guard(arrays, fill=np.nan):
        pairs = [guarded(array, fill) for array in arrays]
        watched.extend(whole for _, whole in pairs)
        return [inner for inner, _ in pairs]

    names = ("inputs", "rows", "vectors", "fresh", "matrices")
    given = replace(given, **{name: guard(getattr(given, name)) for name in names if getattr(given, name) is not None})
    if given.lengths is not None:
        given = replace(given, lengths=guard([given.lengths], -1)[0])
    if given.resets is not None:
        given = replace(given, resets=guard([given.resets], True)[0])
    nodes = program.nodes
    outputs = guard([np.full((T, B, nodes[place].width), np.nan, dtype) for place in program.outputs])
    state = guard(given.state)
    workspace = kernel.workspace(B, threads)
    for array in workspace.arrays:
        array.view(np.uint8)[...] = 0xFF
    arrays = [*guard(workspace.arrays[:2]), *guard(workspace.arrays[2:], -1)]
    workspace = Workspace(B, threads, *arrays, workspace.words)
    before = [guards(whole) for whole in watched]
    call = kernel.bind(T, B, **addresses(given, outputs, state), threads=threads, workspace=workspace)
    if threads > 1:
        call.share()
    else:
        for begin, end in ranges or [(0, B)]:
            call.run(begin, end)
    assert [guards(whole) for whole in watched] == before, "memory beside an array was written"
    tolerance = TOLERANCE[dtype]
    for found, true in zip([*outputs, *state], [*expected[0], *expected[1]], strict=True):
        largest = np.abs(true).max(initial=1.0)
        np.testing.assert_allclose(found, true, rtol=0, atol=tolerance * largest)


def fenced(array: np.ndarray) -> np.ndarray:
    """A copy that ends where the memory of this process ends: to read one number further is to be killed."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(base + size, page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    inner = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    inner[...] = array
    return inner


def run_fenced(name: str, H: int, dtype: type, beyond: int = 0) -> None:
    """Runs a kernel whose arrays all end at fences, ``beyond`` numbers too early."""
    kernel = kernel_of(name, H, dtype)
    T, B = 2, 5
    given = cast(random_operands(kernel.program, T, B, lengths=True, resets=True), dtype)

    def fence(arrays):
        return [fenced(array.reshape(-1)[beyond:]) if beyond else fenced(array) for array in arrays]

    names = ("inputs", "rows", "vectors", "fresh", "matrices")
    given = replace(given, **{each: fence(getattr(given, each)) for each in names})
    given = replace(given, lengths=fenced(given.lengths), resets=fenced(given.resets))
    outputs, state = fence(kernel.outputs(T, B)), fence(given.state)
    workspace = kernel.workspace(B)
    workspace = Workspace(B, 1, *fence(workspace.arrays[:2]), fenced(workspace.arrays[2]), workspace.words)
    kernel.bind(T, B, **addresses(given, outputs, state), workspace=workspace).run()
