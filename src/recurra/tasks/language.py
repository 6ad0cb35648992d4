"""Language models: the next character, byte, word or subword, given all before it.

Legend: T time, B batch, I input, H hidden, O output, D any feature; V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra import cells
from recurra.cell import Cell, State, select_rows
from recurra.data.corpus import Corpus
from recurra.data.streams import Streams, cover
from recurra.data.vocabulary import Vocabulary, vocabulary_from_json
from recurra.decoding import decode_stream, generate, until
from recurra.errors import CheckpointError, ConfigError, DataError, ShapeError
from recurra.files import parse_json, read_bytes
from recurra.tasks.language_config import LanguageConfig, ModelConfig
from recurra.training.checkpoint import load, load_into
from recurra.training.run import Run
from recurra.unroll import Recurrent


class LanguageModel(nn.Module):
    """Embedding, a cell over time, readout (Mikolov et al. 2010)::

        h_t, y_t = cell(h_{t-1}, E[token_t])
        logits_t = W_hy y_t + b

    ``tied`` makes W_hy the embedding E itself (Press & Wolf 2017); the cell's output then has its size.
    Raises ShapeError where the cell does not fit.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, cell: Cell, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.rnn = Recurrent(cell)
        self.readout = nn.Linear(cell.output_size, vocabulary_size)
        nn.init.zeros_(self.readout.bias)
        if tied:
            if cell.output_size != embedding_size:
                raise ShapeError(
                    f"a tied readout needs a cell whose output has the embedding's {embedding_size} features, "
                    f"got {cell.output_size}"
                )
            nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
            self.readout.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (T, B) int64 -> logits (T, B, V) of the token after each, and the state after the last."""
        y, state = self.rnn(self.embedding(tokens), state)
        return self.readout(y), state


def build_model(vocabulary_size: int, config: ModelConfig) -> LanguageModel:
    """The language model that a configuration describes."""
    makers: dict[str, Callable[[int, int], Cell]] = {
        "lstm": cells.LSTM,
        "gru": cells.GRU,
        "vanilla": cells.Vanilla,
        "relu": partial(cells.Vanilla, activation=torch.relu),
        "peephole-lstm": cells.PeepholeLSTM,
        "coupled-lstm": cells.CoupledLSTM,
        "layer-norm-lstm": cells.LayerNormLSTM,
        "gru-reset-before": cells.GRUResetBefore,
        "highway": cells.RecurrentHighway,
        "min-gru": cells.MinGRU,
        "min-lstm": cells.MinLSTM,
        "slstm": cells.SLSTM,
        "mlstm": cells.MLSTM,
    }
    layers: list[Cell] = []
    input_size = config.embedding_size
    for layer in range(config.layers):
        last = layer == config.layers - 1
        hidden_size = config.embedding_size if last and config.tied else config.hidden_size
        cell = makers[config.cell](input_size, hidden_size)
        if config.weight_drop:
            if not hasattr(cell, "weight_hh"):
                raise ConfigError(f"weight_drop drops recurrent weights, and the cell {config.cell} has none")
            cell = cells.WeightDrop(cell, config.weight_drop)
        if config.zoneout:
            cell = cells.Zoneout(cell, config.zoneout)
        if config.layer_norm:
            cell = cells.LayerNorm(cell)
        if config.dropout:
            cell = cells.VariationalDropout(cell, input=config.dropout if layer == 0 else 0, output=config.dropout)
        if config.residual and input_size == hidden_size:
            cell = cells.Residual(cell)
        layers.append(cell)
        input_size = hidden_size
    return LanguageModel(vocabulary_size, config.embedding_size, cells.Stack(*layers), config.tied)


class LanguageTask:
    """Training a language model on a corpus, as ``recurra.training.task.Task`` asks for it."""

    def __init__(self, corpus: Corpus, config: LanguageConfig) -> None:
        self.corpus, self.config = corpus, config
        torch.manual_seed(config.training.seed)
        self.model = build_model(len(corpus.vocabulary), config.model)
        self.streams = Streams(corpus.split("train"), config.training.batch_size, config.training.window)
        self.windows = len(self.streams)
        self.unit = {"character": "characters", "byte": "bytes", "word": "words", "subword": "subwords"}[
            corpus.vocabulary.unit
        ]

    def identity(self) -> dict[str, str]:
        return identity(self.corpus.vocabulary)

    def initial_carry(self) -> State:
        with torch.no_grad():
            return self.model.rnn.cell.initial_state(self.config.training.batch_size)

    def loss(self, model: nn.Module, window: int, carry: State, rows: slice) -> tuple[Tensor, int, State]:
        inputs, targets = self.streams.window(window, rows)
        logits, carry = model(inputs, carry)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), targets.numel(), carry

    def evaluate(self, model: nn.Module) -> float:
        assert isinstance(model, LanguageModel)
        nats, count = score(model, self.corpus.split("validation"))
        return nats / count

    def figures(self, loss: float) -> dict[str, float]:
        return figures(loss, self.corpus.tokens["train"] / self.corpus.characters["train"])


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary that training wrote, of a million words if need be. Raises CheckpointError or DataError."""
    return vocabulary_from_json(parse_json(read_bytes(path, limit=2**28), str(path), values=2**22))


