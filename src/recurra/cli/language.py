"""Commands around language models."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recurra.cli.talk import closing, print_json, say, table
from recurra.errors import CheckpointError, ConfigError
from recurra.tasks.language_config import LanguageConfig
from recurra.training.config import resolve, to_toml
from recurra.training.progress import duration, for_stderr
from recurra.training.run import Run

DEMO = {"hidden_size": 256, "dropout": 0.1, "epochs": 4, "batch_size": 32, "window": 64, "learning_rate": 5e-3}


def train_language(
    text: Sequence[str],
    folder: Path | None,
    config: Path | None,
    print_config: bool,
    json: bool,
    flags: Mapping[str, Any],
) -> int:
    settings = resolve(LanguageConfig, toml=config, flags=flags)
    if print_config:
        print(to_toml(settings), end="")
        return 0
    from recurra.tasks.language_training import train

    made, position = train(text, folder, settings, for_stderr())
    _report(made, position, json)
    return 0


def resume(folder: Path, json: bool) -> int:
    from recurra.tasks.language_training import resume

    run, position = resume(folder, for_stderr())
    _report(run, position, json)
    return 0


def demo(folder: Path | None) -> int:
    import pydoc_data.topics
    import tempfile

    from recurra.tasks.language import Language
    from recurra.tasks.language_training import train

    topics = pydoc_data.topics.topics
    say(f"The text: Python's own documentation, {len(topics)} topics that every Python carries.")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "demo.txt"
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        run, position = train([str(text)], folder, resolve(LanguageConfig, environ={}, flags=DEMO), for_stderr())
    figures = _measure(Language.load(run), run, "test", streams=16)
    say(f"\nOn text it has never seen: {figures['bits per character']:.3f} bits per character.")
    say("What it writes after 'The ':\n")
    print("The ", end="")
    for piece in Language.load(run).sample("The ", 400, temperature=0.7, seed=1):
        print(piece, end="", flush=True)
    print()
    _report(run, position, json=False)
    return 0


def evaluate(folder: Path, text: Sequence[str], split: str, checkpoint: str, streams: int, json: bool) -> int:
    from recurra.tasks.language import Language

    if streams < 1:
        raise ConfigError(f"expected --streams of at least 1, got {streams}")
    run = _language_run(folder)
    language = Language.load(run, checkpoint)
    figures = _measure(language, run, split, streams) if not text else _measure_text(language, text, streams)
    if json:
        print_json(figures)
        return 0
    shown = {
        k: f"{v:,.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for k, v in figures.items()
    }
    table(f"{folder}, {checkpoint} checkpoint", shown)
    closing({}, [f"recurra sample {folder}", f"recurra complete {folder}"])
    return 0


def sample(
    folder: Path,
    prompt: str,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: str | None,
    checkpoint: str,
    json: bool,
) -> int:
    from recurra.tasks.language import Language

    language = Language.load(_language_run(folder), checkpoint)
    if unread := _unread(language, prompt):
        say(f"not in the vocabulary, and read as <unk>: {', '.join(unread)}")
    pieces = language.sample(prompt, length, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop)
    if json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
        return 0
    first = next(pieces, "")
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if sys.stderr.isatty():
        closing({}, [f"recurra sample {folder} --prompt 'your words' --temperature 0.5", f"recurra complete {folder}"])
    return 0


def complete(folder: Path, count: int, checkpoint: str, json: bool) -> int:
    if not 1 <= count <= 100:
        raise ConfigError(f"expected --count from 1 to 100, got {count}")
    from recurra.cli.complete import Completer, run
    from recurra.tasks.language import Language

    language = Language.load(_language_run(folder), checkpoint)
    completer = Completer(language.model, language.vocabulary)
    return run(completer, sys.stdin, sys.stdout, sys.stderr, count=count, json=json)


def _language_run(folder: Path) -> Run:
    run = Run.open(folder)
    if run.task != "language":
        raise CheckpointError(f"{folder} is a run of the task {run.task!r}; this command wants a language model")
    return run


def _measure(language: Any, run: Run, split: str, streams: int) -> dict[str, Any]:
    from recurra.data.corpus import Corpus
    from recurra.tasks.language import figures, score

    corpus = Corpus.open(run.path / "corpus")
    nats, count = score(language.model, corpus.split(split), streams)
    shown = figures(nats / count, corpus.tokens[split] / corpus.characters[split])
    shown |= _unknown(language, corpus.split(split))
    text = f"{split} part of the run's text"
    return {"text": text, "tokens predicted": count, "nats per token": nats / count, **shown}


def _measure_text(language: Any, text: Sequence[str], streams: int) -> dict[str, Any]:
    import tempfile

    from recurra.data.corpus import encode_file
    from recurra.tasks.language import figures, score

    with tempfile.TemporaryDirectory() as scratch:
        encoded = encode_file(language.vocabulary, text, Path(scratch))
        nats, count = score(language.model, encoded.tokens, streams)
        shown = figures(nats / count, len(encoded.tokens) / encoded.characters) | _unknown(language, encoded.tokens)
    return {"text": " ".join(text), "tokens predicted": count, "nats per token": nats / count, **shown}


def _unread(language: Any, prompt: str) -> list[str]:
    """The words of a prompt that the model does not know."""
    if language.vocabulary.unit != "word":
        return []
    from recurra.data import words

    tokens = language.vocabulary.encode(prompt)
    pairs = zip(words.split(prompt), tokens, strict=True)
    return list(dict.fromkeys(word for word, token in pairs if token == 0 and word != words.UNKNOWN))


def _unknown(language: Any, tokens: Any) -> dict[str, float]:
    """How much of a text the figures say little about, as its words are not in the vocabulary."""
    return {"share of unknown words": float((tokens == 0).mean())} if language.vocabulary.unit == "word" else {}


def _report(run: Run, position: Any, json: bool) -> None:
    """What training made, where it is, and what to try next. Under torchrun, one process speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        return
    best = position.best if position.best is not None else math.nan
    if json:
        facts = {"run": str(run.path), "updates": position.step, "skipped": position.skipped}
        print_json({**facts, "best_validation_loss": position.best, "seconds": round(position.seconds, 1)})
        return
    say(
        f"\nTrained for {duration(position.seconds)}: {position.step:,} updates, "
        f"best validation loss {best:.4f} nats at update {position.best_step:,}."
    )
    closing(
        {
            "run folder": str(run.path),
            "loss curve": str(run.curve),
            "checkpoints": f"{run.checkpoints / 'best.json'}, last.json",
            "metrics": str(run.metrics),
        },
        [f"recurra sample {run.path}", f"recurra complete {run.path}", f"recurra evaluate {run.path}"],
    )
