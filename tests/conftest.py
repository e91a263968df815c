"""A small model and its checkpoint, for the tests of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dbae
from dbae.checkpoint import save_weights


@pytest.fixture(scope="module")
def model() -> dbae.DBAE:
    """A small stochastic model whose UNet does something: nothing is zero as at initialisation."""
    torch.manual_seed(0)
    model = dbae.create_model("demo", latent_dim=4, stochastic=True)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model: dbae.DBAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's weights in a folder with spaces and letters beyond ASCII in its name."""
    path = tmp_path_factory.mktemp("a run, à côté") / "ema_0.9999_000012.pt"
    save_weights(path, model)
    return path
