"""Language models small enough to be read again and again, and a program around one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from recurra import cells
from recurra.cli import complete
from recurra.cli.complete import Completer
from recurra.data.vocabulary import Bytes, Characters, Subwords, Words
from recurra.unroll import Recurrent


class Trigram(nn.Module):
    """A table: the logits of the next token, given the last two. The state is the last token and a count."""

    def __init__(self, V: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(2 * torch.randn(V, V, V, dtype=torch.float64, generator=generator))

    def forward(self, tokens, state=None):
        if state is None:
            state = (torch.zeros(tokens.shape[1], dtype=torch.int64), torch.zeros(tokens.shape[1], 1))
        last, count = state
        logits = []
        for token in tokens:
            logits.append(self.table[last, token])
            last, count = token, count + 1
        return torch.stack(logits), (last, count)


def log_probabilities(model, tokens):
    """The log probability of each next token after ``tokens``, by reading them all at once."""
    logits, _ = model(torch.tensor(tokens)[:, None])
    return logits[-1, 0].log_softmax(0).tolist()


TEXT = "the cat sat on the mat.\nthe hat is on  the cat, the car can't.\nthen the mathématicien sat — on mats.\n"


class Tiny(nn.Module):
    """A language model small enough to be read again and again; it counts what it reads."""

    def __init__(self, V):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(V, 4)
        self.rnn = Recurrent(cells.LSTM(4, 6))
        self.readout = nn.Linear(6, V)
        self.read = 0
        self.double()
        with torch.no_grad():
            self.readout.weight *= 4

    def forward(self, tokens, state=None):
        self.read += tokens.numel()
        y, state = self.rnn(self.embedding(tokens), state)
        return self.readout(y), state


def vocabulary_of(unit):
    if unit == "character":
        return Characters(TEXT)
    if unit == "byte":
        return Bytes()
    if unit == "word":
        return Words.learn([TEXT], 20)
    pytest.importorskip("tokenizers")
    return Subwords.learn([TEXT * 5], 290)


MADE = {}


def completer_of(unit, history=complete.HISTORY):
    if unit not in MADE:
        vocabulary = vocabulary_of(unit)
        MADE[unit] = vocabulary, Tiny(len(vocabulary))
    vocabulary, model = MADE[unit]
    return Completer(model, vocabulary, history)


UNITS = ["character", "byte", "word", "subword"]


def typed(unit, text):
    completer = completer_of(unit)
    for character in text:
        completer.type(character)
    return completer


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from small_languages import completer_of
from recurra.cli import complete
if {broken!r}:
    complete.picture = lambda *ignored: 1 / 0
sys.exit(complete.run(completer_of({unit!r}), sys.stdin, sys.stdout, sys.stderr, 3))
"""


def child(unit="character", broken=False, term="xterm", **streams):
    program = PROGRAM.format(tests=str(Path(__file__).parent), unit=unit, broken=broken)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TERM": term}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, **streams)
