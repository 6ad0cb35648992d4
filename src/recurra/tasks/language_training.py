"""From text files to a trained language model in a run folder, and on from where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from recurra.data.corpus import Corpus, build_corpus
from recurra.errors import CheckpointError
from recurra.files import write_atomically
from recurra.tasks.language import LanguageTask, identity, read_vocabulary
from recurra.tasks.language_config import LanguageConfig
from recurra.training.checkpoint import load
from recurra.training.distributed import World, world
from recurra.training.loop import Position, Trainer
from recurra.training.progress import Progress, Silent
from recurra.training.run import Run

TASK = "language"


def train(text: Sequence[str], folder: Path | None, config: LanguageConfig, progress: Progress) -> tuple[Run, Position]:
    """Train a language model on text: files, globs, folders, or "-" for standard input.

    ``folder`` is made for the run; None makes ``runs/`` and the name of the first text. Under torchrun every rank calls
    this, and the first one writes.

    Raises DataError for text that cannot be used, ConfigError for settings that cannot, TrainingError when training
    is lost, and Interrupted after Ctrl-C, with everything saved.
    """
    _use_threads(config)
    with world() as everyone:
        everyone.rows(config.training.batch_size)
        run = _prepare(text, folder, config, progress) if everyone.leads else None
        run = Run.open(Path(everyone.tell(str(run.path) if run else "")))
        with run.locked() if everyone.leads else nullcontext():
            return run, _trainer(run, config, everyone, progress).fit()


def resume(folder: Path, progress: Progress) -> tuple[Run, Position]:
    """Go on with a run from its last checkpoint, bit for bit as if it had never stopped.

    Raises CheckpointError where the run or its checkpoint is damaged, and what ``train`` raises.
    """
    run = Run.open(folder)
    if run.task != TASK:
        raise CheckpointError(f"{folder} is a run of the task {run.task!r}, which this version does not know")
    config = run.settings(LanguageConfig)
    _use_threads(config)
    with world() as everyone, run.locked() if everyone.leads else nullcontext():
        return run, _resumed(_trainer(run, config, everyone, progress)).fit()


def _prepare(text: Sequence[str], folder: Path | None, config: LanguageConfig, progress: Progress) -> Run:
    folder = folder or _free_folder(text)
    above = [each for each in folder.parents if not each.exists()]
    run = Run.create(folder, TASK)
    try:
        progress.say("Reading the text ...")
        corpus = build_corpus(
            text,
            run.path / "corpus",
            unit=config.text.unit,
            vocabulary_size=config.text.vocabulary_size,
            validation=config.text.validation,
            test=config.text.test,
        )
        # Whatever does not fit together should show before the folder counts as a run.
        LanguageTask(corpus, config)
        write_atomically(run.path / "vocabulary.json", json.dumps(corpus.vocabulary.to_json(), ensure_ascii=False))
        run.describe(config)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        for each in above:
            with suppress(OSError):
                each.rmdir()
        raise
    return run


def _trainer(run: Run, config: LanguageConfig, everyone: World, progress: Progress) -> Trainer:
    task = LanguageTask(Corpus.open(run.path / "corpus"), config)
    if identity(read_vocabulary(run.path / "vocabulary.json")) != task.identity():
        raise CheckpointError(f"{run.path / 'vocabulary.json'} is not the vocabulary of the run's corpus: put it back")
    if everyone.leads:
        sizes = ", ".join(f"{name} {count:,}" for name, count in task.corpus.tokens.items())
        parameters = sum(p.numel() for p in task.model.parameters())
        progress.say(f"{task.unit.capitalize()}: {sizes}; {len(task.corpus.vocabulary):,} different ones")
        progress.say(f"Model: {parameters:,} parameters; run folder: {run.path}")
    return Trainer(task, run, config.training, everyone, progress if everyone.leads else Silent())


def _resumed(trainer: Trainer) -> Trainer:
    """The trainer where the run's last checkpoint was made."""
    run = trainer.run
    if (run.checkpoints / "last.json").exists():
        trainer.restore(load(run.checkpoints, "last"))
    elif any(run.checkpoints.glob("*.json")):
        raise CheckpointError(
            f"{run.checkpoints / 'last.json'} is missing, and other checkpoints are there: put it back, or copy "
            "best.json to last.json to go on from the best one"
        )
    elif trainer.world.leads:
        # Stopped before its first checkpoint: the beginning is where it stood.
        run.forget_after(-1)
    return trainer


def _use_threads(config: LanguageConfig) -> None:
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)


def _free_folder(text: Sequence[str]) -> Path:
    """``runs/NAME``, or the first of ``runs/NAME-2``, ... that is not there yet."""
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(text[0]).stem).strip("-") or "text"
    candidates = (Path("runs") / (name if k == 1 else f"{name}-{k}") for k in range(1, 10**6))
    return next(path for path in candidates if not path.exists())
