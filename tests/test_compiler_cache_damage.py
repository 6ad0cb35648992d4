"""Compiled code on disk is private, and built anew whenever anything is wrong with it, or with the disk.

Damage is tried on bytes that stand for code, because a check that is wrong on purpose would otherwise run them; and
then on the real code of a kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import recurra.compiler
from code_cache import CODE, OTHER, ask, built, entry, fresh, kept
from loop_programs import random_operands
from native import agree, program_of
from recurra import files
from recurra.compiler.llvm import cache, target
from recurra.compiler.llvm import kernel as kernel_module
from recurra.compiler.llvm.kernel import Kernel

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no cache on this system")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the entries are. It is not made yet."""
    return fresh(tmp_path, monkeypatch)


# Damage


def damage(raw: bytes, seed: int = 3) -> list[bytes]:
    """The entry with each of 200 bits flipped, cut at each of 50 lengths, and longer."""
    chosen = random.Random(seed)
    size = 8 * len(raw)
    # All of the head as often as all of the code.
    bits = [*chosen.sample(range(min(size, 8 * 47)), 100), *chosen.sample(range(size), 100)]
    lengths = [0, 1, 15, 46, 47, len(raw) - 1, *chosen.sample(range(len(raw)), 44)]
    flipped = [raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :] for bit in bits]
    return [*flipped, *(raw[:length] for length in lengths), raw + b"\0", raw + raw]


def damage_is_noticed(folder):
    ask()
    good = entry(folder).read_bytes()
    for raw in damage(good):
        entry(folder).write_bytes(raw)
        built("was damaged")
        assert ask() == cache.Compiled(OTHER, True)


def test_every_damage_is_noticed_and_built_anew(folder):
    damage_is_noticed(folder)


def test_a_seal_that_is_not_compared_is_told_apart(folder, monkeypatch):
    monkeypatch.setattr(cache.hmac, "compare_digest", lambda ours, theirs: True)
    with pytest.raises(AssertionError):
        damage_is_noticed(folder)


def test_a_seal_of_only_the_beginning_is_told_apart(folder, monkeypatch):
    right = cache._seal
    monkeypatch.setattr(cache, "_seal", lambda key, name, code: right(key, name, code[:900]))
    with pytest.raises(AssertionError):
        damage_is_noticed(folder)


def test_a_damaged_kernel_is_built_anew_and_gives_right_numbers(folder, monkeypatch):
    program = program_of("lstm", 7)
    right = Kernel(program, np.float64)
    monkeypatch.setattr(kernel_module, "emit", lambda *_: (right.assembly, right.layout))
    # Only the text is not translated again each time: that would be half a minute.
    monkeypatch.setattr(target, "_translate", lambda *_: right.compiled.code)
    (path,) = folder.glob("*.code")
    good = path.read_bytes()
    operands = random_operands(program, 2, 5)
    for raw in damage(good, seed=4):
        path.write_bytes(raw)
        kernel = Kernel(program, np.float64)
        assert not kernel.compiled.found
        assert "was damaged" in kernel.compiled.remark
        agree(kernel, operands)
        assert path.read_bytes() == good


def other_names_are_noticed(folder):
    ask("a", CODE)
    ask("b", OTHER)
    os.replace(entry(folder, "b"), entry(folder, "a"))
    found = ask("a", CODE)
    assert (found.code, found.found) == (CODE, False)
    assert kept(folder)


def test_an_entry_under_another_ones_name_is_noticed(folder):
    other_names_are_noticed(folder)


def test_a_seal_without_the_name_is_told_apart(folder, monkeypatch):
    right = cache._seal
    monkeypatch.setattr(cache, "_seal", lambda key, name, code: right(key, "", code))
    with pytest.raises(AssertionError):
        other_names_are_noticed(folder)


def foreign_entries_are_noticed(folder):
    ask("a", OTHER)
    foreign = entry(folder).read_bytes()
    (folder / "key").unlink()
    ask("a", CODE)
    entry(folder).write_bytes(foreign)
    found = ask("a", CODE)
    assert (found.code, found.found) == (CODE, False)


