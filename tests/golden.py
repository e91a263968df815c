"""Weights by the rule of the golden figures, and the files themselves (tests/data)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def arrays(name: str) -> Mapping[str, np.ndarray]:
    return np.load(DATA / f"{name}.npz")


def manifest(name: str) -> list[list[Any]]:
    """Rows [key, shape, dtype, "parameter" | "buffer", used]."""
    rows: list[list[Any]] = json.loads((DATA / f"manifest_{name}.json").read_text())
    return rows


def rule_weights(manifest_name: str, overrides: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A state dict with every key of a manifest, made by the weight rule.

    Each key's numbers come from PCG64(crc32(key)); `buffer:<key>` arrays override the rule.
    """
    state = {}
    for key, shape, dtype, _, _ in manifest(manifest_name):
        n = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
        last = key.rsplit(".", 1)[-1]
        if f"buffer:{key}" in overrides:
            value = overrides[f"buffer:{key}"]
        elif last == "num_batches_tracked":
            value = np.zeros(shape)
        elif last == "running_var":
            value = 0.08 * (1 + 0.1 * np.abs(n))
        elif last == "running_mean":
            value = 0.1 * n
        elif len(shape) >= 2:
            value = n / np.sqrt(np.prod(shape[1:]))
        elif last == "bias":
            value = 0.05 * n
        else:
            value = 1 + 0.1 * n
        state[key] = torch.from_numpy(np.asarray(value)).to(getattr(torch, dtype))
    return state
