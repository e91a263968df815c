"""What a linear probe looks at: z, or in the same harness raw pixels, PCA, an untrained encoder.

So that a figure means something: each baseline meets the same images, flips and probes as z.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.loader import default_workers, in_batches, load_batches
from ..distributed import Context
from ..model import DBAE
from ..random import fold
from .baselines import Pca, training_positions
from .latents import Latents, encode_images
from .progress import Progress

if TYPE_CHECKING:
    from ..data import ImageDataset

BASELINES = ("pixels", "pca", "untrained")
_PIXELS = 32  # raw pixels of larger images are those of a thumbnail of this size
_TRAIN_VALUES = 2**27  # float32 values of raw pixels that the training part may hold: 512 MiB


@dataclasses.dataclass(frozen=True)
class Features:
    """What one method makes of the images of a probe's parts.

    `epoch` (0-based) → the training part (n_train, d) as that epoch sees it; `train`, `valid` and
    `test` (n, d) are the unflipped images. `train_rows`: which rows of the training part these
    are, where a method takes only some. All float32 on the CPU.
    """

    method: str
    epoch: Callable[[int], Tensor]
    train: Tensor
    valid: Tensor
    test: Tensor
    train_rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of a data set by their positions: one part of what a probe is fitted and tested on."""

    dataset: ImageDataset
    rows: np.ndarray  # int64 (n,)


def flips(n: int, seed: int, epoch: int) -> Tensor:
    """Which of n training images are mirrored in an epoch: bool (n,), each with one half."""
    generator = torch.Generator().manual_seed(fold(seed, "flips of a probe", epoch))
    return torch.rand(n, generator=generator) < 0.5


def of_latents(parts: Sequence[Latents], latent: str, flip: bool, seed: int) -> Features:
    """z of the training, validation and test part.

    Of a stochastic encoder μ (`latent` "mean") or one draw for each image and epoch ("sample").
    """
    n = len(parts[0])

    def epoch(number: int) -> Tensor:
        return parts[0].z(latent, seed, number, flips(n, seed, number) if flip else None)

    train, valid, test = (
        part.z(latent, fold(seed, name))
        for part, name in zip(parts, ("train", "valid", "test"), strict=True)
    )
    return Features("DBAE", epoch, train, valid, test, np.arange(n))


def baselines(
    names: Sequence[str],
    model: DBAE,
    parts: Sequence[Split],
    context: Context,
    flip: bool,
    seed: int,
    batch_size: int,
) -> list[Features]:
    """Those of `BASELINES` that are named, on the same images.

    "pixels": raw pixels, of images above 32 pixels those of a thumbnail; "pca": of latent_dim
    components, fitted on up to 5000 training images; "untrained": the model's encoder before any
    training (seed 0; of a stochastic one μ). Of very many training images the first are taken, as
    `train_rows` says. `parts`: training, validation and test images.
    """
    train = parts[0]
    side = min(train.dataset.size, _PIXELS)
    kept = np.arange(min(len(train.rows), max(1, _TRAIN_VALUES // (3 * side**2))))
    parts = [Split(train.dataset, train.rows[kept]), *parts[1:]]
    methods: dict[str, Method] = {}
    if "pixels" in names:
        methods[f"raw pixels ({side}×{side})"] = _thumbnails
    if "pca" in names:
        shown = training_positions(len(kept), 3 * train.dataset.size**2)
        sample = torch.stack([train.dataset[int(train.rows[i])].image for i in shown])
        components = model.config.latent_dim
        if reason := Pca.impossible(components, sample.shape):
            context.print(f"PCA is not compared: {reason}")
        else:
            methods[f"PCA, {components} components"] = Pca(sample, components).project
    if "untrained" in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            untrained = DBAE(model.config).eval().to(context.device)
        methods["untrained encoder"] = functools.partial(encode_images, untrained)

    values = [_apply(list(methods.values()), part, context, flip, batch_size) for part in parts]
    return [
        _of_arrays(name, [part[i] for part in values], seed, kept) for i, name in enumerate(methods)
    ]


def _thumbnails(images: Tensor) -> Tensor:
    """uint8 (n, 3, S, S) → float32 (n, 3·s·s) in [0, 1], s at most 32."""
    pixels = images.float() / 255
    if images.shape[-1] > _PIXELS:
        pixels = F.interpolate(pixels, (_PIXELS, _PIXELS), mode="bilinear", antialias=True)
    return pixels.flatten(1)


Method = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor | None]  # of the images, and of the mirrored ones where asked for


def _apply(
    methods: Sequence[Method], part: Split, context: Context, flip: bool, batch_size: int
) -> list[Pair]:
    """Every method on a part's images, which are read once."""
    rows = part.rows.tolist()
    batches = in_batches(rows, batch_size)
    shown = Progress("prepared for baselines", len(batches), len(rows), active=context.is_main)
    plain: list[list[Tensor]] = [[] for _ in methods]
    mirrored: list[list[Tensor]] = [[] for _ in methods]
    for batch in load_batches(part.dataset, batches, default_workers(part.dataset, 1), False):
        for i, method in enumerate(methods):
            plain[i].append(method(batch.images))
            if flip:
                mirrored[i].append(method(batch.images.flip(3)))
        shown.batch_done()
    shown.close()
    return [
        (torch.cat(found), torch.cat(other) if flip else None)
        for found, other in zip(plain, mirrored, strict=True)
    ]


def _of_arrays(name: str, parts: Sequence[Pair], seed: int, rows: np.ndarray) -> Features:
    (train, mirrored), (valid, _), (test, _) = parts

    def epoch(number: int) -> Tensor:
        if mirrored is None:
            return train
        return torch.where(flips(len(train), seed, number)[:, None], mirrored, train)

    return Features(name, epoch, train, valid, test, rows)
