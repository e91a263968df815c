"""What every evaluation shares: sampling options, where results go, the facts beside a figure."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ..checkpoint import newest_weights, step_of
from ..cli import check_choices, option
from ..errors import UserError
from ..files import atomic_file, sha256
from ..model import DBAE
from ..sampling import SAMPLERS, Options, reads


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are made from z. Each field is a command-line flag."""

    batch_size: int = option(64, "images per forward pass")
    sampler: str = option("euler", "how the reverse bridge is integrated", choices=SAMPLERS)
    steps: int = option(100, "grid points N of the sampler; of dbim and exp: steps")
    rho: float = option(7.0, "all but exp: exponent of the time grid; 1 is uniform")
    churn: float = option(0.0, "share of each step done by the SDE, in [0, 1); 0 is the ODE")
    guidance: float = option(1.0, "weight w of the pull towards x_T")
    eta: float = option(0.0, "dbim of order 1: noise within the steps, in [0, 1]")
    order: int = option(2, "dbim: order of the update, 1, 2 or 3")
    latent: str = option(
        "sample",
        "z of a stochastic encoder: drawn, as published, or its mean",
        choices=("sample", "mean"),
    )
    seed: int = option(0, "all noise is a function of this and the image's place")
    bad_images: str = option(
        "error", "an unreadable image stops the run or is replaced", choices=("error", "skip")
    )
    output_dir: str | None = option(
        None, "folder of the results (default: in sample_STEP beside the checkpoint)"
    )

    def __post_init__(self) -> None:
        try:
            Options(**self.sampler_options())
        except UserError as error:  # begins with the option's name, which here is a flag
            raise UserError(f"--{error}") from None
        require_at_least(self, batch_size=1, seed=0)
        check_choices(self)

    folder_prefix: ClassVar[str] = ""

    def output_folder(self, checkpoint: Path) -> Path:
        """--output_dir, else `sample_{step}/{prefix}{sampler_name}` beside the checkpoint."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        return results_folder(checkpoint) / (self.folder_prefix + self.sampler_name)

    @property
    def sampler_name(self) -> str:
        """How the sampler appears in a folder's name.

        `euler_7.0_100_w=1.0_churn=0.0`; of DBIM `dbim_7.0_9_w=1.0_churn=0.0_eta=0.0_order=2`.
        """
        dbim = f"_eta={float(self.eta)}_order={self.order}" if self.sampler == "dbim" else ""
        return (
            f"{self.sampler}_{float(self.rho)}_{self.steps}"
            f"_w={float(self.guidance)}_churn={float(self.churn)}{dbim}"
        )

    def sampler_options(self) -> dict[str, Any]:
        """The keywords of `dbae.sample` that these options stand for."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Options)}


def require_at_least(config: Any, **lowest: int) -> None:
    """Raise UserError where a field of `config` is below its lowest value."""
    for name, bound in lowest.items():
        if getattr(config, name) < bound:
            what = "not be negative" if bound == 0 else f"be at least {bound}"
            raise UserError(f"--{name} {getattr(config, name)} must {what}")


def results_folder(checkpoint: Path) -> Path:
    """`sample_{step}` beside the weights: the folder of all results of one checkpoint.

    The step is the number that the file's name ends in; without one it is the name's stem.
    """
    weights = newest_weights(checkpoint)
    step = step_of(weights)
    return weights.parent / f"sample_{weights.stem if step < 0 else step}"


def is_ema(weights: Path) -> float | bool | None:
    """The decay of averaged weights, False for live ones, None where the name does not tell."""
    average = re.fullmatch(r"ema_([\d.]+)_\d+", weights.stem)
    if average:
        return float(average[1])
    return False if weights.stem.startswith("model_") else None


def model_facts(model: DBAE, checkpoint: Path | None) -> dict[str, Any]:
    """Which weights, of which architecture: JSON-able, for the protocol beside a result."""
    weights = None if checkpoint is None else newest_weights(checkpoint)
    return {
        "checkpoint": weights.name if weights else None,
        "checkpoint_sha256": sha256(weights) if weights else None,
        "ema": is_ema(weights) if weights else None,
        "model": dataclasses.asdict(model.config),
        "schedule": model.config.schedule,
        "end_data": model.config.end_data,
        "precision": model.precision,
    }


def sampling_facts(
    model: DBAE,
    config: SamplingConfig,
    checkpoint: Path | None,
    rounding: str = "round((x + 1) * 127.5)",
) -> dict[str, Any]:
    """What made images: weights, sampler, noise, conversions; JSON-able, for the protocol."""
    return {
        **model_facts(model, checkpoint),
        "batch_size": config.batch_size,
        **{
            name: value
            for name, value in config.sampler_options().items()
            if name in reads(config.sampler)
        },
        "seed": config.seed,
        "clip_denoised": True,
        "latent": latent_used(model, config.latent),
        "image_range": "[-1, 1] for the model",
        "image_8_bit": f"{rounding}, clamped to 0..255",
        "device": next(model.parameters()).device.type,
    }


def sampling_line(protocol: Mapping[str, Any]) -> str:
    """What `sampling_facts` and the NFE say, for the terminal."""
    average = "not recorded" if protocol["ema"] is None else protocol["ema"]
    return (
        f"{protocol['checkpoint'] or 'a model'}, EMA {average}; {sampler_text(protocol)}, "
        f"{protocol['nfe']} NFE, seed {protocol['seed']}, z: {protocol['latent']}"
    )


def sampler_text(protocol: Mapping[str, Any]) -> str:
    """`euler-100`, `exp-5`, `euler-333 SDE 0.33`, `dbim-9 order 2`, `dbim-9 order 1 eta 1.0`."""
    text = f"{protocol.get('sampler', '?')}-{protocol.get('steps', '?')}"
    for name, shown in (("churn", "SDE"), ("order", "order"), ("eta", "eta")):
        if protocol.get(name):
            text += f" {shown} {protocol[name]}"
    return text


def latent_used(model: DBAE, latent: str) -> str:
    """Which z a result was made with: deterministic, or the sample or mean of an encoder."""
    return latent if model.config.stochastic else "deterministic"


def seen_in_training(model: DBAE, ours: Mapping[str, Any]) -> bool | None:
    """Whether the model was trained on images of this description; None where nothing tells."""
    trained = model.trained_on
    if trained is None or "source" not in trained:
        return None
    same_images = trained["source"] == ours["source"]
    return same_images and (trained["split"] in ("all", ours["split"]) or ours["split"] == "all")


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of what the figures depend on; None for a package that is not installed."""
    import dbae  # the package may run from a clone, where no metadata is installed

    found: dict[str, str | None] = {"python": platform.python_version(), "dbae": dbae.__version__}
    for package in ("torch", "torchvision", "numpy", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def text_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells, the first of them the head, as an aligned table for the terminal."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in cells]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def enlarged(picture: Image.Image, size: int) -> Image.Image:
    """A picture of images of `size` pixels, three times as large where these are small."""
    if size > 64:
        return picture
    return picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)
