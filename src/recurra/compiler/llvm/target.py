"""What the machine can do, and native code for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import llvmlite.binding as binding


@dataclass(frozen=True)
class Target:
    """A kind of CPU: its vectors and LLVM's names for it."""

    cpu: str
    features: str
    vector_bytes: int
    registers: int


@cache
def host() -> Target:
    """This machine."""
    _initialise()
    features = binding.get_host_cpu_features()
    flat = str(features.flatten())
    cpu = str(binding.get_host_cpu_name())
    if features.get("avx512f"):
        # Without this LLVM splits vectors in two on machines that have whole ones.
        return Target(cpu, flat + ",-prefer-256-bit", 64, 32)
    if features.get("avx2"):
        return Target(cpu, flat, 32, 16)
    arm = binding.get_default_triple().startswith(("aarch64", "arm64"))
    return Target(cpu, flat, 16, 32 if arm else 16)


@cache
def _initialise() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


class Engine:
    """Native code in memory. It lives as long as this object."""

    def __init__(self, assembly: str, target: Target) -> None:
        _initialise()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=target.cpu, features=target.features, opt=3, codemodel="jitdefault", jit=True
        )
        module = binding.parse_assembly(assembly)
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        module.verify()
        # The vectors and tiles are already in the text: what would look for more only costs time.
        options = binding.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = False
        options.slp_vectorization = False
        options.loop_unrolling = False
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))
