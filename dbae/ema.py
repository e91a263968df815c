"""Exponential moving average of a model's parameters and buffers, with a warm-up."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from .layers import SpectralNorm

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """Keeps `shadow`, an eval-mode copy of a model that follows it slowly.

    After n updates the decay is min(rate, (1 + n)/(10 + n)), so that the average is the better
    model after a hundred steps too, not a memory of the initialisation. Floating buffers (batch
    norm statistics) are averaged with the parameters, counters are copied. The singular vectors
    of spectral norm belong to a weight and cannot be averaged: the shadow's follow its own
    weights by one power iteration per update.
    """

    def __init__(self, model: Model, rate: float) -> None:
        self.rate = rate
        self.shadow: Model = copy.deepcopy(model)
        self.shadow.eval().requires_grad_(False)
        self._spectral = [m for m in self.shadow.modules() if isinstance(m, SpectralNorm)]
        own = {id(vector) for m in self._spectral for vector in (m.weight_u, m.weight_v)}
        live = model.state_dict(keep_vars=True)
        pairs = [
            (value, live[name])
            for name, value in self.shadow.state_dict(keep_vars=True).items()
            if id(value) not in own
        ]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the live model; `updates` is the number of earlier updates."""
        decay = min(self.rate, (1 + updates) / (10 + updates))
        shadow: list[Tensor] = [pair[0] for pair in self._averaged]
        live: list[Tensor] = [pair[1] for pair in self._averaged]
        torch._foreach_lerp_(shadow, live, 1 - decay)
        for ours, theirs in self._copied:
            ours.copy_(theirs)
        for module in self._spectral:
            module.power_iteration()
