"""Cells that are not in the house, as their authors published them: what a user brings along.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from recurra.cell import Cell


class Foreign(Cell):
    """A cell whose state has leaves of the sizes ``leaves`` times H; ``self.x`` gives ``inward`` times H features.

    H is a multiple of ``multiple``.
    """

    leaves: tuple[float, ...] = (1,)
    inward = 1
    multiple = 1

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size, self.H = input_size, hidden_size, hidden_size
        self.x = nn.Linear(input_size, self.inward * hidden_size)
        self.make(hidden_size)

    def make(self, H):
        """Parameters of its own."""

    def weight(self, *shape):
        return nn.Parameter(torch.zeros(shape))

    def initial_state(self, batch_size):
        state = tuple(self.zeros(batch_size, round(size * self.H)) for size in self.leaves)
        return state if len(state) > 1 else state[0]


class MultiplicativeLSTM(Foreign):
    """Krause et al. 2016, "Multiplicative LSTM for sequence modelling", equations 12 to 16."""

    leaves, inward = (1, 1), 5

    def make(self, H):
        self.mh, self.hm = nn.Linear(H, H, bias=False), nn.Linear(H, 4 * H)

    def step(self, state, x, context=None):
        h, c = state
        ahead, mx = self.x(x).split([4 * self.H, self.H], dim=1)
        m = mx * self.mh(h)
        i, f, o, g = (ahead + self.hm(m)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g
        h = torch.tanh(c * o.sigmoid())
        return (h, c), h


class IndRNN(Foreign):
    """Li et al. 2018, "Independently recurrent neural network": each unit sees only itself."""

    def make(self, H):
        self.u = self.weight(H)

    def step(self, h, x, context=None):
        h = F.relu(self.x(x) + self.u * h)
        return h, h


class UGRNN(Foreign):
    """Collins et al. 2017, "Capacity and trainability in recurrent neural networks", update gate RNN."""

    inward = 2

    def make(self, H):
        self.u = nn.Linear(H, 2 * H, bias=False)

    def step(self, h, x, context=None):
        c, g = torch.split(self.x(x) + self.u(h), self.H, dim=-1)
        g = torch.sigmoid(g + 1)
        h = g * h + (1 - g) * torch.tanh(c)
        return h, h


class MUT(Foreign):
    """Jozefowicz et al. 2015, "An empirical exploration of recurrent network architectures", MUT1, MUT2, MUT3."""

    inward, kind = 3, 1

    def make(self, H):
        self.hz, self.hr, self.hh = (nn.Linear(H, H, bias=False) for _ in range(3))

    def step(self, h, x, context=None):
        xz, xr, xh = self.x(x).chunk(3, -1)
        z = torch.sigmoid({1: xz, 2: xz + self.hz(h), 3: xz + self.hz(torch.tanh(h))}[self.kind])
        r = torch.sigmoid(self.hr(h) + (xr if self.kind != 2 else x.mean(1, keepdim=True)))
        new = torch.tanh(self.hh(r * h) + (torch.tanh(xh) if self.kind == 1 else xh))
        h = new * z + h * (1 - z)
        return h, h


class MUT2(MUT):
    kind = 2


class MUT3(MUT):
    kind = 3


class SCRN(Foreign):
    """Mikolov et al. 2014, "Learning longer memory in recurrent neural networks": a slow context of half the size."""

    leaves, multiple = (1, 0.5), 2
    alpha = 0.95

    def make(self, H):
        self.b, self.p, self.r = nn.Linear(self.input_size, H // 2, bias=False), self.weight(H // 2, H), nn.Linear(H, H)

    def step(self, state, x, context=None):
        h, s = state
        s = (1 - self.alpha) * self.b(x) + self.alpha * s
        h = torch.sigmoid(s @ self.p + self.x(x) + self.r(h))
        return (h, s), torch.cat((h, s), 1)[:, : self.H]


class LEM(Foreign):
    """Rusch et al. 2022, "Long expressive memory for sequence modeling", equation 3."""

    leaves, inward = (1, 1), 4

    def make(self, H):
        self.back, self.z = nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.dt = 0.7

    def step(self, state, x, context=None):
        y, z = state
        xs, hs = self.x(x).chunk(4, 1), self.back(y).chunk(3, 1)
        a, b = self.dt * torch.sigmoid(hs[0] + xs[0]), self.dt * torch.sigmoid(hs[1] + xs[1])
        z = (1 - a) * z + a * torch.tanh(hs[2] + xs[2])
        y = (1 - b) * y + b * torch.tanh(self.z(z) + xs[3])
        return (y, z), y


class CoRNN(Foreign):
    """Rusch and Mishra 2021, "Coupled oscillatory recurrent neural network", equation 3."""

    leaves = (1, 1)

    def make(self, H):
        self.w = nn.Linear(2 * H, H)

    def step(self, state, x, context=None):
        y, z = state
        z = z + 0.1 * (torch.tanh(self.w(torch.cat([z, y], 1)) + self.x(x)) - 2.7 * y - 4.7 * z)
        y = y + 0.1 * z
        return (y, z), y


class Antisymmetric(Foreign):
    """Chang et al. 2019, "AntisymmetricRNN": its matrix is W - W^T - gamma I."""

    inward = 2

    def make(self, H):
        self.w = self.weight(H, H)
        self.register_buffer("eye", torch.eye(H))

    def step(self, h, x, context=None):
        a = h @ (self.w - self.w.T - 0.01 * self.eye)
        drive, gate = self.x(x).tensor_split(2, dim=1)
        h = h + 0.1 * torch.sigmoid(a + gate) * torch.tanh(a + drive)
        return h, h


class LiGRU(Foreign):
    """Ravanelli et al. 2018, "Light gated recurrent units", without the batch normalisation."""

    inward = 2

    def make(self, H):
        self.u = self.weight(2 * H, H)

    def step(self, h, x, context=None):
        z, a = torch.addmm(self.x(x), h, self.u.T).chunk(2, dim=1)
        z = torch.sigmoid(z)
        h = torch.lerp(F.relu(a), h, z)
        return h, h


class JANET(Foreign):
    """van der Westhuizen and Lasenby 2018, "The unreasonable effectiveness of the forget gate"."""

    inward = 2

    def make(self, H):
        self.u = nn.Linear(H, 2 * H, bias=False)
        self.beta = 1.0

    def step(self, h, x, context=None):
        s, g = (self.x(x) + self.u(h)).chunk(2, 1)
        h = s.sigmoid() * h + (1 - (s - self.beta).sigmoid()) * g.tanh()
        return h, h


class FastGRNN(Foreign):
    """Kusupati et al. 2018, "FastGRNN": one matrix of low rank for gate and candidate."""

    def make(self, H):
        self.u1, self.u2 = self.weight(H, 2), self.weight(2, H)
        self.gate, self.candidate, self.zeta, self.nu = self.weight(H), self.weight(H), self.weight(1), self.weight(1)

    def step(self, h, x, context=None):
        pre = self.x(x) + h @ self.u1 @ self.u2
        z, c = torch.sigmoid(pre + self.gate), torch.tanh(pre + self.candidate)
        h = (torch.sigmoid(self.zeta) * (1 - z) + torch.sigmoid(self.nu)) * c + z * h
        return h, h


class RAN(Foreign):
    """Lee et al. 2017, "Recurrent additive networks"."""

    leaves, inward = (1, 1), 3

    def make(self, H):
        self.u = nn.Linear(H, 2 * H)

    def step(self, state, x, context=None):
        c, h = state
        content, xg = self.x(x).split((self.H, 2 * self.H), 1)
        i, f = torch.sigmoid(xg + self.u(h)).unflatten(1, (2, self.H)).unbind(1)
        c = torch.addcmul(i * content, f, c)
        h = torch.tanh(c)
        return (c, h), h


class SRU(Foreign):
    """Lei et al. 2018, "Simple recurrent units for highly parallelizable recurrence", with v * c in its gates."""

    inward = 4

    def make(self, H):
        self.vf, self.vr = self.weight(H), self.weight(H)

    def step(self, c, x, context=None):
        u, f, r, skip = self.x(x).chunk(4, 1)
        f, r = torch.sigmoid(f + self.vf * c), torch.sigmoid(r + self.vr * c)
        c = f * c + (1 - f) * u
        return c, r * F.silu(c) + (1 - r) * skip * math.sqrt(3)


class LMU(Foreign):
    """Voelker et al. 2019, "Legendre memory units": a memory of constant matrices, and a hidden layer."""

    leaves = (1, 2)

    def make(self, H):
        q = torch.arange(2 * H, dtype=torch.float64)
        row, column = q[:, None], q[None]
        a = torch.where(row < column, -1.0, (-1.0) ** (row - column + 1)) * (2 * row + 1)
        full = torch.zeros(2 * H + 1, 2 * H + 1, dtype=torch.float64)
        full[:-1, :-1], full[:-1, -1] = a / 9, (2 * q + 1) * (-1.0) ** q / 9
        full = torch.linalg.matrix_exp(full)
        self.register_buffer("a", full[:-1, :-1].contiguous())
        self.register_buffer("b", full[:-1, -1].contiguous())
        self.ex, self.eh, self.em = nn.Linear(self.input_size, 1, bias=False), self.weight(H), self.weight(2 * H)
        self.hh, self.hm = nn.Linear(H, H, bias=False), nn.Linear(2 * H, H, bias=False)

    def step(self, state, x, context=None):
        h, m = state
        u = self.ex(x) + (h * self.eh).sum(-1, keepdim=True) + (m @ self.em)[:, None]
        m = F.linear(m, self.a) + u * self.b
        h = torch.tanh(self.x(x) + self.hh(h) + self.hm(m))
        return (h, m), h


class PhasedLSTM(Foreign):
    """Neil et al. 2016, "Phased LSTM", equations 6 to 10; the time is carried and grows by the first input's size."""

    leaves, inward = (1, 1, 1), 4

    def make(self, H):
        self.u, self.period, self.shift = nn.Linear(H, 4 * H, bias=False), self.weight(H), self.weight(H)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H), self.zeros(batch_size, self.H), self.zeros(batch_size, 1)

    def step(self, state, x, context=None):
        h, c, t = state
        t = t + 0.5 + x[:, :1].abs()
        tau = torch.exp(self.period) + 0.5
        phase = torch.remainder(t - self.shift, tau) / tau
        gate = torch.where(phase < 0.05, 40 * phase, torch.where(phase < 0.1, 2 - 20 * phase, 0.01 * phase))
        i, f, g, o = (self.x(x) + self.u(h)).chunk(4, 1)
        new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = torch.sigmoid(o) * torch.tanh(new)
        h, c = gate * shown + (1 - gate) * h, gate * new + (1 - gate) * c
        return (h, c, t), h


