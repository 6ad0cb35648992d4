"""Cells with matrices in the state of each row: memories that are written and read, with heads and without.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from foreign_cells import Foreign


class DeltaRule(Foreign):
    """Fast weights that forget what they had for a key (Schlag et al. 2021, "Linear transformers are secretly fast
    weight programmers", equations 23 to 25)::

        M_t = M_{t-1} + b_t (v_t - M_{t-1} k_t) k_t^T
        y_t = M_t q_t
    """

    def make(self, H):
        self.q, self.k, self.rate = (nn.Linear(self.input_size, size) for size in (H, H, 1))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H, self.H)

    def step(self, memory, x, context=None):
        k, q = torch.softmax(self.k(x), 1), torch.softmax(self.q(x), 1)
        old = torch.bmm(memory, k[:, :, None])[:, :, 0]
        memory = memory + torch.sigmoid(self.rate(x))[:, :, None] * ((self.x(x) - old)[:, :, None] * k[:, None, :])
        return memory, torch.bmm(memory, q[:, :, None])[:, :, 0]


class HeadedDelta(DeltaRule):
    """The same with two heads, as einsum says it, and all keys decaying."""

    inward, heads = 2, 2

    def make(self, H):
        self.q, self.k = (nn.Linear(self.input_size, self.heads * H) for _ in range(2))
        self.rate, self.out = nn.Linear(self.input_size, self.heads), nn.Linear(self.heads * H, H)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.heads, self.H, self.H)

    def step(self, memory, x, context=None):
        v, k, q = (part(x).view(-1, self.heads, self.H) for part in (self.x, self.k, self.q))
        k, rate = torch.tanh(k), torch.sigmoid(self.rate(x))[:, :, None, None]
        error = v - torch.einsum("bhij,bhj->bhi", memory, k)
        memory = 0.9 * memory + rate / self.H * error[..., None] * k[:, :, None, :]
        return memory, self.out(torch.einsum("bhij,bhj->bhi", memory, q).flatten(1))


class Hebbian(Foreign):
    """Weights that change as their ends are active together (Miconi et al. 2018, "Differentiable plasticity")."""

    def make(self, H):
        self.u, self.share = nn.Linear(H, H), self.weight(H, H)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H), self.zeros(batch_size, self.H, self.H)

    def step(self, state, x, context=None):
        h, trace = state
        new = torch.tanh(self.x(x) + self.u(h) + torch.bmm(h[:, None], self.share * trace)[:, 0])
        return (new, 0.9 * trace + 0.1 * h[:, :, None] * new[:, None, :]), new


class Written(Foreign):
    """A memory of ten places that are found by what is in them (Graves et al. 2014, "Neural Turing machines")."""

    inward, places = 2, 10

    def make(self, H):
        self.key, self.erase, self.add = (nn.Linear(H, H) for _ in range(3))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H), self.zeros(batch_size, self.places, self.H) + 0.1

    def step(self, state, x, context=None):
        found, memory = state
        low, high = self.x(x).chunk(2, 1)
        h = torch.tanh(low + found * high)
        share = torch.softmax(3 * F.cosine_similarity(memory, self.key(h)[:, None], dim=-1), 1)
        memory = memory * (1 - share[:, :, None] * torch.sigmoid(self.erase(h))[:, None])
        memory = memory + share[:, :, None] * self.add(h)[:, None]
        found = torch.bmm(share[:, None], memory)[:, 0]
        return (found, memory), found


class Slots(Foreign):
    """Nine vectors that attend to one another, and what is largest of them (Santoro et al. 2018, "Relational recurrent
    neural networks", with another gate)."""

    places = 9

    def make(self, H):
        self.u, self.gate = nn.Linear(H, H), nn.Linear(H, 1)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.places, self.H) + 0.1

    def step(self, slots, x, context=None):
        score = torch.softmax(torch.bmm(slots, slots.transpose(1, 2)), -1)
        slots = torch.tanh(self.u(slots) + self.x(x)[:, None] + torch.bmm(score, slots))
        slots = slots * torch.sigmoid(self.gate(slots))
        return slots, slots.amax(1) + slots.sum((1, 2))[:, None] + slots.mean(2).amax(1, keepdim=True)


MATRICES = {cell.__name__: cell for cell in (DeltaRule, HeadedDelta, Hebbian, Written, Slots)}
