"""Files that are whole or not there: replaced in one step, and read with suspicion.

A new version of a file is written under a temporary name beside it, forced to the disk, and then renamed over
the old one. Whoever looks, at any moment and after any crash, finds the old file or the new one.

Functions that take `error` raise what it makes of a message; the others raise CheckpointError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from recurra.errors import CheckpointError, RecurraError

Error = Callable[[str], RecurraError]

DIGEST_BYTES = 32
JSON_BYTES = 64 * 2**20
JSON_VALUES = 2**18
JSON_DEPTH = 64

# Opening a pipe waits for a writer. Windows has no such flag, but one for bytes as they are.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
}


@contextlib.contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """A binary file for the new version of `path`, whose place it takes when the block ends.

    On any error in the block, and on Ctrl-C, the new version is removed and `path` stays as it was. After a
    killed process the temporary file stays behind: `temporaries` finds it. `size` (bytes) is for the message
    only. A link at `path` is itself replaced, not what it points to.

    Raises CheckpointError where the disk is full or the folder cannot be written.
    """
    temporary = temporary_for(path)
    try:
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(problem, OSError):
            raise _unwritable(path, size, problem) from problem
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Make `path` hold `data` (text as UTF-8). Raises CheckpointError, the old file kept, if that fails."""
    raw = data.encode() if isinstance(data, str) else data
    with replacing(path, len(raw)) as handle:
        handle.write(raw)


def make_folder(folder: Path) -> None:
    """Make the folder, and those above it that are missing. Raises CheckpointError where that cannot be."""
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise CheckpointError(f"the folder {folder} cannot be made: {reason(problem)}") from problem
    for place in missing:
        sync_folder(place.parent)


def sync_folder(folder: Path, error: Error = CheckpointError) -> None:
    """Force the folder's list of names to the disk, so that a rename survives a power cut."""
    if os.name == "nt":  # no such call there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as problem:
        # Some network file systems cannot do this for folders at all; there is nothing better to ask of them.
        if problem.errno != errno.EINVAL:
            raise error(f"{folder} cannot be forced to the disk: {reason(problem)}") from problem


def temporary_for(path: Path) -> Path:
    """A new name beside `path`, hidden, for the next version of it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def temporaries(folder: Path) -> dict[Path, str]:
    """The temporary files in `folder`, each with the name of the file that it was to replace."""
    found = ((path, _TEMPORARY.fullmatch(path.name)) for path in folder.iterdir())
    return {path: match[1] for path, match in found if match}


def inside(folder: Path, name: str) -> Path:
    """`folder / name` for a bare file name that stays in the folder; the file need not exist.

    Raises CheckpointError for a path, for `..`, and for a link that leads out of the folder.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise CheckpointError(f"{name!r} is no file name inside {folder}: give a bare name without separators")
    path = folder / name
    try:
        stays = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as problem:
        raise CheckpointError(f"{name!r} is no file name inside {folder}: {problem}") from problem
    if not stays:
        raise CheckpointError(f"{path} is a link that leads out of {folder}: put the file itself there")
    return path


def open_regular(path: Path, error: Error = CheckpointError) -> BufferedReader:
    """The file open for reading. Raises `error` if it is missing, or a folder, pipe or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
    except OSError as problem:
        raise error(f"{path} cannot be read: {reason(problem)}") from problem
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} cannot be read: it is no regular file")
    return open(descriptor, "rb")


def read_bytes(path: Path, limit: int, error: Error = CheckpointError) -> bytes:
    """All of a file of at most `limit` bytes. Raises `error` if it is larger or cannot be read."""
    with open_regular(path, error) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise error(f"{path} has {size} bytes, more than the {limit} that it may have")
        try:
            raw = handle.read(size + 1)
        except OSError as problem:
            raise error(f"{path} cannot be read: {reason(problem)}") from problem
    if len(raw) != size:
        raise error(f"{path} changed from {size} to {len(raw)} bytes while it was read: try again")
    return raw


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; see `parse_json` for what is refused."""
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(raw: bytes, where: str, values: int = JSON_VALUES, error: Error = CheckpointError) -> dict[str, Any]:
    """The object that `raw` (UTF-8) holds; `where` is what error messages call it.

    Refused with an `error`: anything but one JSON object, a key given twice, a number that is not
    finite, more than so many values, and more than 64 levels of lists and objects.
    """
    # Counted before parsing: an empty list of 3 bytes takes 64 in memory. Commas in strings count, too.
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > values:
        raise error(f"{where} holds more than the {values} values that a JSON file may have here")
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_object,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError as problem:
        raise error(_too_deep(where)) from problem
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object, but holds a {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return value
    raise error(_too_deep(where))


def digest(data: bytes | memoryview) -> str:
    """BLAKE2b of 32 bytes, in hexadecimal: finds damage, proves no origin."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def no_room(problem: OSError) -> bool:
    """Whether a disk, a quota or a limit is full."""
    return problem.errno in _NO_ROOM


def reason(problem: OSError) -> str:
    """What went wrong, for the end or the beginning of a sentence."""
    return _NO_ROOM.get(problem.errno or 0) or problem.strerror or str(problem)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text} is not finite")
    return value


def _children(node: Any) -> Any:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _too_deep(where: str) -> str:
    return f"{where} is nested deeper than the {JSON_DEPTH} levels that a JSON file may have here"


def _unwritable(path: Path, size: int | None, problem: OSError) -> CheckpointError:
    kept = "nothing was lost, what was there before is as it was"
    if no_room(problem):
        needs = "more room" if size is None else f"{size} bytes"
        return CheckpointError(f"{reason(problem)}: {path} needs {needs}; {kept}; free space and resume")
    return CheckpointError(f"{path} cannot be written: {reason(problem)}; {kept}")