class CfC(Foreign):
    """Hasani et al. 2022, "Closed-form continuous-time neural networks", equation 4, with LeCun's tanh."""

    def make(self, H):
        self.backbone = nn.Linear(self.input_size + H, 7)
        self.ff1, self.ff2, self.ta, self.tb = (nn.Linear(7, H) for _ in range(4))

    def step(self, h, x, context=None):
        z = 1.7159 * torch.tanh(0.666 * self.backbone(torch.cat([x, h], 1)))
        t = torch.sigmoid(self.ta(z) * 0.8 + self.tb(z))
        h = torch.tanh(self.ff1(z)) * (1.0 - t) + t * torch.tanh(self.ff2(z))
        return h, h


class LTC(Foreign):
    """Hasani et al. 2021, "Liquid time-constant networks", algorithm 1: a fused solver with six unfolds a step."""

    def make(self, H):
        self.mu, self.sigma, self.w, self.reverse = (self.weight(H, H) for _ in range(4))
        self.leak, self.rest, self.cm = self.weight(H), self.weight(H), self.weight(H)

    def step(self, v, x, context=None):
        sense, leak, cm = self.x(x), F.softplus(self.leak), F.softplus(self.cm) * 6
        for _ in range(6):
            act = F.softplus(self.w) * torch.sigmoid(self.sigma * (v.unsqueeze(-1) - self.mu))
            numerator = cm * v + leak * self.rest + (act * self.reverse).sum(1) + sense
            v = numerator / (cm + leak + act.sum(1) + 1e-8)
        return v, v


