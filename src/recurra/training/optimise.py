"""The optimiser, its learning rate over time, and gradients kept within bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recurra.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices decay, biases and other vectors do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.99))


def learning_rate(update: int, total: int, config: TrainingConfig) -> float:
    """The rate of update number ``update`` (from 0) of ``total``: a linear rise, then the schedule's decay."""
    if update < config.warmup:
        return config.learning_rate * (update + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    passed = min(1.0, (update - config.warmup) / max(1, total - config.warmup))
    left = 1 - passed if config.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * left)


def bound_gradients(model: nn.Module, config: TrainingConfig) -> Tensor:
    """Clip gradients by value, then by norm (Pascanu et al. 2013). Returns the norm before any clipping.

    Where the norm is not finite nothing is changed: the caller skips the update.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        return norm
    after = norm
    if config.clip_value is not None:
        for gradient in gradients:
            gradient.clamp_(-config.clip_value, config.clip_value)
        after = torch.nn.utils.get_total_norm(gradients)
    if config.clip_norm is not None and after > config.clip_norm:
        for gradient in gradients:
            gradient.mul_(config.clip_norm / after)
    return norm
