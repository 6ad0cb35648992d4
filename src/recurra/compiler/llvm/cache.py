"""Native code on disk, so that a second process need not compile it again.

Where: the folder ``kernels`` in ``$RECURRA_CACHE_DIR``, else ``$XDG_CACHE_HOME/recurra``, else ``~/.cache/recurra``.
An empty ``RECURRA_CACHE_DIR`` turns the cache off.

The name of an entry is a digest of all that the code depends on: the assembly, the machine, the versions and settings
of what translates it. The assembly, not the program it was written from: then no change of the generator can meet
code of an earlier one, and there is nothing to remember when the generator is changed. A hit still writes the
assembly, which is a tenth of the work.

What is read here is run. That is safe as far as the folder is this user's alone. Folder and files are used only if
they are no links, belong to this user and cannot be written by others. Each entry carries a code (HMAC-SHA-256) over
its name and its contents; the key is a file that only this user can read. So damage, entries under the wrong name and
entries from another folder are noticed before anything looks into them, and are built anew.

Not protected from: whoever can write files as this user, or is root. They can read the key, and could as well change
Python's own files. The folders above are taken as this user's own; in one that others may change they can only have
the cache refused.

The cache is never in the way: where it cannot be used, code is compiled, and ``Compiled.remark`` says why.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recurra import files
from recurra.errors import RecurraError

VARIABLE = "RECURRA_CACHE_DIR"
ENTRIES = 512
BYTES = 256 * 2**20

_MAGIC = b"recurra code 1\n"
_KEY_BYTES = 32
_SEAL_BYTES = 32
_ENTRY_BYTES = 64 * 2**20
_SUFFIX = ".code"
# Nobody takes that long to write an entry: the process was killed.
_ABANDONED_SECONDS = 3600.0
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True)
class Compiled:
    """Native code. found: it was read, not built. remark: why it was not read or could not be kept, if so."""

    code: bytes
    found: bool
    remark: str | None = None


class _Unusable(RecurraError):
    """The cache, or one file of it, cannot be used."""


def compiled(content: Sequence[str], build: Callable[[], bytes]) -> Compiled:
    """The code that ``build`` makes, from the cache if it is there, else built and kept.

    content: all that the code depends on. Raises nothing but what ``build`` raises.
    """
    name = entry_name(content)
    try:
        folder = _open_folder()
        key = _key(folder)
        path = folder / f"{name}{_SUFFIX}"
        raw = _read(path, _ENTRY_BYTES, _OTHERS_WRITE)
    except (RecurraError, OSError) as problem:
        return Compiled(build(), False, _why(problem))
    remark = None
    if raw is not None:
        code = raw[len(_MAGIC) + _SEAL_BYTES :]
        if hmac.compare_digest(raw[: len(_MAGIC) + _SEAL_BYTES], _MAGIC + _seal(key, name, code)):
            # Only the order in which old ones are tidied away depends on it.
            with contextlib.suppress(OSError):
                os.utime(path)
            return Compiled(code, True)
        remark = f"{path} was damaged, or was not written here; it was built anew"
    code = build()
    try:
        _write(path, _MAGIC + _seal(key, name, code) + code)
        _tidy(folder)
    except (RecurraError, OSError) as problem:
        remark = _why(problem)
    return Compiled(code, False, remark)


def entry_name(content: Sequence[str]) -> str:
    """The digest that an entry is found by."""
    digest = hashlib.sha256(_MAGIC)
    for part in content:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def location() -> Path:
    """The folder of the entries. It need not exist. Raises RecurraError where the cache is off."""
    given = os.environ.get(VARIABLE)
    if given == "":
        raise _Unusable(f"{VARIABLE} is empty, which turns the cache off")
    if os.name != "posix":
        raise _Unusable("there is no cache on this system, where the owner of a file cannot be told")
    if given is not None:
        return Path(given).absolute() / "kernels"
    # The XDG Base Directory specification says that a relative one is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "recurra" / "kernels"
    except RuntimeError as problem:
        raise _Unusable(f"this user has no home folder: set {VARIABLE}") from problem


def _open_folder() -> Path:
    """The folder, made if it is not there, and looked at."""
    folder = location()
    try:
        info = folder.lstat()
    except FileNotFoundError:
        files.make_folder(folder.parent)
        # Another process may make it, too; whose it is, is looked at below.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise _Unusable(f"{folder} is not used: it is a link, or no folder")
    _must_be_ours(folder, info, _OTHERS_WRITE)
    return folder


def _must_be_ours(path: Path, info: os.stat_result, closed: int) -> None:
    """``closed`` are the bits of the mode that may not be set."""
    if info.st_uid != os.geteuid():
        raise _Unusable(f"{path} is not used: it belongs to user {info.st_uid}, not to {os.geteuid()}")
    if info.st_mode & closed:
        mode = stat.S_IMODE(info.st_mode)
        raise _Unusable(f"{path} is not used: others have access (mode {mode:o}); close it with chmod go= {path}")


def _read(path: Path, limit: int, closed: int) -> bytes | None:
    """At most limit + 1 bytes of a file that is ours, or None if there is none."""
    try:
        # Opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as problem:
        reason = "it is a link" if problem.errno == errno.ELOOP else files.reason(problem)
        raise _Unusable(f"{path} is not used: {reason}") from problem
    try:
        # Of the file that is open now: a name can be given to another one at any time.
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise _Unusable(f"{path} is not used: it is no regular file")
        _must_be_ours(path, info, closed)
        with open(descriptor, "rb", closefd=False) as handle:
            return handle.read(limit + 1)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with files.replacing(path, len(data)) as handle:
        os.fchmod(handle.fileno(), 0o600)
        handle.write(data)


def _key(folder: Path) -> bytes:
    """The key of this folder's seals, made at first use."""
    path = folder / "key"
    key = _read(path, _KEY_BYTES, _OTHERS_WRITE | _OTHERS_READ)
    if key is not None and len(key) != _KEY_BYTES:
        path.unlink(missing_ok=True)
        key = None
    if key is None:
        # Whole from the moment it has its name, and never in place of one that another process made meanwhile.
        made = files.temporary_for(path)
        try:
            _write(made, secrets.token_bytes(_KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
        finally:
            made.unlink(missing_ok=True)
        key = _read(path, _KEY_BYTES, _OTHERS_WRITE | _OTHERS_READ)
    if key is None or len(key) != _KEY_BYTES:
        raise _Unusable(f"{path} is not used: it was changed while it was made")
    return key


def _seal(key: bytes, name: str, code: bytes) -> bytes:
    return hmac.digest(key, name.encode() + code, "sha256")


def _tidy(folder: Path) -> None:
    """Drops what was used longest ago beyond the bounds, and what killed processes left. At each new entry only."""
    abandoned = time.time() - _ABANDONED_SECONDS
    found = []
    left = files.temporaries(folder)
    for path in folder.iterdir():
        # Another process may tidy, too.
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            if path in left and info.st_mtime < abandoned:
                path.unlink()
            elif path.suffix == _SUFFIX and path not in left:
                found.append((info.st_mtime, info.st_size, path))
    size = 0
    for count, (_, part, path) in enumerate(sorted(found, reverse=True), start=1):
        size += part
        if count > ENTRIES or size > BYTES:
            path.unlink(missing_ok=True)


def _why(problem: RecurraError | OSError) -> str:
    """One sentence. What cannot be written is no loss here, which `recurra.files` cannot know."""
    cause = problem.__cause__ if isinstance(problem.__cause__, OSError) else problem
    if isinstance(problem, _Unusable) or not isinstance(cause, OSError):
        return str(problem)
    where = f"{cause.filename}: " if cause.filename else ""
    return f"the cache of compiled code could not be used: {where}{files.reason(cause)}"
