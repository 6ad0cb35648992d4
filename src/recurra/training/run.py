"""A run is a folder: what was asked for, what was measured, what was learned."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurra import __version__
from recurra.errors import CheckpointError, ConfigError
from recurra.files import read_json, write_atomically
from recurra.training.config import C, read_complete, to_toml


@dataclass(frozen=True)
class Run:
    """The folder of one training run.

    ``run.json`` names the task, ``config.toml`` holds every setting, ``metrics.jsonl`` a line for each update and
    evaluation, ``checkpoints`` the last and the best state, ``loss.svg`` the picture. A task adds files of its own.
    """

    path: Path
    task: str

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "loss.svg"

    @classmethod
    def create(cls, path: Path, task: str) -> Run:
        """A new folder for a run. Raises ConfigError where there is something already."""
        if (path / "run.json").exists():
            raise ConfigError(f"{path} is a run: go on with it by 'recurra resume {path}', or choose another --folder")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "a folder that is not empty" if path.is_dir() else "a file"
            raise ConfigError(f"{path} is {what}: choose another --folder, one that is not there yet")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {path}: {error.strerror}") from error
        return cls(path, task)

    def describe(self, config: Any) -> None:
        """Write what was asked for. The run counts as one from here on."""
        import torch

        write_atomically(self.config, f"# recurra train {self.task}\n\n{to_toml(config)}")
        about = {
            "format": "recurra-run",
            "version": 1,
            "task": self.task,
            "recurra": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        }
        write_atomically(self.path / "run.json", json.dumps(about, indent=2) + "\n")

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises CheckpointError where the folder is none."""
        if not (path / "run.json").is_file():
            what = "is no run of recurra's" if path.exists() else "does not exist"
            raise CheckpointError(f"there is no run in {path}, which {what}: name the folder that training made")
        about = read_json(path / "run.json")
        if about.get("format") != "recurra-run" or about.get("version") != 1:
            raise CheckpointError(
                f"{path / 'run.json'} describes no run that this version reads: expected format 'recurra-run', "
                f"version 1, got {about.get('format')!r}, version {about.get('version')!r}"
            )
        return cls(path, str(about.get("task")))

    def settings(self, kind: type[C]) -> C:
        """What was asked for, as a configuration of class ``kind``. Raises CheckpointError where it is damaged."""
        try:
            return read_complete(kind, self.config)
        except ConfigError as error:
            raise CheckpointError(f"the configuration of the run {self.path} is damaged: {error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from training the same run at the same time."""
        try:
            import fcntl
        except ImportError:  # there is no such lock on Windows
            yield
            return
        with open(self.path / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"another process is training the run {self.path}: wait or stop it") from error
            yield

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line that a kill left half-written is passed over."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps beyond a checkpoint: they are going to be taken again."""
        kept = [entry for entry in self.read_metrics() if entry["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