def test_an_entry_from_another_folder_is_noticed(folder):
    """Whoever can put a file there, but not read the key, cannot make one that counts."""
    foreign_entries_are_noticed(folder)


def test_a_seal_without_a_key_is_told_apart(folder, monkeypatch):
    right = cache._seal
    monkeypatch.setattr(cache, "_seal", lambda key, name, code: right(b"", name, code))
    with pytest.raises(AssertionError):
        foreign_entries_are_noticed(folder)


@pytest.mark.parametrize("raw", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_made_anew(raw, folder):
    ask()
    (folder / "key").write_bytes(raw)
    built("was damaged")
    assert ask("a", CODE) == cache.Compiled(OTHER, True)
    assert len((folder / "key").read_bytes()) == 32


# Whose files


def replace_by_link(path: Path) -> None:
    other = path.with_name(path.name + ".other")
    path.rename(other)
    path.symlink_to(other)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def mode(bits: int):
    def change(path: Path) -> None:
        path.chmod(bits | (0o100 if path.is_dir() else 0))

    change.__name__ = f"mode {bits:o}"
    return change


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


FILES = [mode(0o620), mode(0o602), replace_by_link, replace_by_pipe, replace_by_folder]
WRONG = [
    *[("folder", change) for change in (mode(0o720), mode(0o702), mode(0o777), replace_by_link)],
    *[("entry", change) for change in FILES],
    *[("key", change) for change in (mode(0o640), mode(0o604), *FILES)],
]
every_wrong = pytest.mark.parametrize(("what", "change"), WRONG, ids=lambda each: getattr(each, "__name__", each))


def is_refused(folder: Path, what: str, change) -> None:
    ask()
    path = {"folder": folder, "entry": entry(folder), "key": folder / "key"}[what]
    change(path)
    before = path.lstat()
    built(f"{path} is not used")
    assert path.lstat().st_ino == before.st_ino


@every_wrong
def test_what_others_may_write_or_what_is_no_file_is_refused(what, change, folder):
    is_refused(folder, what, change)


def test_a_folder_of_another_user_is_refused(folder, monkeypatch):
    is_refused(folder, "folder", lambda path: monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["folder", "entry", "key"])
def test_what_belongs_to_another_user_is_refused(what, folder):
    is_refused(folder, what, lambda path: os.chown(path, 12345, -1))


def test_a_check_of_owner_and_mode_that_is_left_out_is_told_apart(folder, monkeypatch):
    monkeypatch.setattr(cache, "_must_be_ours", lambda *_: None)
    for what in ("folder", "entry", "key"):
        with pytest.raises(AssertionError):
            is_refused(folder, what, mode(0o602))
        folder.chmod(0o700)


@pytest.mark.parametrize("what", ["folder", "entry", "key"])
def test_a_link_that_is_followed_is_told_apart(what, folder, monkeypatch):
    monkeypatch.setattr(os, "O_NOFOLLOW", 0)
    monkeypatch.setattr(Path, "lstat", Path.stat)
    with pytest.raises(AssertionError):
        is_refused(folder, what, replace_by_link)


def test_a_folder_that_others_may_read_is_used(folder):
    ask()
    folder.chmod(0o755)
    assert kept(folder)


# No room, no right to write


def failing(number: int):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "link", "mkdir", "fchmod"])
def test_what_cannot_be_written_is_no_error(call, number, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        for content in ("a", "b"):
            built(files.reason(OSError(number, os.strerror(number))), content)
    assert not folder.exists() or {each.name for each in folder.iterdir()} <= {"key"}
    ask()
    assert kept(folder)


def test_a_folder_that_can_only_be_read_is_read(folder, monkeypatch):
    ask()
    for call in ("utime", "mkdir", "replace", "link", "fchmod", "unlink"):
        monkeypatch.setattr(os, call, failing(errno.EROFS))
    assert kept(folder)
    built("Read-only file system", "b")


@pytest.mark.parametrize("place", ["file/below", "/proc/recurra", "/dev/null"])
def test_a_folder_that_cannot_be_made_is_no_error(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / place))
    built("could not be used")


