"""The smallest character model: a vanilla recurrent network that learns to spell one word.

Its inputs are h, e, l, l; its targets e, l, l, o. The two l have different successors, so that the state must remember.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

import torch
from torch.nn import functional as F

from recurra import Recurrent, Stream
from recurra.cells import Readout, Vanilla

WORD = "hello"
LETTERS = sorted(set(WORD))


def main():
    torch.manual_seed(0)
    numbers = torch.tensor([LETTERS.index(letter) for letter in WORD])
    x = F.one_hot(numbers[:-1], len(LETTERS)).float()[:, None]  # (T, 1, I)
    rnn = Recurrent(Readout(Vanilla(len(LETTERS), 8), len(LETTERS)))
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.05)
    for step in range(61):
        y, _ = rnn(x)
        loss = F.cross_entropy(y[:, 0], numbers[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:2}: {loss.item():.3f} nats a letter")

    # Write: each letter is the next input, and the state goes on.
    stream = Stream(rnn.eval())
    written = WORD[0]
    while len(written) < len(WORD):
        letter = F.one_hot(torch.tensor(LETTERS.index(written[-1])), len(LETTERS)).float()
        written += LETTERS[stream.push(letter).argmax()]
    print(written)


if __name__ == "__main__":
    main()