class ONLSTM(Foreign):
    """Shen et al. 2019, "Ordered neurons", equations 3 to 13: cumax gates over chunks of the cell."""

    leaves, inward, chunk, multiple = (1, 1), 4, 2, 2

    def make(self, H):
        self.n = H // self.chunk
        self.u, self.master = nn.Linear(H, 4 * H), nn.Linear(H + self.input_size, 2 * self.n)

    def step(self, state, x, context=None):
        h, c = state
        mf, mi = self.master(torch.cat([x, h], 1)).chunk(2, 1)
        mf, mi = torch.cumsum(mf.softmax(-1), -1), 1 - torch.cumsum(F.softmax(mi, dim=-1), dim=-1)
        both = mf * mi
        mf, mi, both = (g[:, :, None].expand(-1, -1, self.chunk).flatten(1) for g in (mf, mi, both))
        i, f, g, o = (self.x(x) + self.u(h)).chunk(4, 1)
        f, i = torch.sigmoid(f) * both + (mf - both), torch.sigmoid(i) * both + (mi - both)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h, c), h


class Clockwork(Foreign):
    """Koutnik et al. 2014, "A clockwork RNN": blocks of units, each with its own period and a masked matrix."""

    multiple = 4

    def make(self, H):
        self.w = self.weight(H, H)
        block = torch.arange(H) * 4 // H
        self.register_buffer("mask", (block[:, None] <= block[None]).to(torch.get_default_dtype()))
        self.register_buffer("period", 2.0**block)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H), self.zeros(batch_size, 1)

    def step(self, state, x, context=None):
        h, t = state
        due = torch.fmod(t, self.period) == 0
        h = torch.where(due, torch.tanh(self.x(x) + h @ (self.w * self.mask).t()), h)
        return (h, t + 1), h


class DeltaRNN(Foreign):
    """Ororbia et al. 2017, "Learning simpler language models with the differential state framework"."""

    def make(self, H):
        self.v, self.alpha = nn.Linear(H, H, bias=False), self.weight(H)
        self.b1, self.b2, self.br = self.weight(H), self.weight(H), self.weight(H)

    def step(self, h, x, context=None):
        wx, vh = self.x(x), self.v(h)
        z = F.elu(self.alpha * vh * wx + self.b1 * vh + self.b2 * wx)
        r = torch.sigmoid(wx + self.br)
        h = F.hardtanh((1 - r) * z + r * h)
        return h, h


PUBLISHED = {
    cell.__name__: cell
    for cell in (
        MultiplicativeLSTM, IndRNN, UGRNN, MUT, MUT2, MUT3, SCRN, LEM, CoRNN, Antisymmetric, LiGRU, JANET, FastGRNN,
        RAN, SRU, LMU, PhasedLSTM, CfC, LTC, ONLSTM, Clockwork, DeltaRNN,
    )
}  # fmt: skip
