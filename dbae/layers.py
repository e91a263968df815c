"""Building blocks of the networks. Attribute names are the released checkpoints' key names."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups, computed in float32 whatever the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual branch begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of times t: (N,) → (N, dim), cosines first, then sines (ADM)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection.

    q, k and v of one head lie side by side in the fused projection: (q, k, v) of head 0, then of
    head 1, … . `conv` is nn.Conv1d in the encoder and nn.Conv2d in the UNet, as in the format.
    """

    def __init__(self, channels: int, heads: int, conv: type[nn.Conv1d] | type[nn.Conv2d]) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.proj_out = conv(channels, channels, 1)
        zero_init(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Positions × channels, with each head's channels side by side, is what the fast attention
        # kernels read as it is, and what a channels-last map is in memory.
        h = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        qkv = F.linear(h, self.qkv.weight.flatten(1), self.qkv.bias)
        qkv = qkv.view(batch, height * width, self.heads, 3, channels // self.heads)
        q, k, v = qkv.transpose(1, 2).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Average-pool by 2 ("down"), repeat pixels ("up"), or nothing (None)."""

    def __init__(self, mode: str | None) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "down":
            return F.avg_pool2d(x, 2)
        if self.mode == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


class ResBlock(nn.Module):
    """ADM's residual block, with scale-shift conditioning where `emb_channels` is given.

    norm → SiLU → (resample) → conv; with a condition then norm · (1 + scale) + shift → SiLU →
    dropout → conv. The skip is resampled too and projected where the number of channels changes.
    Without a condition (the encoder) the second half does not exist.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int | None = None,
        dropout: float = 0.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = Resample(resample)
        self.emb_layers: nn.Module | None = None
        self.out_layers: nn.Sequential | None = None
        if emb_channels is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
            self.out_layers = nn.Sequential(
                GroupNorm(out_channels),
                nn.SiLU(),
                nn.Dropout(dropout),
                zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
            )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        if self.emb_layers is not None and self.out_layers is not None:
            scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
            out_norm, *rest = self.out_layers
            h = out_norm(h) * (1 + scale) + shift
            for layer in rest:
                h = layer(h)
        return cast(Tensor, self.skip_connection(self.resample(x)) + h)


class Stage(nn.Sequential):
    """A sequence whose residual blocks also receive the condition.

    recompute: keep no activations for the backward pass, which computes them again.
    """

    recompute = False

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._apply_all, x, emb, use_reentrant=False)
        return self._apply_all(x, emb)

    def _apply_all(self, x: Tensor, emb: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class SpectralNorm(nn.Module):
    """Base of layers whose weight is divided by its largest singular value σ.

    Holds `weight_orig`, `weight_u`, `weight_v`, PyTorch's older form, which is the released
    format. One power iteration per forward pass in training mode, none in eval mode; gradients
    flow through σ = uᵀ W v with u and v fixed (Miyato et al. 2018, arXiv 1802.05957). As the layers
    are linear, their input is divided in place of the weight, which is far larger.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight_orig = nn.Parameter(weight)
        matrix = self._matrix()
        self.register_buffer("weight_u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        self.power_iteration(15)

    def _matrix(self) -> Tensor:
        """The weight as a matrix with dimension `dim` as its rows."""
        return self.weight_orig.transpose(0, self.dim).flatten(1)

    @torch.no_grad()
    def power_iteration(self, iterations: int = 1) -> None:
        """Move u and v towards the leading singular vectors of the present weight."""
        matrix = self._matrix().float()
        for _ in range(iterations):
            self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12))
            self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12))

    def scale(self) -> Tensor:
        """1/σ, float32 also under autocast, of shape ()."""
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            if self.training:
                self.power_iteration()
            # Clones, since the next forward pass changes u and v before this backward pass ends.
            return 1 / (self.weight_u.clone() @ self._matrix() @ self.weight_v.clone())


class SpectralConv2d(SpectralNorm):
    """3×3, 4×4 or 1×1 convolution without bias under spectral norm."""

    def __init__(self, channels: int, out_channels: int, kernel: int, padding: int = 0) -> None:
        super().__init__(nn.Conv2d(channels, out_channels, kernel).weight.detach(), dim=0)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * self.scale(), self.weight_orig, padding=self.padding)


class SpectralConvTranspose2d(SpectralNorm):
    """Transposed convolution without bias of a 1×1 map, under spectral norm: a linear layer."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        weight = nn.ConvTranspose2d(channels, out_channels, kernel).weight.detach()
        super().__init__(weight, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.flatten(1) * self.scale()) @ self.weight_orig.flatten(1)
        return y.view(len(x), *self.weight_orig.shape[1:])
