"""The encoder: image → z (DiffAE's half UNet without time; as published)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .layers import Attention, GroupNorm, ResBlock, Stage

# Channel multipliers by image size. All end on a 4×4 map; 64 and 128 are the published ones.
ENCODER_MULTIPLIERS = {
    32: (1, 2, 4, 4),
    64: (1, 2, 4, 8, 8),
    128: (1, 1, 2, 3, 4, 4),
    256: (1, 1, 2, 2, 4, 4, 4),
}
_ATTENTION_RESOLUTION = 16
DEAD_STD = 0.01  # a dimension of z whose standard deviation is below this is called dead


class Encoder(nn.Module):
    """Maps images (N, 3, S, S) in [−1, 1] to (N, out_dim) numbers.

    Args:
        image_size: S, one of 32, 64, 128, 256.
        num_channels: base channels C.
        out_dim: latent_dim, or twice that for a stochastic encoder.
        num_res_blocks: residual blocks per resolution.
    """

    def __init__(self, image_size: int, num_channels: int, out_dim: int, num_res_blocks: int):
        super().__init__()
        multipliers = ENCODER_MULTIPLIERS[image_size]
        channels, resolution = num_channels, image_size
        stages = [Stage(nn.Conv2d(3, channels, 3, padding=1))]
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, num_channels * multiplier)]
                channels = num_channels * multiplier
                if resolution == _ATTENTION_RESOLUTION:
                    layers.append(Attention(channels, 1, nn.Conv1d))
                stages.append(Stage(*layers))
            if level < len(multipliers) - 1:
                stages.append(Stage(ResBlock(channels, channels, resample="down")))
                resolution //= 2
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(
            ResBlock(channels, channels),
            Attention(channels, 1, nn.Conv1d),
            ResBlock(channels, channels),
        )
        self.out = nn.Sequential(
            GroupNorm(channels),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, out_dim, 1),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.input_blocks:
            x = stage(x)
        return cast(Tensor, self.out(self.middle_block(x)))


def split_stats(output: Tensor) -> tuple[Tensor, Tensor]:
    """Halves of a stochastic encoder's output → (μ, log σ), each squashed by 5 tanh(·/5)."""
    mean, log_sigma = output.chunk(2, dim=1)
    return 5 * torch.tanh(mean / 5), 5 * torch.tanh(log_sigma / 5)


def reparameterise(mu: Tensor, log_sigma: Tensor, noise: Tensor) -> Tensor:
    """z = μ + (exp(log σ) + 0.01) ε."""
    return mu + (torch.exp(log_sigma) + 0.01) * noise