def identity(vocabulary: Vocabulary) -> dict[str, str]:
    """A digest of the vocabulary: the same number must stand for the same text."""
    canonical = json.dumps(vocabulary.to_json(), sort_keys=True).encode()
    return {"vocabulary": hashlib.blake2b(canonical, digest_size=16).hexdigest()}


def figures(loss: float, tokens_per_character: float) -> dict[str, float]:
    """Bits per character and perplexity per token, from the mean loss in nats per token."""
    return {
        "bits per character": loss * tokens_per_character / math.log(2),
        "perplexity": math.exp(min(loss, 700.0)),
    }


def score(model: LanguageModel, tokens: np.ndarray, streams: int = 16, window: int = 256) -> tuple[float, int]:
    """The loss of a model on a text: nats in all, and the number of tokens predicted, every one but the first.

    The text is cut into ``streams`` pieces that are read side by side, each from a fresh state; 1 reads it whole.
    """
    model.eval()
    nats, count, state = 0.0, 0, None
    with torch.no_grad():
        for cut in cover(tokens, streams, window):
            if state is not None:
                # What does not divide among the pieces goes on where the last of them ended.
                state = select_rows(state, torch.tensor([-1]))
            for k in range(len(cut)):
                inputs, targets = cut.window(k)
                logits, state = model(inputs, state)
                nats += F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
                count += targets.numel()
    return nats, count


@dataclass(frozen=True)
class Language:
    """A trained language model, ready to write."""

    model: LanguageModel
    vocabulary: Vocabulary
    config: LanguageConfig

    @classmethod
    def load(cls, run: Run, checkpoint: str = "best") -> Language:
        """The model of a run, in evaluation mode. Raises CheckpointError or DataError where a file is damaged."""
        config = run.settings(LanguageConfig)
        vocabulary = read_vocabulary(run.path / "vocabulary.json")
        model = build_model(len(vocabulary), config.model)
        if not any(run.checkpoints.glob("*.json")):
            raise CheckpointError(
                f"the run {run.path} has no checkpoint yet: go on with it by 'recurra resume {run.path}'"
            )
        stored = load(run.checkpoints, checkpoint)
        if stored.facts.get("task") != identity(vocabulary):
            raise CheckpointError(
                f"the vocabulary {run.path / 'vocabulary.json'} is not the one that the checkpoint {checkpoint} was "
                "trained with: put back the file that training wrote"
            )
        weights = {name.removeprefix("model."): t for name, t in stored.tensors.items() if name.startswith("model.")}
        load_into(model, weights)
        model.eval()
        return cls(model, vocabulary, config)

    def step(self, state: State | None, tokens: Tensor) -> tuple[Tensor, State]:
        """One step for every row: tokens (B,) -> logits (B, V) and the state after it."""
        with torch.no_grad():
            logits, state = self.model(tokens[None], state)
        return logits[0], state

    def sample(
        self,
        prompt: str = "",
        length: int = 500,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | None = None,
    ) -> Iterator[str]:
        """Text that goes on from the prompt, piece by piece as it is written; ``length`` tokens at most.

        The same seed gives the same text. ``stop`` ends it before that string.
        Raises DataError for a prompt with characters that the model has never seen.
        """
        if seed is not None and not 0 <= seed < 2**63:
            raise ConfigError(f"expected a seed from 0 to 2**63 - 1, got {seed}")
        tokens = self.vocabulary.encode(prompt, where="the prompt") if prompt else self._beginning()
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        ids = generate(
            self.step,
            None,
            [int(token) for token in tokens],
            length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        # A word is joined to the one before it by a space, or by none: the last of the prompt decides.
        last = tokens[-1:] if prompt and self.vocabulary.unit == "word" else tokens[:0]
        text = decode_stream(self.vocabulary, chain(last.tolist(), ids))
        pieces = _without(len(self.vocabulary.decode(last)), text)
        yield from pieces if stop is None else until(pieces, stop)

    def _beginning(self) -> np.ndarray:
        """What a text begins after: a new line, or any token where the text that was trained on had none."""
        try:
            return self.vocabulary.encode("\n")
        except DataError:
            return np.zeros(1, self.vocabulary.dtype)


def _without(count: int, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a text without its first ``count`` characters."""
    for piece in pieces:
        if piece[count:]:
            yield piece[count:]
        count = max(0, count - len(piece))
