"""From one image to another through z: the pictures between, and how evenly they change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cli import option
from ..data import ImageDataset
from ..errors import UserError
from ..model import DBAE
from . import pictures, results
from .metrics import mse
from .pictures import Picture, PictureConfig
from .progress import Progress
from .protocol import (
    require_at_least,
    sampling_facts,
    sampling_line,
    text_table,
    versions,
    write_png,
)
from .reconstruction import encode

_PARALLEL = 1e-6  # sine of the angle below which a great circle is not well defined
_UNIT = "root mean square difference of pixel values scaled to [0, 1]"


@dataclasses.dataclass(frozen=True)
class InterpolationConfig(PictureConfig):
    """What is interpolated, and how. Each field is a command-line flag."""

    points: int = option(11, "images of each strip, both ends included")
    mode: str = option(
        "linear", "path of z: a straight line, or an arc", choices=("linear", "spherical")
    )

    folder_prefix: ClassVar[str] = "interpolation_"
    default_images: ClassVar[tuple[str, ...]] = ("assets/img1.png", "assets/img2.png")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, points=2)


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """The strip: `images` and `x_T` uint8 (n, 3, S, S), `z` (n, latent_dim); what metrics.json
    says; its figures as a table."""

    images: Tensor
    x_T: Tensor
    z: Tensor
    metrics: dict[str, Any]
    table: str


def between(z_1: Tensor, z_2: Tensor, points: int, mode: str = "linear") -> Tensor:
    """`points` vectors from z_1 to z_2 (latent_dim,), both included → (points, latent_dim).

    With w = 0 … 1 in even steps, "linear" is (1 − w) z_1 + w z_2, as published. "spherical"
    (Shoemake 1985) turns the direction evenly, u = (sin((1−w)θ) u_1 + sin(wθ) u_2) / sin θ with θ
    the angle between the unit vectors u_1 and u_2, and changes the length evenly,
    (1 − w) ‖z_1‖ + w ‖z_2‖. Vectors that are parallel, opposite or zero have no such arc: there
    it is linear. Computed in float64, so that the ends are z_1 and z_2 exactly.
    """
    first, last = z_1.cpu().double(), z_2.cpu().double()
    w = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    path = (1 - w) * first + w * last
    lengths = first.norm(), last.norm()
    u_1, u_2 = first / lengths[0], last / lengths[1]
    angle = 2 * torch.atan2((u_1 - u_2).norm(), (u_1 + u_2).norm())  # exact for small angles too
    if mode == "spherical" and angle.sin() > _PARALLEL:  # not so where a length is zero: NaN
        turned = (((1 - w) * angle).sin() * u_1 + (w * angle).sin() * u_2) / angle.sin()
        path = turned * ((1 - w) * lengths[0] + w * lengths[1])
    return path.to(z_1.dtype).to(z_1.device)


def through(z: Tensor, points: int, mode: str = "linear") -> Tensor:
    """`between` from each row of z (n, latent_dim) to the next, rows in common not doubled.

    Returns ((n − 1)(points − 1) + 1, latent_dim).
    """
    parts = [between(*pair, points, mode) for pair in itertools.pairwise(z)]
    return torch.cat([parts[0][:1], *(part[1:] for part in parts)])


def smoothness(images: Tensor) -> dict[str, float]:
    """How a sequence of uint8 images (n, 3, S, S), n ≥ 2, moves from its first to its last.

    Distances are root mean square differences of pixels scaled to [0, 1]. `path_length`: the sum
    over neighbours; `direct`: from the first to the last; `straightness`: direct / path_length,
    at most 1 (which a cross-fade has); `largest_step`: the largest distance of neighbours over
    their mean (1: all steps are equal). Both are 1 where all images are the same.
    """
    steps = mse(images[:-1], images[1:]).sqrt()
    direct = float(mse(images[:1], images[-1:]).sqrt())
    length = float(steps.sum())
    return {
        "path_length": length,
        "direct": direct,
        # the triangle inequality holds, but not to the last bit of floating-point sums
        "straightness": min(1.0, direct / length) if length else 1.0,
        "largest_step": float(steps.max() / steps.mean()) if length else 1.0,
    }


def interpolate(
    model: DBAE,
    inputs: Sequence[Picture],
    config: InterpolationConfig,
    *,
    dataset: ImageDataset | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Interpolation:
    """The images on the path of z through the inputs, in their order.

    z noise of a stochastic encoder belongs to each input; churn noise is the same for all images,
    so that they differ by z alone.

    Args:
        model: in eval mode.
        inputs: two or more.
        dataset: where they come from, if from a data set; only described.
        checkpoint: the weights' file, to be named in the protocol.
        progress: show it.

    Raises:
        UserError: fewer than two inputs, or a model whose output is not finite.
    """
    if len(inputs) < 2:
        raise UserError(f"an interpolation needs at least two images, {len(inputs)} is given")
    ends = encode(model, pictures.to_batch(inputs, model), config, range(len(inputs)))
    z = through(ends, config.points, config.mode)
    shown = Progress(
        "made", pictures.batches(len(z), config), len(z), config.steps, active=progress
    )
    made = pictures.make_images(model, z, config, [0] * len(z), shown)
    shown.close()

    stride = config.points - 1
    names = [given.name for given in inputs]
    segments = [
        {"from": a, "to": b, **smoothness(made.images[i * stride : (i + 1) * stride + 1])}
        for i, (a, b) in enumerate(itertools.pairwise(names))
    ]
    metrics = {
        "kind": "interpolation",
        "protocol": {
            "mode": config.mode,
            "points": config.points,
            "dataset": dataset.describe() if dataset else None,
            "inputs": [given.facts for given in inputs],
            **sampling_facts(model, config, checkpoint),
            "nfe": made.nfe,
            "noise": "z noise of a stochastic encoder per input; one churn noise for all images",
            "smoothness": "of the 8-bit images; straightness = direct / path_length (a cross-fade "
            "has 1), largest_step = largest distance of neighbours / mean distance",
            "versions": versions("pillow"),
        },
        "images": names,
        "smoothness": {**smoothness(made.images), "unit": _UNIT},
        "segments": segments,
    }
    return Interpolation(made.images, made.x_T, z, metrics, _table(metrics))


def write(result: Interpolation, folder: Path) -> list[Path]:
    """Write strips, frames, the animation and metrics.json; returns those to be looked at.

    Raises UserError where the folder cannot be written.
    """
    pictures.prepare(folder, ["frames/x0_[0-9]*.png"])
    strips = {"interpolation_x0.png": result.images, "interpolation_xT.png": result.x_T}
    for name, images in strips.items():
        write_png(folder / name, pictures.strip(images))
    for i, image in enumerate(result.images):
        write_png(folder / "frames" / f"x0_{i:03d}.png", pictures.picture(image))
    pictures.write_gif(folder / "interpolation.gif", result.images)
    results.write_metrics(folder, result.metrics)
    names = [*strips, "interpolation.gif", results.METRICS_FILE]
    return [folder / name for name in names]


def _table(metrics: dict[str, Any]) -> str:
    segments, protocol = metrics["segments"], metrics["protocol"]
    figures = ("path_length", "direct", "straightness", "largest_step")
    rows = [["from", "to", *(name.replace("_", " ") for name in figures)]]
    rows += [[s["from"], s["to"], *(f"{s[name]:.4f}" for name in figures)] for s in segments]
    return (
        f"{text_table(rows)}\n(distances: {_UNIT}; straightness: direct / path length; largest "
        f"step: in mean steps)\n{protocol['mode']} in z, {protocol['points']} points; "
        f"{sampling_line(protocol)}"
    )
