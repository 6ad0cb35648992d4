"""Train a character model on tiny shakespeare, 90/5/5, to a validation loss below 1.50 nats a character.

    python benchmarks/shakespeare.py path/to/shakespeare/input.txt

Takes about half an hour on two cores. Writes the run to runs/shakespeare (goes on with it where it is there
already) and the result to benchmarks/results/shakespeare.json. Exits 1 where the bar is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from recurra import __version__
from recurra.data.corpus import Corpus
from recurra.tasks.language import Language, score
from recurra.tasks.language_config import LanguageConfig
from recurra.tasks.language_training import resume, train
from recurra.training.checkpoint import load
from recurra.training.config import resolve
from recurra.training.progress import for_stderr

BAR = 1.50
SETTINGS = {
    "cell": "lstm",
    "hidden_size": 512,
    "embedding_size": 64,
    "dropout": 0.3,
    "batch_size": 32,
    "window": 64,
    "epochs": 12,
    "learning_rate": 3e-3,
    "final_rate": 0.02,
    "weight_decay": 0.02,
    "seed": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="the 1,115,394 characters of tiny shakespeare")
    parser.add_argument("--folder", type=Path, default=Path("runs/shakespeare"))
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if (arguments.folder / "run.json").exists():
        run, position = resume(arguments.folder, for_stderr())
    else:
        config = resolve(LanguageConfig, environ={}, flags={**SETTINGS, "threads": arguments.threads})
        run, position = train([arguments.text], arguments.folder, config, for_stderr())

    corpus, language = Corpus.open(run.path / "corpus"), Language.load(run)
    losses = {}
    for split in ("validation", "test"):
        nats, count = score(language.model, corpus.split(split))
        losses[split] = nats / count
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SETTINGS.items())
    result = {
        "data": "tiny shakespeare, first 90 % of the characters for training, next 5 % validation, last 5 % test",
        "command": f"recurra train language input.txt {flags}",
        "seed": SETTINGS["seed"],
        "parameters": sum(parameter.numel() for parameter in language.model.parameters()),
        "updates": position.step,
        "best_update": load(run.checkpoints, "best").facts["step"],
        "minutes": round(position.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "validation_nats_per_character": round(losses["validation"], 4),
        "test_nats_per_character": round(losses["test"], 4),
        "versions": {"recurra": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    written = Path(__file__).parent / "results" / "shakespeare.json"
    written.parent.mkdir(exist_ok=True)
    written.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    sys.exit(0 if losses["validation"] < BAR else f"the validation loss is not below {BAR}")


if __name__ == "__main__":
    main()
