"""Stateless randomness: every draw is a pure function of (seed, purpose, position).

Nothing in training or evaluation keeps a generator between steps. Each sample's noise is drawn
from its own generator, seeded by the run's seed, the purpose of the draw and the sample's global
position. So a restart begins at a number, and neither the batch size nor the number of processes
decides which sample meets which noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def fold(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2⁶³) derived from a seed and any numbers or words, the same everywhere."""
    text = "\0".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def normal(
    seed: int, stream: str, positions: Sequence[int], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """N(0, 1) noise, float32, shape (len(positions), *shape); row i depends on positions[i] only.

    Numbers of one device type are reproducible; CPU and CUDA generators differ from each other.
    """
    out = torch.empty(len(positions), *shape, device=device)
    generator = torch.Generator(device)
    for row, position in zip(out, positions, strict=True):
        row.normal_(generator=generator.manual_seed(fold(seed, stream, position)))
    return out


def uniform(seed: int, stream: str, positions: Sequence[int], device: torch.device) -> Tensor:
    """U[0, 1) numbers, float64, shape (len(positions),), made on the CPU: the same everywhere."""
    generator = torch.Generator()
    draws = [
        torch.rand((), dtype=torch.float64, generator=generator.manual_seed(fold(seed, stream, p)))
        for p in positions
    ]
    numbers = torch.stack(draws)
    return numbers.float().to(device) if device.type == "mps" else numbers.to(device)
