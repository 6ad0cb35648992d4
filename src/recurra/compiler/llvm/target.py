"""What the machine can do, and native code for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import llvmlite
import llvmlite.binding as binding

import recurra
from recurra.compiler.llvm import cache


@dataclass(frozen=True)
class Target:
    """A kind of CPU: its vectors and LLVM's names for it."""

    cpu: str
    features: str
    vector_bytes: int
    registers: int


@functools.cache
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


@functools.cache
def _initialise() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


# Values never go through memory in the text, and its vectors and tiles are what the machine is to have. What the
# whole pipelines look for beyond this took four fifths of their time and made nothing faster.
PASSES = (
    "always_inliner",
    "global_dead_code_eliminate",
    "simplify_cfg",
    "instruction_combine",
    "loop_rotate",
    "new_gvn",
    "simplify_cfg",
)
CODE = {"opt": 3, "codemodel": "jitdefault", "jit": True}


class Engine:
    """Native code in memory. It lives as long as this object.

    compiled: the code as it came from the compiler, or from the cache.
    """

    def __init__(self, assembly: str, target: Target) -> None:
        _initialise()
        self.compiled = cache.compiled(_content(assembly, target), lambda: _translate(assembly, target))
        machine = _machine(target)
        # An engine must begin with a module; this one is empty.
        self._engine = binding.create_mcjit_compiler(_module("", machine), machine)
        self._engine.add_object_file(binding.object_file.ObjectFileRef.from_data(self.compiled.code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))


def _content(assembly: str, target: Target) -> list[str]:
    """All that the code depends on."""
    llvm = ".".join(map(str, binding.llvm_version_info))
    versions = [recurra.__version__, llvmlite.__version__, llvm, binding.get_default_triple()]
    return [*versions, repr(target), repr(PASSES), repr(CODE), assembly]


def _translate(assembly: str, target: Target) -> bytes:
    machine = _machine(target)
    module = _module(assembly, machine)
    module.verify()
    passes = binding.create_new_module_pass_manager()
    for name in PASSES:
        getattr(passes, f"add_{name}_pass")()
    passes.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    return bytes(machine.emit_object(module))


def _machine(target: Target) -> Any:
    default = binding.Target.from_default_triple()
    return default.create_target_machine(cpu=target.cpu, features=target.features, **CODE)


def _module(assembly: str, machine: Any) -> Any:
    module = binding.parse_assembly(assembly)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    return module
