"""A process that is killed while it saves, or whose disk fills up, leaves a checkpoint that loads."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from recurra import files
from recurra.errors import CheckpointError
from recurra.training import checkpoint, tensor_file
from recurra.training.checkpoint import load, save

# A server that has imported torch once forks the children, each without threads and within milliseconds.
_children = multiprocessing.get_context("forkserver")
_children.set_forkserver_preload(["torch", "pytest", "recurra.training.checkpoint"])

_NAMES = ("last", "best")


def _tensors(step: int, size: int = 50) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((size,), float(step)) for i in range(4)} | {"step": torch.tensor(step)}


def _step_of(folder: Path, name: str) -> int:
    """The step of a checkpoint that is whole and of one step throughout."""
    found = load(folder, name)
    step = found.facts["step"]
    assert all(tensor.eq(step).all() for tensor in found.tensors.values())
    return step


def _steps(folder: Path) -> tuple[int, ...]:
    return tuple(_step_of(folder, name) for name in _NAMES)


# Savers that are wrong


def _saver_in_place(folder: Path, names: Any, tensors: Any, facts: Any) -> None:
    @contextlib.contextmanager
    def overwriting(path: Path, size: int | None = None) -> Iterator[Any]:
        with vars(files).get("open", open)(path, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())

    whole, files.replacing = files.replacing, overwriting
    try:
        save(folder, names, tensors, facts)
    finally:
        files.replacing = whole


def _saver_that_commits_first(folder: Path, names: Any, tensors: Any, facts: Any) -> None:
    plain = tensor_file.plain(tensors)
    record = checkpoint._record(plain, facts)
    for name in names:
        checkpoint._commit(folder, name, record)
    checkpoint._write_tensors(folder, record, plain)
    checkpoint._sweep(folder)


def _saver_that_deletes_first(folder: Path, names: Any, tensors: Any, facts: Any) -> None:
    plain = tensor_file.plain(tensors)
    record = checkpoint._record(plain, facts)
    old = list(folder.glob("*.safetensors"))
    checkpoint._write_tensors(folder, record, plain)
    for path in old:
        os.unlink(path)
    for name in names:
        checkpoint._commit(folder, name, record)


def _saver_that_tidies_between(folder: Path, names: Any, tensors: Any, facts: Any) -> None:
    plain = tensor_file.plain(tensors)
    record = checkpoint._record(plain, facts)
    checkpoint._write_tensors(folder, record, plain)
    for path in folder.glob("*.json"):
        os.unlink(path)
    for name in names:
        checkpoint._commit(folder, name, record)
    checkpoint._sweep(folder)


_MUTANTS = (
    _saver_in_place,
    _saver_that_commits_first,
    _saver_that_deletes_first,
    _saver_that_tidies_between,
)


# Killed at every moment at which the disk changes


@contextlib.contextmanager
def _watched(moment: Callable[[], None]) -> Iterator[None]:
    """Calls `moment` before and after whatever a saver does to the disk, and amid each write."""

    class Halting(io.FileIO):
        def write(self, data: Any) -> int:
            moment()
            done = super().write(data[: len(data) // 2] if len(data) > 100 else data)
            moment()
            return done

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            moment()
            result = call(*args)
            moment()
            return result

        return wrapper

    def open_halting(path: Path, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(Halting(path, mode.replace("b", "")))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(files, "open", open_halting, raising=False)
        yield


def _die_at(last_moment: int, saver: Callable[..., Any], folder: Path) -> None:
    moments = itertools.count()

    def moment() -> None:
        if next(moments) == last_moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with _watched(moment):
        saver(folder, _NAMES, _tensors(2), {"step": 2})


def _moments(saver: Callable[..., Any], folder: Path) -> int:
    moments = itertools.count()
    with _watched(lambda: next(moments)):
        saver(folder, _NAMES, _tensors(2), {"step": 2})
    return next(moments)


def _killed_everywhere(saver: Callable[..., Any], tmp_path: Path) -> Iterator[Path]:
    """The folder after a kill, for each moment of a save over a `last` and a `best` of step 1."""
    start = tmp_path / "start"
    save(start, ("best",), _tensors(0), {"step": 0})
    save(start, ("last",), _tensors(1), {"step": 1})
    shutil.copytree(start, tmp_path / "counted")
    total = _moments(saver, tmp_path / "counted")
    assert _steps(tmp_path / "counted") == (2, 2)
    assert total > 20
    for moment in range(total):
        folder = tmp_path / str(moment)
        shutil.copytree(start, folder)
        child = _children.Process(target=_die_at, args=(moment, saver, folder))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        yield folder


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path):
    found = set()
    leftovers = 0
    for folder in _killed_everywhere(save, tmp_path):
        steps = _steps(folder)
        found.add(steps)
        leftovers += bool(files.temporaries(folder))
        save(folder, ("last",), _tensors(3), {"step": 3})
        assert len(list(folder.iterdir())) == 4
        assert _steps(folder) == (3, steps[1])
    assert found == {(1, 0), (2, 0), (2, 2)}
    assert leftovers > 10


@pytest.mark.parametrize("saver", _MUTANTS)
def test_a_saver_that_is_wrong_is_caught_by_a_kill(tmp_path, saver):
    with pytest.raises(CheckpointError):
        list(map(_steps, _killed_everywhere(saver, tmp_path)))


# Killed at random while saving without a pause


def _keep_saving(folder: Path, reports: Connection) -> None:
    step = _step_of(folder, "last")
    while True:
        step += 1
        names = _NAMES if step % 3 == 0 else ("last",)
        save(folder, names, _tensors(step, size=200_000), {"step": step})
        reports.send((step, names))


def test_fifty_kills_at_random_lose_nothing_that_was_saved(tmp_path):
    chance = random.Random(5)
    save(tmp_path, _NAMES, _tensors(0), {"step": 0})
    saved = dict.fromkeys(_NAMES, 0)
    cut_short = 0
    for _ in range(50):
        reports, theirs = _children.Pipe(duplex=False)
        child = _children.Process(target=_keep_saving, args=(tmp_path, theirs))
        child.start()
        theirs.close()
        assert reports.poll(60)
        assert _step_of(tmp_path, "last") > saved["last"]  # loads while the child goes on saving
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with contextlib.suppress(EOFError, OSError):
            while True:
                step, names = reports.recv()
                saved |= dict.fromkeys(names, step)
        reports.close()
        cut_short += bool(files.temporaries(tmp_path))
        for name in _NAMES:
            assert _step_of(tmp_path, name) in (saved[name], saved["last"] + 1)
        saved = dict(zip(_NAMES, _steps(tmp_path), strict=True))
    assert cut_short > 0
    save(tmp_path, ("last",), _tensors(1), {"step": 1})
    assert len(list(tmp_path.iterdir())) == 4


# A disk that is full


def _save_within(limit: int, folder: Path, tensors: Any, facts: Any, reports: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(folder, _NAMES, tensors, facts)
    except CheckpointError as problem:
        reports.send(str(problem))
    else:
        reports.send("saved")


@pytest.mark.parametrize(
    ("size", "note", "what"),
    [(50_000, "", ".safetensors needs"), (50, "x" * 40_000, "last.json needs")],
    ids=["tensors", "commit"],
)
def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path, size, note, what):
    save(tmp_path, _NAMES, _tensors(1), {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reports, theirs = _children.Pipe(duplex=False)
    arguments = (20_000, tmp_path, _tensors(2, size), {"step": 2, "note": note}, theirs)
    child = _children.Process(target=_save_within, args=arguments)
    child.start()
    theirs.close()
    message = reports.recv()
    child.join()
    assert child.exitcode == 0
    for part in (
        "the limit on the size of a file is reached",
        what,
        "nothing was lost",
        "free space and resume",
    ):
        assert part in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert _steps(tmp_path) == (1, 1)


# A power cut: what was not forced to the disk is gone


def _durable(folder: Path, saver: Callable[..., Any]) -> bool:
    """Whether each file is on the disk, whole, before its rename, and each rename before anything else."""
    synced: dict[int, int] = {}
    renamed = False
    sound = True
    real_fsync, real_replace, real_unlink = os.fsync, os.replace, os.unlink

    def fsync(descriptor: int) -> None:
        nonlocal renamed
        real_fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        renamed = renamed and status.st_ino != folder.stat().st_ino

    def replace(source: Path, target: Path) -> None:
        nonlocal renamed, sound
        status = os.stat(source)
        sound = sound and synced.get(status.st_ino) == status.st_size and not renamed
        real_replace(source, target)
        renamed = True

    def unlink(path: Path) -> None:
        nonlocal sound
        sound = sound and not renamed
        real_unlink(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "unlink", unlink)
        saver(folder, _NAMES, _tensors(2), {"step": 2})
    return sound and not renamed


def _saver_without_sync_of_files(folder: Path, *arguments: Any) -> None:
    real = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: real(descriptor) if os.path.isdir(descriptor) else None)
        save(folder, *arguments)


def _saver_without_sync_of_folders(folder: Path, *arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync_folder", lambda folder: None)
        save(folder, *arguments)


def _saver_that_syncs_too_early(folder: Path, *arguments: Any) -> None:
    @contextlib.contextmanager
    def hasty(path: Path, size: int | None = None) -> Iterator[Any]:
        temporary = path.with_suffix(".new")
        with open(temporary, "xb") as handle:
            yield handle
            os.fsync(handle.fileno())  # the last bytes are still in the buffer
        os.replace(temporary, path)
        files.sync_folder(path.parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "replacing", hasty)
        save(folder, *arguments)


@pytest.mark.parametrize(
    ("saver", "sound"),
    [
        (save, True),
        (_saver_without_sync_of_files, False),
        (_saver_without_sync_of_folders, False),
        (_saver_that_syncs_too_early, False),
    ],
)
def test_nothing_relies_on_what_a_power_cut_can_take(tmp_path, saver, sound):
    save(tmp_path, _NAMES, _tensors(1), {"step": 1})
    assert _durable(tmp_path, saver) == sound
