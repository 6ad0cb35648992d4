"""The commands and their arguments. PyTorch is loaded inside a command, never for its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from recurra import __version__
from recurra.cli.flags import with_settings
from recurra.errors import ConfigError, suggest
from recurra.tasks.language_config import LanguageConfig
from recurra.training.config import settings

app = App(
    name="recurra",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help="Recurrent neural networks: train them on your sequences, look into them, use them.",
)
train = App(name="train", help="Train a network on your data.")
app.command(train)

Checkpoint = Annotated[Literal["best", "last"], Parameter(help="Which state of the run to use.")]
# A single hyphen is standard input, so hyphens must get through here; what else begins with one is refused below.
Text = Annotated[list[str], Parameter(allow_leading_hyphen=True)]
Json = Annotated[bool, Parameter(help="Print the result as JSON, for a program.", negative="", show_default=False)]


@app.command
def demo(*, folder: Annotated[Path | None, Parameter(help="Folder to make; runs/demo by default.")] = None) -> int:
    """Train a small language model on the documentation that Python carries, then let it write.

    Takes about two minutes on two processor cores. Needs no data and no network.
    """
    from recurra.cli.language import demo

    return demo(folder)


@train.command
@with_settings(LanguageConfig)
def language(
    text: Text,
    /,
    *,
    folder: Annotated[Path | None, Parameter(help="Folder to make; runs/ and the text's name by default.")] = None,
    config: Annotated[Path | None, Parameter(help="TOML file with settings.")] = None,
    print_config: Annotated[
        bool,
        Parameter(help="Print all settings as they would be used, and stop.", negative="", show_default=False),
    ] = False,
    json: Json = False,
    **flags: Any,
) -> int:
    """Train a language model on text: it learns to predict the next character, byte, word or subword.

    Settings come from the defaults, then --config, then the environment (RECURRA_HIDDEN_SIZE=512), then flags.

    Parameters
    ----------
    text
        Text files, globs, folders, or - for standard input.
    """
    from recurra.cli.language import train_language

    own = ("folder", "config", "print_config", "json", "help")
    _refuse_options(text, [*own, *settings(LanguageConfig)])
    return train_language(text, folder, config, print_config, json, flags)


@app.command
def resume(run: Path, /, *, json: Json = False) -> int:
    """Go on with a training run exactly where it stopped.

    Parameters
    ----------
    run
        The folder of the run.
    """
    from recurra.cli.language import resume

    return resume(run, json)


@app.command
def evaluate(
    run: Path,
    text: Text | None = None,
    /,
    *,
    split: Annotated[
        Literal["train", "validation", "test"], Parameter(help="Which part of the run's own text.")
    ] = "test",
    checkpoint: Checkpoint = "best",
    streams: Annotated[
        int, Parameter(help="Pieces of the text read side by side, each from a fresh state; 1 reads it whole.")
    ] = 16,
    json: Json = False,
) -> int:
    """Measure a language model on held-out text: bits per character and perplexity.

    Parameters
    ----------
    run
        The folder of a run.
    text
        Other text to measure it on: files, globs, folders, or - for standard input.
    """
    from recurra.cli.language import evaluate

    _refuse_options(text or [], ["split", "checkpoint", "streams", "json", "help"])
    return evaluate(run, text or [], split, checkpoint, streams, json)


@app.command
def sample(
    run: Path,
    /,
    *,
    prompt: Annotated[str, Parameter(help="Text to go on from.")] = "",
    length: Annotated[int, Parameter(help="Characters, bytes, words or subwords to write at most.")] = 500,
    temperature: Annotated[
        float, Parameter(help="Below 1 more careful, above 1 bolder; 0 always the likeliest.")
    ] = 0.8,
    top_k: Annotated[int | None, Parameter(help="Choose among the k likeliest only.")] = None,
    top_p: Annotated[float | None, Parameter(help="Choose among the likeliest that share this probability.")] = None,
    seed: Annotated[int | None, Parameter(help="The same seed writes the same text.")] = None,
    stop: Annotated[str | None, Parameter(help="End before this text.")] = None,
    checkpoint: Checkpoint = "best",
    json: Json = False,
) -> int:
    """Let a language model write.

    Parameters
    ----------
    run
        The folder of a run.
    """
    from recurra.cli.language import sample

    return sample(run, prompt, length, temperature, top_k, top_p, seed, stop, checkpoint, json)


@app.command
def complete(
    run: Path,
    /,
    *,
    count: Annotated[int, Parameter(help="Words to offer.")] = 5,
    checkpoint: Checkpoint = "best",
    json: Json = False,
) -> int:
    """Predictive text: the next words offered while you type.

    At a terminal, Tab takes the first offer and Ctrl-D ends. Otherwise each line of standard input is completed.

    Parameters
    ----------
    run
        The folder of a run.
    """
    from recurra.cli.language import complete

    return complete(run, count, checkpoint, json)


@app.command
def info(path: Path, /, *, json: Json = False) -> int:
    """Show what a run or a checkpoint is: its settings, figures, sizes and files.

    Parameters
    ----------
    path
        The folder of a run, or the .json of a checkpoint.
    """
    from recurra.cli.info import info

    return info(path, json)


@app.command
def env(*, json: Json = False) -> int:
    """Show this machine as recurra sees it: versions, processor, threads, GPU."""
    from recurra.cli.info import env

    return env(json)


def _refuse_options(text: list[str], known: list[str]) -> None:
    for each in text:
        if each.startswith("-") and each != "-":
            options = ["--" + name.replace("_", "-") for name in known]
            raise ConfigError(f"unknown option {each}: {suggest(each.partition('=')[0], options)}")
