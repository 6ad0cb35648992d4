"""Files that appear together and whole, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from recurra.errors import DataError
from recurra.files import DIGEST_BYTES, no_room, reason, sync_folder, temporaries, temporary_for


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns every OSError of the block into a DataError that names the folder."""
    try:
        yield
    except OSError as problem:
        if no_room(problem):
            raise DataError(
                f"{reason(problem)} while writing into {folder}: free space there, or name another folder"
            ) from problem
        raise DataError(f"cannot write into {folder}: {reason(problem)}") from problem


def create_temporary(folder: Path, name: str) -> tuple[Path, BinaryIO]:
    """A new hidden file in the folder, named after ``name`` and open for writing.

    Those that a killed process left behind under the same name are removed. A file belongs to a process for as
    long as it is open there: it is locked, where the file system can do that.
    """
    for old in (path for path, of in temporaries(folder).items() if of == name):
        with contextlib.suppress(OSError), open(old, "r+b") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old.unlink()
    while True:
        path = temporary_for(folder / name)
        file = io.BufferedWriter(io.FileIO(path, "x"))
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another process may have taken it for one left behind, before it was locked.
        if path.exists():
            return path, file
        file.close()


class Output:
    """One file being written: its size and the BLAKE2b digest of its bytes so far."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.temporary, self.file = create_temporary(place.parent, place.name)
        self.size = 0
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.size += memoryview(data).nbytes


class Outputs:
    """Files of one folder, written under temporary names until ``commit``.

    The last file created is the mark that the others are complete: its old version goes before any of them
    takes its place, and its new version comes after all of them. Without a commit nothing in the folder has
    changed. Raises DataError for everything that goes wrong in writing, a full disk too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Output] = []

    def create(self, name: str) -> Output:
        output = Output(self.folder / name)
        self._files.append(output)
        return output

    def commit(self) -> None:
        for output in self._files:
            output.file.flush()
            os.fsync(output.file.fileno())
        self._files[-1].place.unlink(missing_ok=True)
        for output in self._files:
            os.replace(output.temporary, output.place)
        sync_folder(self.folder, DataError)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for output in self._files:
            # A full disk fails once more when a file is closed with something still to write.
            with contextlib.suppress(OSError):
                output.file.close()
            with contextlib.suppress(OSError):
                output.temporary.unlink()
        if isinstance(problem, OSError):
            with writing(self.folder):
                raise problem
