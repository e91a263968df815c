"""The denoising UNet: (x_t, c_noise, z, x_T) → raw prediction (ADM, arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .layers import Attention, GroupNorm, ResBlock, Stage, timestep_embedding, zero_init

UNET_MULTIPLIERS = {
    32: (1, 2, 2, 2),
    64: (1, 2, 4, 8),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
_HEAD_CHANNELS = 64


class UNet(nn.Module):
    """Predicts from the bridge's state, its time, the latent and the endpoint.

    Args:
        image_size: S, one of 32, 64, 128, 256.
        num_channels: base channels C.
        latent_dim: numbers in z.
        num_res_blocks: residual blocks per resolution.
        attention_resolutions: feature-map sizes that get self-attention.
        dropout: probability inside the residual blocks.
    """

    def __init__(
        self,
        image_size: int,
        num_channels: int,
        latent_dim: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        multipliers = UNET_MULTIPLIERS[image_size]
        emb = 4 * num_channels
        self.time_embed = nn.Sequential(
            nn.Linear(num_channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        self.label_emb = nn.Linear(latent_dim, emb)

        def stage(channels: int, out: int, resolution: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(channels, out, emb, dropout)]
            if resolution in attention_resolutions:
                layers.append(attention(out))
            return layers

        def attention(channels: int) -> Attention:
            return Attention(channels, max(1, channels // _HEAD_CHANNELS), nn.Conv2d)

        channels, resolution = num_channels, image_size
        down = [Stage(nn.Conv2d(6, channels, 3, padding=1))]
        skips = [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_res_blocks):
                down.append(Stage(*stage(channels, num_channels * multiplier, resolution)))
                channels = num_channels * multiplier
                skips.append(channels)
            if level < len(multipliers) - 1:
                down.append(Stage(ResBlock(channels, channels, emb, dropout, "down")))
                skips.append(channels)
                resolution //= 2
        self.input_blocks = nn.ModuleList(down)

        self.middle_block = Stage(
            ResBlock(channels, channels, emb, dropout),
            attention(channels),
            ResBlock(channels, channels, emb, dropout),
        )

        up = []
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(num_res_blocks + 1):
                layers = stage(channels + skips.pop(), num_channels * multiplier, resolution)
                channels = num_channels * multiplier
                if level and block == num_res_blocks:
                    layers.append(ResBlock(channels, channels, emb, dropout, "up"))
                    resolution *= 2
                up.append(Stage(*layers))
        self.output_blocks = nn.ModuleList(up)

        self.out = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), zero_init(nn.Conv2d(channels, 3, 3, padding=1))
        )

    def forward(self, x: Tensor, noise_label: Tensor, z: Tensor, x_T: Tensor) -> Tensor:
        """x, x_T: (N, 3, S, S), x already scaled by c_in; noise_label: (N,); z: (N, latent_dim)."""
        emb = self.time_embed(timestep_embedding(noise_label, self.num_channels))
        emb = emb + self.label_emb(z)
        h = torch.cat([x, x_T], dim=1)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return cast(Tensor, self.out(h))
