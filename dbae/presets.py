"""What `ffhq`, `celeba`, `demo`, … mean: architecture, data layout and recipe.

The only place with hyper-parameters. A command-line flag of the same name as a field here
overrides it; a checkpoint carries the `ModelConfig` it was trained with.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .bridge import SCHEDULES, WEIGHT_SCHEDULES
from .cli import option
from .errors import UserError
from .precision import PRECISIONS

IMAGE_SIZES = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a DBAE: the three networks and the bridge. Stored with weights."""

    image_size: int = option(64, "height and width of the images: 32, 64, 128 or 256")
    num_channels: int = option(64, "base channels C of UNet and encoder")
    latent_dim: int = option(512, "numbers in z")
    endpoint_channels: int = option(
        0, "base channels of the endpoint decoder (0: num_channels, at most 64)"
    )
    stochastic: bool = option(True, "stochastic encoder (the paper's DBAE; false is DBAE-d)")
    num_res_blocks: int = option(2, "residual blocks per resolution")
    attention_resolutions: tuple[int, ...] = option(
        (32, 16, 8), "UNet feature-map sizes with attention, comma-separated"
    )
    dropout: float = option(0.1, "dropout in the UNet's residual blocks")
    schedule: str = option("vp", "diffusion bridge", choices=SCHEDULES)
    sigma_data: float = option(0.5, "σ_0: standard deviation of x_0 assumed by preconditioning")
    end_data: float = option(0.5, "σ_T: standard deviation of x_T assumed by preconditioning")
    cov_xy: float = option(0.0, "σ_0T: covariance of x_0 and x_T assumed by preconditioning")
    weight_schedule: str = option("bridge_karras", "loss weight", choices=WEIGHT_SCHEDULES)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if self.image_size not in IMAGE_SIZES:
            raise UserError(
                f"--image_size {self.image_size} has no architecture; choose one of "
                f"{', '.join(map(str, IMAGE_SIZES))}"
            )
        if self.num_channels < 32 or self.num_channels % 32:
            raise UserError(
                f"--num_channels {self.num_channels} must be a positive multiple of 32 "
                "(GroupNorm has 32 groups)"
            )
        if self.num_channels > 64 and self.num_channels % 64:
            raise UserError(
                f"--num_channels {self.num_channels}: above 64 it must be a multiple of 64 "
                "(attention heads have 64 channels)"
            )
        if self.endpoint_channels < 0 or self.endpoint_channels % 2:
            raise UserError(f"--endpoint_channels {self.endpoint_channels} must be even, or 0")
        for name in ("latent_dim", "num_res_blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("sigma_data", "end_data", "cov_xy"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name} {getattr(self, name)} must be a finite number")
        if self.sigma_data <= 0 or self.end_data < 0:
            raise UserError("--sigma_data must be positive and --end_data not negative")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} must lie in [0, 1)")
        for name, known in (("schedule", SCHEDULES), ("weight_schedule", WEIGHT_SCHEDULES)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )

    @property
    def endpoint_width(self) -> int:
        """Base channels of the endpoint decoder: 64 is the published width at every size."""
        return self.endpoint_channels or min(64, self.num_channels)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The config stored in a checkpoint or `config.json`; unknown fields raise UserError."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(
                f"stored model configuration has unknown fields {', '.join(unknown)}; "
                "it was written by a newer version of this package"
            )
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe and the run: data, optimisation, cadence, output."""

    dataset: str = option("demo", "which data preset to read")
    data_dir: str | None = option(None, "folder, zip or LMDB with the images")
    split: str = option("train", "which part of the data to train on")
    bad_images: str = option(
        "error", "an unreadable image stops the run or is replaced", choices=("error", "skip")
    )
    fast_decode: bool = option(
        False,
        "decode large JPEGs at a part of their size: faster, within about half a grey level (RMS)",
    )
    workdir: str = option("workdir", "runs are written to WORKDIR/EXP")
    batch_size: int = option(64, "images per step and process (GPU)")
    microbatch: int = option(32, "images per forward pass; gradients are averaged over them")
    lr: float = option(1e-4, "RAdam learning rate")
    ema_rate: float = option(0.9999, "decay of the averaged weights (with warm-up)")
    max_steps: int = option(1_020_000, "the run ends after this many steps")
    time_sampling: str = option(
        "real-uniform", "distribution of training times", choices=("real-uniform", "lognormal")
    )
    flip: bool = option(True, "random horizontal flips")
    precision: str = option(
        "auto",
        "arithmetic of the networks; auto: bf16 where the device is made for it, else fp32",
        choices=PRECISIONS,
    )
    compile: bool = option(False, "compile the networks at the start (torch.compile)")
    activation_checkpointing: bool = option(
        False, "less memory for more time: keep few activations, compute them again backwards"
    )
    seed: int = option(0, "everything random is a function of this and the sample's position")
    max_bad_steps: int = option(
        10, "so many steps in a row whose loss or gradient is not finite end the run"
    )
    max_spike: float = option(
        0, "skip a step whose loss is this many times the recent mean (0: none)"
    )
    max_minutes: float = option(
        0, "save, and end with exit code 143, after so many minutes (0: no limit)"
    )
    timeout_s: float = option(
        600, "seconds that a process waits for another, or for a data-loading worker"
    )
    save_interval: int = option(10_000, "steps between checkpoints")
    keep_last: int = option(5, "the newest so many checkpoints are kept (0: all)")
    keep_every: int = option(100_000, "checkpoints at multiples of this step are kept too")
    mirror: str | None = option(
        None, "folder elsewhere (gs://…, az://…) that gets a copy of checkpoints, and restores them"
    )
    async_save: bool = option(False, "write checkpoints in the background, from a copy in memory")
    sample_interval: int = option(10_000, "steps between reconstruction grids (0: none)")
    log_interval: int = option(100, "steps between log lines")
    num_workers: int = option(-1, "data-loading processes per rank (-1: chosen from the cores)")
    logger: str = option(
        "none", "also log to this service", choices=("none", "tensorboard", "wandb")
    )

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "microbatch", "max_steps", "save_interval", "log_interval",
            "max_bad_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.batch_size % self.microbatch and self.microbatch < self.batch_size:
            raise UserError(
                f"--batch_size {self.batch_size} is not a multiple of --microbatch "
                f"{self.microbatch}"
            )
        for name in ("sample_interval", "keep_last", "keep_every", "max_minutes", "max_spike"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)} must not be negative")
        if not 1 <= self.timeout_s < float("inf"):
            raise UserError(f"--timeout_s {self.timeout_s} must be at least 1")
        if not 0 <= self.ema_rate < 1:
            raise UserError(f"--ema_rate {self.ema_rate} must lie in [0, 1)")
        if not self.lr > 0:
            raise UserError(f"--lr {self.lr} must be positive")


@dataclasses.dataclass(frozen=True)
class DataPreset:
    """How the images of a data set are found, cut and split."""

    # "files": folder, zip or LMDB at data_dir; "lfw": LFW's own layout; "demo": drawn on the fly
    source: str
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width, before the resize
    # Resize to (s, s); "center": cut the centred square first; "enlarge": resize to a tenth more,
    # then cut the centred square.
    fit: str = "stretch"
    # Name → first and past-the-last index. A set with "train" alone is used whole. None: the
    # source's own lists or folders, or a division by hash (see `dbae.data.open_dataset`).
    splits: dict[str, tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named data set with the model and recipe that fit it."""

    data: DataPreset
    model: ModelConfig
    train: dict[str, Any]  # fields of TrainConfig that differ from its defaults


