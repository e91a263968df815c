"""The endpoint decoder: z → x_T (FastGAN's generator, arXiv 2101.04775; as published)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .layers import SpectralConv2d, SpectralConvTranspose2d

# Channels at each resolution, in units of base/64: the released decoder has base 64.
_CHANNELS = {4: 1024, 8: 512, 16: 256, 32: 128, 64: 128, 128: 64, 256: 32}
# A squeeze-excitation gate leads from the key's map (a sixteenth as wide) into the key's map.
_GATED = (64, 128, 256)


class _Init(nn.Module):
    """z → 4×4 map: transposed convolution, batch norm, GLU."""

    def __init__(self, latent_dim: int, channels: int) -> None:
        super().__init__()
        self.init = nn.Sequential(
            SpectralConvTranspose2d(latent_dim, 2 * channels, 4),
            nn.BatchNorm2d(2 * channels),
            nn.GLU(dim=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.init(z[:, :, None, None]))


class _Gate(nn.Module):
    """Squeeze-excitation: a small map → one factor in (0, 1) per channel of a large map."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            SpectralConv2d(channels, out_channels, 4),
            nn.SiLU(),
            SpectralConv2d(out_channels, out_channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        return cast(Tensor, large * self.main(small))


def _up_block(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        SpectralConv2d(channels, 2 * out_channels, 3, padding=1),
        nn.BatchNorm2d(2 * out_channels),
        nn.GLU(dim=1),
    )


class EndpointDecoder(nn.Module):
    """Maps z (N, latent_dim) to x_T (N, 3, S, S), unbounded.

    Args:
        image_size: S, one of 32, 64, 128, 256.
        latent_dim: numbers in z.
        base_channels: width; 64 is the released one (1024 channels on the 4×4 map).
    """

    def __init__(self, image_size: int, latent_dim: int, base_channels: int) -> None:
        super().__init__()
        self.image_size = image_size
        width = {size: channels * base_channels // 64 for size, channels in _CHANNELS.items()}
        self.init = _Init(latent_dim, width[4])
        size = 4
        while size < image_size:
            self.add_module(f"feat_{2 * size}", _up_block(width[size], width[2 * size]))
            size *= 2
        for size in _GATED:
            if size <= image_size:
                self.add_module(f"se_{size}", _Gate(width[size // 16], width[size]))
        self.add_module(f"to_{image_size}", SpectralConv2d(width[image_size], 3, 1))

    def forward(self, z: Tensor) -> Tensor:
        maps = {4: self.init(z)}
        size = 4
        while size < self.image_size:
            small, size = maps[size], 2 * size
            maps[size] = self.get_submodule(f"feat_{size}")(small)
            if size in _GATED:
                maps[size] = self.get_submodule(f"se_{size}")(maps[size // 16], maps[size])
        return cast(Tensor, self.get_submodule(f"to_{self.image_size}")(maps[size]))
