"""The classic first example: a network of four letters learns to spell hello, one character after another.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recurra import Recurrent, Stream
from recurra.cells import GRU, LSTM, Readout, Vanilla

LETTERS = "helo"
WORD = "hello"


def one_hot(text: str) -> torch.Tensor:
    """(T, 1, 4), a letter a step."""
    return F.one_hot(torch.tensor([[LETTERS.index(letter)] for letter in text]), len(LETTERS)).double()


def learned(kind, steps: int) -> Readout:
    """A network that was shown h, e, l, l and asked for e, l, l, o."""
    cell = Readout(kind(len(LETTERS), 8), len(LETTERS)).double()
    rnn = Recurrent(cell)
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.05)
    wanted = one_hot(WORD[1:])[:, 0].argmax(1)
    for _ in range(steps):
        y, _ = rnn(one_hot(WORD[:-1]))
        loss = F.cross_entropy(y[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return cell.eval()


def spell(cell: Readout) -> tuple[str, torch.Tensor]:
    """What the network says after "h" when it hears itself, and its outputs (T, 4)."""
    stream = Stream(cell)
    text, ys = "h", []
    while len(text) < len(WORD):
        ys.append(stream.push(one_hot(text[-1])[0, 0]))
        text += LETTERS[int(ys[-1].argmax())]
    return text, torch.stack(ys)


@pytest.mark.parametrize("kind", [Vanilla, LSTM, GRU])
def test_a_small_network_learns_to_say_hello_on_its_own(kind):
    cell = learned(kind, 120)
    text, ys = spell(cell)
    assert text == WORD
    together, _ = Recurrent(cell)(one_hot(WORD[:-1]))
    torch.testing.assert_close(ys, together[:, 0].detach(), rtol=0, atol=1e-12)


def test_it_needs_its_state_to_tell_one_l_from_the_next():
    """After the first l comes l, after the second o: no network without memory can say both."""
    cell = learned(Vanilla, 120)
    stream = Stream(cell)
    said = []
    for letter in WORD[:-1]:
        stream.reset()
        said.append(LETTERS[int(stream.push(one_hot(letter)[0, 0]).argmax())])
    assert "".join(said) != WORD[1:]


def test_an_untrained_network_says_something_else():
    assert spell(learned(Vanilla, 0))[0] != WORD
