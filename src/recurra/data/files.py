"""Which files a list of names means, and what is in them, a chunk at a time."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import fnmatch
import io
import itertools
import os
import stat
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn, TypeAlias

from recurra.data.output import create_temporary, writing
from recurra.errors import DataError, suggest

# "-" is standard input.
Source: TypeAlias = Path | Literal["-"]

CHUNK = 1 << 20
_WILD = "*?["


def expand(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files that ``paths`` name, in order.

    A name is a file, a folder, a pattern, or ``-`` for standard input. A folder stands for the regular files
    in it and below it, sorted. A pattern (``*``, ``?``, ``[ab]``, and ``**`` for any number of folders)
    stands for the regular files that match, sorted. In both, names that begin with a dot are passed over, and
    symbolic links are not followed; a link, a hidden file or a pipe can still be named itself.

    Raises DataError for a name that stands for no file, for a device, and for a file that is named twice,
    which would put the same text into the training part and into the held-out parts.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else paths
    sources = [source for name in names for source in _expand_one(os.fspath(name))]
    if not sources:
        raise DataError(
            "no text was given: name a file, a folder, a pattern such as 'texts/*.txt', or - for standard input"
        )
    seen = set()
    for source in sources:
        place = source if isinstance(source, str) else os.path.realpath(source)
        if place in seen:
            raise DataError(
                f"{name_of(source)} is named twice: name it once, or the same text is trained on and tested on"
            )
        seen.add(place)
    return sources


def name_of(source: Source) -> str:
    """What messages call a source."""
    return "standard input" if isinstance(source, str) else str(source)


def read_byte_chunks(source: Source, chunk: int = CHUNK, name: str | None = None) -> Generator[bytes, None, None]:
    """The bytes of a source as they are, ``chunk`` of them at most at a time.

    ``name`` is what messages call the source. Standard input is read on from where it stands.
    Raises DataError where the source cannot be read.
    """
    name = name or name_of(source)
    try:
        with _opened(source) as file:
            while data := file.read(chunk):
                yield data
    except (OSError, ValueError) as problem:
        raise _unreadable(name, problem) from problem


def read_text_chunks(source: Source, chunk: int = CHUNK, name: str | None = None) -> Iterator[str]:
    r"""The text of a UTF-8 source, ``chunk`` bytes of it at most at a time.

    A byte order mark at the beginning is left out; the line ends ``\r\n`` and ``\r`` become ``\n``.
    Raises DataError, with the place in the file, for what is not UTF-8 and for zero bytes, which no text has.
    """
    name = name or name_of(source)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    beginning, pending, offset = True, b"", 0
    # Closed at once where the text is wrong, and not when the error that shows it is forgotten.
    with contextlib.closing(read_byte_chunks(source, chunk, name)) as pieces:
        chunks = zip(pieces, itertools.repeat(False))
        for fresh, final in itertools.chain(chunks, [(b"", True)]):
            data = pending + fresh
            text, used = _decode(data, final, offset, name)
            pending, offset = data[used:], offset + used
            if beginning and text:
                text, beginning = text.removeprefix("\ufeff"), False
            if text := newlines.decode(text, final):
                yield text


@contextlib.contextmanager
def rereadable(sources: Sequence[Source], folder: Path) -> Iterator[list[tuple[str, Path]]]:
    """Each source as its name and a file that can be read more than once.

    Standard input and pipes are copied into temporary files in ``folder``, gone when the block ends.
    Raises DataError where they cannot be read, or the folder is full.
    """
    # Around the whole block: closing a copy on a full disk fails once more.
    with writing(folder), contextlib.ExitStack() as stack:
        yield [(name_of(source), _rereadable(source, folder, stack)) for source in sources]


def _rereadable(source: Source, folder: Path, stack: contextlib.ExitStack) -> Path:
    if isinstance(source, Path) and source.is_file():
        return source
    path, copy = create_temporary(folder, "pipe")
    stack.callback(path.unlink)
    stack.enter_context(copy)
    copy.writelines(read_byte_chunks(source))
    copy.flush()
    return path


def _expand_one(name: str) -> Sequence[Source]:
    if name == "-":
        return ["-"]
    if name == "":
        raise DataError("the name of a file is empty: name a file, a folder, a pattern, or - for standard input")
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if any(wild in name for wild in _WILD):
            return _matches(path)
        _missing(path)
    except (OSError, ValueError) as problem:
        raise _unreadable(repr(name), problem) from problem
    if stat.S_ISDIR(mode):
        found, links = _files_below(path)
        if not found:
            raise DataError(f"the folder {name!r} has no files to read{_passed_over(links)}: name a folder with text")
        return sorted(found)
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise DataError(f"{name!r} is a device or a socket: name a file, or - for standard input")
    return [path]


def _missing(path: Path) -> NoReturn:
    if path.is_symlink():
        raise DataError(f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there: mend or remove it")
    raise DataError(f"there is no file or folder {str(path)!r}: {_nearby(path.parent, path.name)}")


def _matches(pattern: Path) -> list[Path]:
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if any(wild in part for wild in _WILD))
    root = Path(*parts[:fixed])
    wanted = tuple(part for before, part in itertools.pairwise(("", *parts[fixed:])) if (before, part) != ("**", "**"))
    if not root.is_dir():
        raise DataError(f"nothing matches {str(pattern)!r}: there is no folder {str(root)!r}")
    found, links = _files_below(root, None if "**" in wanted else len(wanted))
    matching = sorted(path for path in found if _fits(path.relative_to(root).parts, wanted))
    if not matching:
        raise DataError(f"no file matches {str(pattern)!r}{_passed_over(links)}: {_nearby(root, '/'.join(wanted))}")
    return matching


def _fits(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[i:], wanted[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _files_below(folder: Path, depth: int | None = None) -> tuple[list[Path], int]:
    """The regular files in a folder, at most ``depth`` levels down, and how many links were passed over."""
    found: list[Path] = []
    links = 0
    pending = [(folder, 1)]
    while pending:
        place, level = pending.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink():
                        links += 1
                    elif entry.is_file(follow_symlinks=False):
                        found.append(place / entry.name)
                    elif entry.is_dir(follow_symlinks=False) and level != depth:
                        pending.append((place / entry.name, level + 1))
        except OSError as problem:
            raise _unreadable(f"the folder {str(place)!r}", problem) from problem
    return found, links


def _passed_over(links: int) -> str:
    return f" ({links} symbolic links in it are not followed: name those you want)" if links else ""


def _nearby(folder: Path, wanted: str) -> str:
    """The end of a sentence about a name that ``folder`` lacks."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return f"there is no folder {str(folder)!r}"
    if not names:
        return f"the folder {str(folder)!r} is empty"
    if len(names) > 12:
        # A large folder is neither listed in a message nor compared name by name without end.
        near = difflib.get_close_matches(wanted, names[:2000], n=1)
        return f"did you mean {near[0]!r}?" if near else f"{str(folder)!r} has {len(names)} others"
    return suggest(wanted, names)


def _opened(source: Source) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, Path):
        return open(source, "rb")
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:
        raise OSError("standard input is closed")
    return contextlib.nullcontext(binary)


def _decode(data: bytes, final: bool, offset: int, name: str) -> tuple[str, int]:
    """The text of ``data`` and how many bytes of it that took: a character that is not complete waits."""
    zero = data.find(b"\0")
    try:
        decoded = codecs.utf_8_decode(data if zero < 0 else data[:zero], "strict", final or zero >= 0)
    except UnicodeDecodeError as problem:
        if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            what = "it looks like UTF-16"
        else:
            what = f"byte 0x{data[problem.start]:02x} at offset {offset + problem.start} (the first is 0)"
        raise DataError(
            f"{name} is not UTF-8 text: {what}; convert it to UTF-8, or train with --unit byte"
        ) from problem
    if zero >= 0:
        raise DataError(
            f"{name} is not text: a zero byte at offset {offset + zero} (the first is 0); train with --unit byte"
        )
    return decoded


def _unreadable(name: str, problem: OSError | ValueError) -> DataError:
    reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return DataError(f"{name} cannot be read: {reason}")
