"""What this machine can do at most: fused multiply-adds on whole vectors, and copies of memory."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch

# Enough that none waits for another, few enough for the registers of AVX2.
CHAINS = 12
ROUNDS = 4_000_000
COPIED = 2**27


def assembly(width: int) -> str:
    """A function of (count, place of 2 + width floats): CHAINS accumulators of ``width`` floats, independent."""
    vector = f"<{width} x float>"
    chains = range(CHAINS)
    starts = "\n".join(f"  %a{k} = phi {vector} [ %v, %entry ], [ %n{k}, %loop ]" for k in chains)
    fma = f"@llvm.fma.v{width}f32"
    works = "\n".join(f"  %n{k} = call {vector} {fma}({vector} %a{k}, {vector} %x, {vector} %y)" for k in chains)
    sums = "\n".join(
        f"  %s{k + 1} = fadd {vector} {'%n0' if k == 0 else f'%s{k}'}, %n{k + 1}" for k in range(CHAINS - 1)
    )
    return f"""
declare {vector} {fma}({vector}, {vector}, {vector})
define void @run(i64 %count, ptr %place) {{
entry:
  %p = load float, ptr %place, align 4
  %py = getelementptr float, ptr %place, i64 1
  %q = load float, ptr %py, align 4
  %pv = getelementptr float, ptr %place, i64 2
  %v = load {vector}, ptr %pv, align 4
  %x0 = insertelement {vector} poison, float %p, i64 0
  %x = shufflevector {vector} %x0, {vector} poison, <{width} x i32> zeroinitializer
  %y0 = insertelement {vector} poison, float %q, i64 0
  %y = shufflevector {vector} %y0, {vector} poison, <{width} x i32> zeroinitializer
  br label %loop
loop:
  %t = phi i64 [ 0, %entry ], [ %u, %loop ]
{starts}
{works}
  %u = add i64 %t, 1
  %more = icmp slt i64 %u, %count
  br i1 %more, label %loop, label %done
done:
{sums}
  store {vector} %s{CHAINS - 1}, ptr %pv, align 4
  ret void
}}
"""


def build(width: int) -> tuple[Any, Any]:
    """The function, to be called without Python's lock, and what keeps it alive."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # LLVM prefers halves on machines that have whole vectors.
    features = llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault", jit=True
    )
    module = llvm.parse_assembly(assembly(width))
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
    return signature(engine.get_function_address("run")), engine


def timed(function: Any, width: int, threads: int) -> float:
    """Seconds of ROUNDS on each of so many threads at once."""
    places = [np.full(2 + width, 0.5, dtype=np.float32) for _ in range(threads)]
    workers = [threading.Thread(target=function, args=(ROUNDS, place.ctypes.data)) for place in places[1:]]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    function(ROUNDS, places[0].ctypes.data)
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    if not all(np.allclose(place[2:], CHAINS * 1.0) for place in places):
        raise ArithmeticError("the kernel that measures the limit computes something else")
    return seconds


def fma_limit(threads: int, repeats: int = 15) -> float:
    """Floating-point operations a second in float32, two for each multiply-add, at the best vector width.

    The fastest of the repeats: a limit that other work on the machine lowers would flatter what is held to it.
    """
    best = 0.0
    for width in (4, 8, 16):
        function, _alive = build(width)
        timed(function, width, threads)
        seconds = min(timed(function, width, threads) for _ in range(repeats))
        best = max(best, 2.0 * CHAINS * width * ROUNDS * threads / seconds)
    return best


def copy_bandwidth(repeats: int = 7) -> float:
    """Bytes a second read and written by a copy larger than the caches, on PyTorch's threads; the median."""
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.zeros(COPIED, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2.0 * COPIED / statistics.median(seconds)
