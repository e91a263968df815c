"""DBAE: Diffusion Bridge AutoEncoders for unsupervised representation learning, in PyTorch.

model = dbae.load_model("ema_0.9999_1020000.pt")
z = model.encode(x0)            # (N, latent_dim) from images (N, 3, S, S) in [−1, 1]
x0_hat = model.reconstruct(x0)
"""

from .bridge import Bridge
from .checkpoint import load_model, load_weights
from .errors import UserError
from .model import DBAE, create_model
from .presets import PRESETS, ModelConfig, TrainConfig
from .sampling import Samples, sample

__version__ = "0.1.0"

__all__ = [
    "DBAE",
    "PRESETS",
    "Bridge",
    "ModelConfig",
    "Samples",
    "TrainConfig",
    "UserError",
    "create_model",
    "load_model",
    "load_weights",
    "sample",
]
