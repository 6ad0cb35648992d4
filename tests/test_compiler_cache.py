"""Compiled code on disk: found by the next process; what it depends on; where it is, and how much of it."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from code_cache import CODE, OTHER, ask, built, entry, fresh, kept
from loop_programs import random_operands
from native import agree, kernel_of, program_of
from recurra.compiler.build import Builder
from recurra.compiler.llvm import cache, target
from recurra.compiler.llvm import kernel as kernel_module
from recurra.compiler.llvm.kernel import Kernel, kernel_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no cache on this system")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the entries are. It is not made yet."""
    return fresh(tmp_path, monkeypatch)


# What is kept


def test_the_second_time_the_code_is_found(folder):
    assert ask() == cache.Compiled(CODE, False)
    assert ask("a", OTHER) == cache.Compiled(CODE, True)
    assert ask("b", OTHER) == cache.Compiled(OTHER, False)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_whatever_is_usual_for_new_files_these_are_private(umask, folder):
    before = os.umask(umask)
    try:
        ask()
    finally:
        os.umask(before)
    assert kept(folder)


def test_an_error_while_compiling_is_not_the_caches(folder):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.compiled(["a"], fail)
    assert not entry(folder).exists()


def test_a_kernel_from_the_cache_gives_the_same_numbers(monkeypatch):
    program = program_of("lstm", 7)
    first = Kernel(program, np.float64)
    monkeypatch.setattr(target, "_translate", None)
    second = Kernel(program, np.float64)
    assert (first.compiled.found, second.compiled.found) == (False, True)
    assert first.compiled.code == second.compiled.code
    operands = random_operands(program, 5, 9, lengths=True, resets=True)
    for ours, theirs in zip(first(operands), second(operands), strict=True):
        assert [each.tobytes() for each in ours] == [each.tobytes() for each in theirs]
    agree(second, operands)


# Where


def test_the_folder_is_the_given_one_or_the_usual_one(tmp_path, monkeypatch):
    assert cache.location() == tmp_path / "own" / "kernels"
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, expected in ((str(tmp_path / "xdg"), tmp_path / "xdg"), ("", None), ("relative", None)):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache.location() == (expected or tmp_path / "home" / ".cache") / "recurra" / "kernels"
    ask()
    assert kept(cache.location())


def test_an_empty_variable_turns_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        built("RECURRA_CACHE_DIR is empty")
    assert not list(tmp_path.iterdir())


# What the code depends on


def names() -> str:
    return cache.entry_name(target._content("assembly", HOST))


HOST = target.host()
CHANGES = {
    "recurra": ("recurra.__version__", "0.0.0"),
    "llvmlite": ("llvmlite.__version__", "0.0.0"),
    "llvm": ("llvmlite.binding.llvm_version_info", (0, 0, 0)),
    "triple": ("llvmlite.binding.get_default_triple", lambda: "none"),
    "passes": ("recurra.compiler.llvm.target.PASSES", target.PASSES[1:]),
    "code": ("recurra.compiler.llvm.target.CODE", {**target.CODE, "opt": 2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_version_or_setting_does_not_meet_the_code(change, monkeypatch):
    before = names()
    assert names() == before
    monkeypatch.setattr(*CHANGES[change])
    assert names() != before


def test_another_machine_or_assembly_does_not_meet_the_code():
    others = [replace(HOST, cpu="x"), replace(HOST, features="x"), replace(HOST, vector_bytes=8)]
    contents = [target._content("assembly", each) for each in (HOST, *others, replace(HOST, registers=8))]
    contents.append(target._content("assembly ", HOST))
    assert len({cache.entry_name(each) for each in contents}) == len(contents)
    assert cache.entry_name(["ab", "c"]) != cache.entry_name(["a", "bc"])


def test_a_changed_generator_does_not_meet_the_code(monkeypatch):
    program = program_of("lstm", 7)
    right = Kernel(program, np.float64)
    wrong = right.assembly.replace("fsub", "fadd")
    monkeypatch.setattr(kernel_module, "emit", lambda *_: (wrong, right.layout))
    changed = Kernel(program, np.float64)
    assert not changed.compiled.found
    with pytest.raises(AssertionError):
        agree(changed, random_operands(program, 5, 3))


# Bounds


def dropped_first(folder, monkeypatch, name: str, bound: int) -> list[str]:
    """Four entries, one of them used again, then a fifth: which are gone."""
    for place, content in enumerate("abcd"):
        ask(content)
        os.utime(entry(folder, content), (1000 + place, 1000 + place))
    monkeypatch.setattr(cache, name, bound)
    assert kept(folder, "a")
    ask("e")
    return [content for content in "abcde" if not entry(folder, content).exists()]


@pytest.mark.parametrize(("name", "bound"), [("ENTRIES", 3), ("BYTES", 3300)])
def test_what_was_used_longest_ago_is_dropped(name, bound, folder, monkeypatch):
    assert dropped_first(folder, monkeypatch, name, bound) == ["b", "c"]


def test_uses_that_are_not_counted_are_told_apart(folder, monkeypatch):
    right = os.utime
    monkeypatch.setattr(os, "utime", lambda path, times=None: right(path, times) if times else None)
    assert dropped_first(folder, monkeypatch, "ENTRIES", 3) != ["b", "c"]


def test_what_is_found_is_not_tidied_around(folder, monkeypatch):
    ask()
    monkeypatch.setattr(cache, "_tidy", None)
    assert kept(folder)


def test_files_that_are_not_the_caches_stay(folder, monkeypatch):
    ask()
    (folder / "notes.txt").touch()
    dropped_first(folder, monkeypatch, "ENTRIES", 0)
    assert {each.name for each in folder.iterdir()} == {"key", "notes.txt"}


# In one process


def test_equal_programs_share_a_kernel():
    kernel = kernel_for(program_of("lstm", 7), np.float32)
    assert kernel_for(replace(program_of("lstm", 7)), "float32") is kernel
    assert kernel_for(program_of("lstm", 7), np.float64) is not kernel
    assert kernel_for(program_of("lstm", 33), np.float32) is not kernel
    agree(kernel, random_operands(kernel.program, 3, 5))
    assert kernel_module._kernel_for.cache_info().maxsize == 256


def test_programs_that_differ_in_the_sign_of_zero_do_not_share_one():
    def program(zero: float):
        b = Builder()
        carry = b.carry(1)
        return b.finish([b.constant(1.0) / (carry * 0.0 + b.constant(zero))], [carry])

    for zero in (0.0, -0.0):
        kernel = kernel_for(program(zero), np.float64)
        assert kernel_for(program(zero), np.float64) is kernel
    assert kernel_for(program(0.0), np.float64) is not kernel_for(program(-0.0), np.float64)


def test_threads_may_ask_for_kernels_at_once():
    program = program_of("gru_after", 7)
    found = []
    threads = [threading.Thread(target=lambda: found.append(kernel_for(program, np.float64))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    operands = random_operands(program, 3, 5)
    assert len(found) == 8
    for kernel in found:
        agree(kernel, operands)
    assert kernel_for(program, np.float64) is kernel_for(program, np.float64)


def test_the_tests_of_the_whole_suite_have_a_folder_of_their_own(monkeypatch, request):
    monkeypatch.undo()
    assert cache.location().is_relative_to(request.getfixturevalue("tmp_path_factory").getbasetemp())
    assert kernel_of("lstm", 7, np.float64).compiled.remark is None
