"""What a log line says of the steps since the last one: losses, gradients, the spread of z."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import Context
from .encoder import DEAD_STD


class Sums:
    """Running sums over one log interval, kept on the device so that no step waits for them."""

    def __init__(self, latent_dim: int, device: torch.device) -> None:
        # float64 where there is one (MPS has none): z's variance is a difference of sums.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Σ of loss, xs_mse, ‖z‖, images; Σ of ‖g‖, ‖g of the encoder‖, updates; Σ z; Σ z².
        self._tensors = [
            torch.zeros(n, dtype=dtype, device=device) for n in (4, 3, latent_dim, latent_dim)
        ]

    @torch.no_grad()
    def add_terms(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of one micro-batch, as `DBAE.loss` gives them."""
        sums, _, z_sum, z_squared = self._tensors
        z = terms["z"].to(sums.dtype)
        values = [terms["loss"].sum(), terms["xs_mse"].sum(), z.norm(dim=1).sum()]
        count = torch.full((), float(len(z)), device=z.device)
        sums += torch.stack([v.detach().to(sums.dtype) for v in [*values, count]])
        z_sum += z.sum(0)
        z_squared += z.square().sum(0)

    @torch.no_grad()
    def add_gradients(self, norms: Tensor) -> None:
        """Add the norms (2,) of an update's gradient and of its part in the encoder."""
        gradients = self._tensors[1]
        gradients += torch.cat([norms, torch.ones_like(norms[:1])]).to(gradients.dtype)

    def add(self, other: Sums) -> None:
        """Add another's sums."""
        for ours, theirs in zip(self._tensors, other._tensors, strict=True):
            ours += theirs

    def state(self) -> list[Tensor]:
        """For a checkpoint: copies on the CPU."""
        return [tensor.to("cpu", copy=True) for tensor in self._tensors]

    def load(self, state: list[Tensor]) -> None:
        """Take over what `state` gave."""
        for ours, theirs in zip(self._tensors, state, strict=True):
            ours.copy_(theirs)

    def row(self, context: Context) -> dict[str, float]:
        """Means over the interval and all ranks, NaN where there was no step. A collective."""
        terms, gradients, z_sum, z_squared = self._tensors
        total = context.all_reduce_sum(torch.cat([terms, z_sum, z_squared]))
        loss, xs_mse, z_norm, count = total[:4].tolist()
        count = count or float("nan")
        mean, mean_square = (total[4:] / count).chunk(2)
        std = (mean_square - mean.square()).clamp(min=0).sqrt()
        grad, grad_encoder, updates = gradients.tolist()
        updates = updates or float("nan")
        return {
            "loss": loss / count,
            "xs_mse": xs_mse / count,
            "grad_norm": grad / updates,
            "grad_norm_encoder": grad_encoder / updates,
            "z_norm": z_norm / count,
            "z_std": float(std.mean()),
            "z_dead": float((std < DEAD_STD).double().mean()) * count / count,
        }