# Several processes


HERE = Path(__file__).parent
# The package itself imports PyTorch, which takes a second and is not needed to compile.
BEGIN = (
    "import os, sys, types\n"
    "package = sys.modules['recurra.compiler'] = types.ModuleType('recurra.compiler')\n"
    f"package.__path__ = {list(recurra.compiler.__path__)}\n"
    "from recurra import files\n"
    "from recurra.compiler.llvm import cache\n"
    "assert 'torch' not in sys.modules\n"
)
KILLED = (
    BEGIN + "real, count = os.{call}, [0]\n"
    "def die(*args):\n"
    "    count[0] += 1\n"
    "    if count[0] == {at}: os.kill(os.getpid(), 9)\n"
    "    return real(*args)\n"
    "os.{call} = die\n"
)
ASK = "cache.compiled(['a'], lambda: bytes(1000))\n"
AT_PLACE = (
    "from contextlib import contextmanager\n"
    "@contextmanager\n"
    "def at_place(path, size):\n"
    "    with open(path, 'wb') as handle:\n"
    "        yield handle\n"
    "        handle.flush(); os.fsync(handle.fileno())\n"
    "files.replacing = at_place\n"
)


def kill_while_writing(folder: Path, call: str, at: int, mutant: str = "") -> None:
    """A process is killed at a call while it writes the key or the entry. Nothing but a temporary file is left."""
    program = KILLED.format(call=call, at=at) + mutant + ASK
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = set(files.temporaries(folder))
    whole = {each.name for each in folder.iterdir() if each not in left}
    assert whole <= {"key"}
    assert "key" not in whole or len((folder / "key").read_bytes()) == 32
    assert left
    ask()
    assert kept(folder)
    for each in left:
        assert each.exists()
        os.utime(each, (0, 0))
    ask("another")
    assert {each.suffix for each in folder.iterdir()} == {"", ".code"}


@pytest.mark.parametrize(("call", "at"), [("fsync", 2), ("replace", 1), ("link", 1), ("fsync", 4), ("replace", 2)])
def test_a_process_killed_while_it_writes_leaves_a_temporary_file_for_a_while(call, at, folder):
    kill_while_writing(folder, call, at)


def test_writing_in_place_is_told_apart(folder):
    with pytest.raises(AssertionError):
        kill_while_writing(folder, "fsync", 3, AT_PLACE)


COMPILES = (
    BEGIN + "import numpy as np\nfrom loop_programs import random_operands\nfrom native import agree, program_of\n"
    "from recurra.compiler.llvm.kernel import Kernel\n"
    "print('ready', flush=True); input()\n"
    "kernel = Kernel(program_of('lstm', 7), np.float64)\n"
    "agree(kernel, random_operands(kernel.program, 3, 5))\n"
    "print(kernel.compiled.found, kernel.compiled.remark)\n"
)


def test_six_processes_that_compile_the_same_all_succeed_and_a_seventh_finds_it(folder):
    def start() -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", COMPILES], cwd=HERE, text=True, **pipes)

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start()) for _ in range(6)]
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 6
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            out, err = process.communicate()
            assert (process.returncode, err) == (0, "")
            assert out in ("True None\n", "False None\n")
        assert sorted(each.suffix for each in folder.iterdir()) == ["", ".code"]
        assert stack.enter_context(start()).communicate("\n")[0] == "ready\nTrue None\n"


def test_threads_that_write_drop_and_read_at_once_get_right_code(folder, monkeypatch):
    monkeypatch.setattr(cache, "ENTRIES", 3)
    wrong: list[object] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(40):
            number = chosen.randrange(8)
            found = cache.compiled([str(number)], lambda number=number: bytes([number]) * 100)
            if found.code != bytes([number]) * 100 or found.remark:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
