"""A training loop of one's own on one long stream, with truncated backpropagation through time.

The stream is a switch: an input is now and then +1 or -1, else 0, and the target is the last one that was not 0.
The state is carried from window to window, so the network knows what was switched on before the window began.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

import torch
from torch.nn import functional as F

from recurra import Recurrent, truncated
from recurra.cells import GRU, Readout

T, B, WINDOW = 1000, 8, 20


def draw():
    """x and target (T, B, 1)."""
    pressed = torch.rand(T, B, 1) < 0.05
    pressed[0] = True
    x = torch.where(pressed, torch.randint(0, 2, (T, B, 1)) * 2.0 - 1, 0)
    last = torch.where(pressed, torch.arange(T)[:, None, None], 0).cummax(0).values
    return x, x.gather(0, last)


def share_right(y, target):
    return (y.sign() == target).float().mean().item()


def main():
    torch.manual_seed(0)
    rnn = Recurrent(Readout(GRU(1, 16), 1))
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.01)
    for epoch in range(3):
        x, target = draw()
        right = []
        for span, y, _ in truncated(rnn, x, WINDOW):
            F.mse_loss(y, target[span]).backward()
            torch.nn.utils.clip_grad_norm_(rnn.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            right.append(share_right(y, target[span]))
        print(f"epoch {epoch}: {100 * sum(right) / len(right):.1f} % right while learning")

    x, target = draw()
    with torch.no_grad():
        carried, _ = rnn(x)
        alone = torch.cat([rnn(x[t : t + WINDOW])[0] for t in range(0, T, WINDOW)])
    print(f"a new stream: {100 * share_right(carried, target):.1f} % right")
    print(f"with the state forgotten at each window: {100 * share_right(alone, target):.1f} % right")


if __name__ == "__main__":
    main()
