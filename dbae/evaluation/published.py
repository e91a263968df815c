"""Figures of the DBAE paper (arXiv 2405.17111), to be printed beside one's own.

Table 1: linear probes; AP on CelebA, Pearson's r and MSE on LFW. Table 2: reconstruction of
CelebA-HQ at 128 pixels by models trained on FFHQ.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Probe(NamedTuple):
    """A row of Table 1."""

    trained_on: str
    method: str
    ap: float
    pearson_r: float
    mse: float


class Reconstruction(NamedTuple):
    """A row of Table 2."""

    method: str
    latent_dim: int  # numbers that the image is rebuilt from
    ssim: float
    lpips: float
    mse: float


PROBES = (
    Probe("CelebA", "SimCLR", 0.597, 0.474, 0.603),
    Probe("CelebA", "β-TCVAE", 0.450, 0.378, 0.573),
    Probe("CelebA", "IB-GAN", 0.442, 0.307, 0.597),
    Probe("CelebA", "DiffAE", 0.603, 0.598, 0.421),
    Probe("CelebA", "PDAE", 0.602, 0.596, 0.410),
    Probe("CelebA", "DiTi", 0.623, 0.617, 0.392),
    Probe("CelebA", "DBAE-d", 0.650, 0.635, 0.413),
    Probe("CelebA", "DBAE", 0.655, 0.643, 0.369),
    Probe("FFHQ", "SimCLR", 0.608, 0.481, 0.638),
    Probe("FFHQ", "β-TCVAE", 0.432, 0.335, 0.608),
    Probe("FFHQ", "IB-GAN", 0.428, 0.260, 0.644),
    Probe("FFHQ", "DiffAE", 0.605, 0.606, 0.410),
    Probe("FFHQ", "PDAE", 0.597, 0.603, 0.416),
    Probe("FFHQ", "DiTi", 0.614, 0.622, 0.384),
    Probe("FFHQ", "DBAE-d", 0.656, 0.638, 0.404),
    Probe("FFHQ", "DBAE", 0.664, 0.675, 0.332),
)

RECONSTRUCTIONS = (
    Reconstruction("StyleGAN2-W", 512, 0.677, 0.168, 0.016),
    Reconstruction("DiffAE (random x_T)", 512, 0.677, 0.073, 0.007),
    Reconstruction("PDAE (random x_T)", 512, 0.689, 0.098, 5.01e-3),
    Reconstruction("DBAE", 512, 0.920, 0.094, 4.81e-3),
    Reconstruction("DBAE-d", 512, 0.953, 0.072, 2.49e-3),
    Reconstruction("VQ-GAN", 65_536, 0.782, 0.109, 3.61e-3),
    Reconstruction("VQ-VAE2", 327_680, 0.947, 0.012, 4.87e-4),
    Reconstruction("NVAE", 6_005_760, 0.984, 0.001, 4.85e-5),
    Reconstruction("DDIM (inferred x_T)", 49_152, 0.917, 0.063, 0.002),
    Reconstruction("DiffAE (inferred x_T)", 49_664, 0.991, 0.011, 6.07e-5),
    Reconstruction("PDAE (inferred x_T)", 49_664, 0.994, 0.007, 3.84e-5),
)

# What the paper's probes use: only there do its figures stand beside one's own.
CLASSIFICATION_DATA, CLASSIFICATION_ATTRIBUTES = "celeba", 40
REGRESSION_DATA, REGRESSION_ATTRIBUTES = "lfw", 73


def probe_rows(*figures: str) -> list[dict[str, Any]]:
    """Table 1's rows as dicts with `trained_on`, `method` and these figures."""
    names = ("trained_on", "method", *figures)
    return [{name: getattr(row, name) for name in names} for row in PROBES]


def reconstruction_of(method: str) -> Reconstruction:
    """The row of Table 2 for this method. KeyError where there is none."""
    return {row.method: row for row in RECONSTRUCTIONS}[method]