_128 = ModelConfig(image_size=128, num_channels=128)
_64 = ModelConfig(image_size=64, num_channels=64)

PRESETS: dict[str, Preset] = {
    "ffhq": Preset(DataPreset("files", splits={"train": (0, 70_000)}), _128, {}),
    "celebahq": Preset(DataPreset("files", splits={"train": (0, 30_000)}), _128, {}),
    "bedroom": Preset(DataPreset("files", splits={"train": (0, 3_033_042)}), _128, {}),
    "horse": Preset(DataPreset("files", splits={"train": (0, 2_000_340)}), _128, {}),
    "celeba": Preset(
        DataPreset(
            "files",
            crop=(57, 25, 128, 128),
            splits={"train": (0, 162_770), "valid": (162_770, 182_637), "test": (182_637, 202_599)},
        ),
        _64,
        {},
    ),
    "lfw": Preset(DataPreset("lfw", fit="enlarge"), _64, {}),
    "folder": Preset(DataPreset("files", fit="center"), _64, {"split": "all"}),
    "demo": Preset(
        DataPreset("demo", splits={"train": (0, 50_000), "test": (50_000, 55_000)}),
        ModelConfig(
            image_size=32, num_channels=32, latent_dim=24, endpoint_channels=16, num_res_blocks=1,
            attention_resolutions=(8,), dropout=0.0, stochastic=False,
        ),
        {"batch_size": 16, "lr": 4e-3, "max_steps": 500, "save_interval": 250,
         "sample_interval": 250, "log_interval": 20, "flip": False},
    ),
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """The preset called `name`; an unknown name raises UserError with the known ones."""
    if name not in PRESETS:
        raise UserError(f"data set {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
