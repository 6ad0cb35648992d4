"""A cell of one's own: leaky integrators that learn how slowly to leak.

The target is the running mean of a noisy signal, over about the last twenty steps. Prints what the units learned.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

import torch
from torch import nn

from recurra import Cell, Recurrent
from recurra.cells import Readout

STEPS = 150


class Leaky(Cell):
    """h_t = k * h_{t-1} + (1 - k) * W x_t, with k = sigmoid(keep), one for each unit."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inward = nn.Linear(input_size, hidden_size, bias=False)
        self.keep = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        k = torch.sigmoid(self.keep)
        h = k * state + (1 - k) * self.inward(x)
        return h, h


def main():
    torch.manual_seed(0)
    x = torch.randn(60, 16, 1)
    target = torch.zeros_like(x)
    for t in range(1, len(x)):
        target[t] = 0.95 * target[t - 1] + 0.05 * x[t]

    cell = Leaky(1, 4)
    rnn = Recurrent(Readout(cell, 1))
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.05)
    for step in range(STEPS):
        y, _ = rnn(x)
        loss = nn.functional.mse_loss(y, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:3}: error {loss.item() / target.var().item():.3f} of the target's variance")
    print("share kept at each step:", [round(k, 2) for k in torch.sigmoid(cell.keep).tolist()])


if __name__ == "__main__":
    main()
