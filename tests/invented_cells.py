"""Cells that nobody published: every way of writing a step that a user may think of.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import catalogue
from foreign_cells import PUBLISHED, Foreign
from matrix_cells import MATRICES


class Delayed(Foreign):
    """Sees its outputs of one, two and three steps ago (Lin et al. 1996, "Learning long-term dependencies in NARX")."""

    leaves = (1, 1, 1)

    def make(self, H):
        self.a, self.b, self.c = (self.weight(H, H) for _ in range(3))

    def step(self, state, x, context=None):
        one, two, three = state
        h = torch.tanh(self.x(x) + one @ self.a + torch.matmul(two, self.b) + torch.einsum("bi,ij->bj", three, self.c))
        return (h, one, two), h


class Maxout(Foreign):
    """The largest of three units (Goodfellow et al. 2013), once by amax, once by max, and where it was."""

    inward = 3

    def make(self, H):
        self.u = nn.Linear(H, 3 * H)

    def step(self, h, x, context=None):
        z = (self.x(x) + self.u(h)).view(-1, self.H, 3)
        value, place = (z * 0.5).max(-1)
        h = torch.tanh(z.amax(-1) + 0.3 * value - z.view(-1, 3, self.H).min(1).values * (place == 1))
        return h, h


class Feedback(Foreign):
    """Two layers, each of which sees the other (Chung et al. 2015, "Gated feedback recurrent neural networks")."""

    leaves, multiple = (1, 0.5), 2

    def make(self, H):
        n = H // 2
        self.low, self.high, self.back = nn.Linear(H, H, bias=False), nn.Linear(n, n), self.weight(n, H)
        self.up, self.gates = self.weight(H, n), nn.Linear(H + n, 2)

    def step(self, state, x, context=None):
        low, high = state
        g = torch.sigmoid(self.gates(torch.cat(state, dim=-1)))
        low = torch.tanh(self.x(x) + g[:, 0:1] * self.low(low) + g[:, 1, None] * (high @ self.back))
        high = torch.tanh(low @ self.up + self.high(high))
        return (low, high), low


class HeadState(NamedTuple):
    c: Tensor
    n: Tensor
    h: Tensor
    m: Tensor


class HeadedSLSTM(Foreign):
    """Beck et al. 2024, "xLSTM", equations 8 to 24: exponential gates with a running maximum, two heads."""

    inward, multiple = 4, 2

    def make(self, H):
        self.heads = 2
        self.r = self.weight(2, 4 * H // 2, H // 2)
        self.norm = nn.GroupNorm(2, H)

    def initial_state(self, batch_size):
        zeros = self.zeros(batch_size, self.H)
        return HeadState(zeros, zeros + 1, zeros, zeros)

    def step(self, state, x, context=None):
        c, n, h, m = state
        back = torch.einsum("bhd,hed->bhe", h.view(-1, self.heads, self.H // self.heads), self.r)
        back = back.unflatten(-1, (4, -1)).transpose(1, 2).flatten(1)
        i, f, z, o = (self.x(x) + back).chunk(4, -1)
        log_f = F.logsigmoid(f)
        top = torch.maximum(log_f + m, i)
        i, f = torch.exp(i - top), torch.exp(log_f + m - top)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        return HeadState(c, n, h, top), self.norm(h)


class BlockDiagonal(Foreign):
    """Heads with a matrix each by bmm, each normalised, the norm of the whole clipped."""

    multiple = 4

    def make(self, H):
        self.w, self.scale = self.weight(4, H // 4, H // 4), self.weight(H // 4)

    def step(self, h, x, context=None):
        heads = h.view(-1, 4, self.H // 4)
        mixed = torch.bmm(heads.transpose(0, 1), self.w).transpose(0, 1)
        mixed = F.layer_norm(mixed, (self.H // 4,), 1 + self.scale) + mixed / mixed.norm(dim=-1, keepdim=True).add(1)
        h = torch.tanh(self.x(x) + mixed.reshape(-1, self.H)) * 3
        h = h / h.norm(dim=1, keepdim=True).clamp(min=1.0)
        return h, h


class SharedHeads(Foreign):
    """One matrix for all heads, heads that are mixed by a softmax, and matmul on four axes."""

    inward, multiple = 2, 2

    def make(self, H):
        self.w, self.mix, self.own = self.weight(H // 2, H // 2), self.weight(2, 2), self.weight(2, H // 2, H // 2)

    def step(self, h, x, context=None):
        a, b = self.x(x).view(-1, 2, 2, self.H // 2).unbind(1)
        heads = h.unflatten(1, (2, -1))
        own = torch.matmul(heads.unsqueeze(-2), self.own).squeeze(-2)
        heads = torch.tanh(heads @ self.w + torch.softmax(self.mix, -1) @ (a + own))
        share = torch.softmax((heads * b).sum(-1, keepdim=True), dim=1)
        h = torch.cat([heads[:, 0] * share[:, 0], heads[:, 1] - share[:, 1]], 1)
        return h, h


class Fourier(Foreign):
    """Phases that turn, shown as sines and cosines of many frequencies."""

    leaves, multiple = (1, 0.5), 2

    def make(self, H):
        self.frequency, self.u = self.weight(H // 2), self.weight(H, H)

    def step(self, state, x, context=None):
        h, phase = state
        phase = torch.fmod(phase + torch.exp(self.frequency) + h[:, : self.H // 2], 2 * math.pi)
        wave = torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)
        h = torch.atan2(h, 0.5 + wave) + torch.atan(h) + torch.asin(0.9 * h.sin()) - torch.acos(0.9 * wave)
        h = h + torch.asinh(wave) + torch.atanh(0.9 * wave) - torch.acosh(1.1 + wave**2)
        h = 0.1 * h + torch.tan(0.3 * torch.tanh(self.x(x) + wave @ self.u)) + torch.sinc(h)
        return (h, phase), h


class Activations(Foreign):
    """One gate of every kind."""

    def make(self, H):
        self.u = nn.Linear(H, H)
        self.slope = nn.PReLU(H)

    def step(self, h, x, context=None):
        z = self.x(x) + self.u(h)
        a = F.gelu(z) + F.gelu(z, approximate="tanh") + F.mish(z) + F.softsign(z) + F.hardsigmoid(z) + F.hardswish(z)
        a = a + F.elu(z) + F.selu(z) + F.celu(z, 0.7) + F.softplus(z, 2.0, 5.0) + F.relu6(z) + F.silu(z)
        a = a + F.softshrink(z, 0.2) + F.hardshrink(z, 0.3) + F.leaky_relu(z) + F.threshold(z, 0.1, -0.2)
        a = a + F.tanhshrink(z) + self.slope(z) + F.logsigmoid(z)
        a = a + F.glu(torch.cat([z, a], 1)) + torch.erf(z) + torch.sinh(0.5 * z) - torch.cosh(0.5 * z) + torch.square(z)
        return torch.tanh(0.1 * a), a


class Rounded(Foreign):
    """Whole numbers and what is left of them, straight through for the gradient."""

    def make(self, H):
        self.u = nn.Linear(H, H)

    def step(self, h, x, context=None):
        z = 3 * torch.tanh(self.x(x) + self.u(h))
        a = z + (z.round() - z).detach() + torch.floor(z) * 0.1 + torch.ceil(z) * 0.1 + z.trunc() * 0.1 + z.frac()
        a = a + torch.remainder(z, 0.7) + torch.fmod(z, -0.7) + torch.div(z, 0.9, rounding_mode="floor")
        a = a + torch.where(z > 0, z, 0.5) + z.masked_fill(z.isnan() | ~z.isfinite(), 0.0)
        a = a + torch.heaviside(z, z * 0).detach()
        a = a + torch.copysign(z, h) * torch.signbit(z) + torch.fmax(z, h) - torch.fmin(z, 0.5 * h)
        h = torch.tanh(0.2 * a)
        return h, torch.round(a, decimals=2)


class Powers(Foreign):
    """Powers, logarithms and their sums."""

    def make(self, H):
        self.u, self.e = nn.Linear(H, H), self.weight(H)

    def step(self, h, x, context=None):
        z = self.x(x) + self.u(h)
        p = torch.sigmoid(z) + 0.1
        a = p**self.e + 2.0**z + p.pow(1.7) + torch.pow(p, 2) + torch.exp2(z) - torch.log2(p) + torch.log10(p) + p**-z
        a = a + torch.logsumexp(z, 1, keepdim=True) + torch.logaddexp(z, h) + torch.hypot(z, p) + torch.logit(p * 0.5)
        a = a + torch.addcdiv(z, h, p, value=0.5) + torch.prod(p, 1, keepdim=True) + torch.xlogy(p, p)
        h = torch.tanh(0.1 * a)
        return h, a


class Moved(Foreign):
    """Features that are no neighbours: rolled, turned, flipped, padded, chosen, repeated."""

    multiple = 2

    def make(self, H):
        self.u = nn.Linear(H, H)
        self.back = nn.Linear(12 * H, H)

    def step(self, h, x, context=None):
        z, H = self.u(h), self.H
        parts = [
            torch.roll(z, 1, 1), z.flip(-1), z[:, ::2], z[:, 1::2], F.pad(z[:, 2:], (1, 1), value=0.5),
            z.view(-1, 2, H // 2).transpose(1, 2).flatten(1), torch.stack([z, h], 2).flatten(1),
            z[:, : H // 2].repeat(1, 2), z[:, : H // 2].repeat_interleave(2, dim=1),
            z[:, [*range(1, H), 1]] + z.index_select(1, torch.arange(H - 1, -1, -1)),
            z.view(-1, H // 2, 2)[:, :, 1].unsqueeze(-1).expand(-1, -1, 2).reshape(-1, H),
            z.unfold(1, H // 2, H // 2)[:, 1] * z.view(-1, 2, H // 2).movedim(1, 2)[..., 0], F.pad(z, (-H // 2, 0)),
        ]  # fmt: skip
        h = torch.tanh(self.x(x) + self.back(torch.cat(parts, dim=1)))
        return h, h


class Counted(Foreign):
    """Reductions of every kind, over all features and over some."""

    multiple = 2

    def make(self, H):
        self.u, self.v = nn.Linear(H, H), self.weight(H)

    def step(self, h, x, context=None):
        z = self.x(x) + self.u(h)
        t = z.view(-1, 2, self.H // 2)
        a = z.sum(-1, keepdim=True) + z.mean(1)[:, None] + z.amin(1, True) + z.std(1, keepdim=True)
        a = a + (h @ self.v)[:, None] + t.prod(1).repeat(1, 2) - t.amin((1, 2)).unsqueeze(-1)
        b = t.sum(2, keepdim=True) * t + t.mean(1, keepdim=True) + t.var(2, keepdim=True, correction=0)
        b = b + torch.softmax(t, 1) - torch.log_softmax(t, 2) + t.cumsum(1) + t.cumprod(2)
        b = b + (t > 0).any(2, keepdim=True) - (t > 0).all(1, keepdim=True).to(z.dtype) + t.norm(dim=1, keepdim=True)
        b = b + (t > 0).sum(1, keepdim=True) + F.normalize(t, dim=2) + torch.logsumexp(t, 2, keepdim=True)
        h = torch.tanh(0.1 * (a + b.flatten(1)) + 0.1 * F.cosine_similarity(z, h, dim=1).unsqueeze(1))
        return h, h


class Embedded(Foreign):
    """Takes the number of a word (B, 1), and looks it up inside the step."""

    def make(self, H):
        self.words, self.u = nn.Embedding(5, H), nn.Linear(H, H)

    def step(self, h, x, context=None):
        word = x[:, 0].abs().mul(2).clamp(max=4).long()
        h = torch.tanh(self.words(word) + self.u(h) + (word == 2)[:, None])
        return h, h


class Decaying(Foreign):
    """Learned decays exp(-softplus(w)), one matrix power by hand, a state of three leaves of different sizes."""

    leaves, multiple = (1, 0.5, 2), 2

    def make(self, H):
        self.w, self.u, self.v = self.weight(H), self.weight(H, H), self.weight(2 * H, H)

    def step(self, state, x, context=None):
        h, slow, fast = state
        decay = torch.exp(-F.softplus(self.w))
        h = decay * h + (1 - decay) * torch.tanh(self.x(x) + h @ self.u @ self.u + fast @ self.v)
        slow = 0.9 * slow + 0.1 * h.view(-1, self.H // 2, 2).mean(-1)
        fast = torch.cat([h * h.mean(1, keepdim=True), slow, -slow], 1)
        return (h, slow, fast), torch.hstack([slow, h[:, ::2]])


class Attended(Foreign):
    """A row's own matrices: weights of its last four outputs, and products of pieces of the state."""

    leaves, multiple = (1, 4), 2

    def make(self, H):
        self.q, self.u = nn.Linear(H, H), nn.Linear(2 * H, H)

    def step(self, state, x, context=None):
        h, memory = state
        rows = memory.view(-1, 4, self.H)
        share = torch.softmax(torch.bmm(rows, self.q(h)[:, :, None]) / self.H**0.5, dim=1)
        found = (share.transpose(1, 2) @ rows).squeeze(1)
        h = torch.tanh(self.x(x) + self.u(torch.cat([found, h], 1)))
        h = h + 0.1 * (h.view(-1, 2, self.H // 2) @ rows[:, :2].view(-1, self.H // 2, 4)).sum(2).repeat(1, self.H // 2)
        return (h, torch.cat([memory[:, self.H :], h], 1)), h


class Outer(Foreign):
    """Fast weights (Ba et al. 2016), the matrix kept as a row of features."""

    def make(self, H):
        self.k, self.u = nn.Linear(H, 4), nn.Linear(4, H)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H), self.zeros(batch_size, 16)

    def step(self, state, x, context=None):
        h, fast = state
        k = torch.tanh(self.k(h))
        fast = 0.9 * fast + 0.1 * (k[:, :, None] * k[:, None, :]).flatten(1)
        seen = torch.einsum("bij,bj->bi", fast.view(-1, 4, 4), k) + torch.baddbmm(
            k[..., None], fast.view(-1, 4, 4).tril(), k[..., None]
        ).squeeze(2)
        h = torch.tanh(self.x(x) + self.u(seen + torch.diagonal(fast.view(-1, 4, 4), dim1=1, dim2=2)))
        return (h, fast), h


class Timed(Foreign):
    """A context that is the same at all steps: a row of its own for each member of the batch."""

    multiple = 2

    def make(self, H):
        self.u = nn.Linear(H, H)

    def step(self, h, x, context=None):
        gate = torch.sigmoid(context).view(-1, 2, self.H // 2)
        h = torch.tanh(self.x(x) + self.u(h * context)).view(-1, 2, self.H // 2) * gate.sum(1, keepdim=True)
        h = h.reshape(-1, self.H)
        return h, h


INVENTED = {
    cell.__name__: cell
    for cell in (
        Delayed, Maxout, Feedback, HeadedSLSTM, BlockDiagonal, SharedHeads, Fourier, Activations, Rounded, Powers,
        Moved, Counted, Embedded, Decaying, Attended, Outer, Timed,
    )
}  # fmt: skip
FOREIGN = {**PUBLISHED, **INVENTED, **MATRICES}


def foreign(name: str, input_size: int = 3, least: int = 6) -> Foreign:
    """A cell of either kind, in float64, with random parameters; H is at least ``least``."""
    make = FOREIGN[name]
    hidden = -(-least // make.multiple) * make.multiple
    return catalogue.Entry(name, make, None).build(input_size, hidden)
