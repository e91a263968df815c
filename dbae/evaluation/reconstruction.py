"""Reconstruct a data set: image → z → x_T → sampler → image, and score it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import random
from ..cli import option
from ..data.images import image_grid, to_model_range, to_uint8
from ..data.loader import in_batches
from ..distributed import Context
from ..errors import UserError
from ..model import DBAE
from ..sampling import Samples
from . import results
from .baselines import MeanImage, Pca, training_positions
from .metrics import ALEXNET_SHA256, floor_uint8, load_lpips
from .progress import Progress
from .protocol import (
    SamplingConfig,
    enlarged,
    require_at_least,
    sampling_facts,
    seen_in_training,
    write_png,
)
from .unfinished import Unfinished

if TYPE_CHECKING:
    from ..data import ImageDataset

_GRID_IMAGES = 64  # at most so many in one PNG
_COMPARED = 12  # columns of comparison.png


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig(SamplingConfig):
    """What is reconstructed, how, and how it is scored. Each field is a command-line flag."""

    dataset: str = option("demo", "which data preset to read; the checkpoint decides the size")
    data_dir: str | None = option(None, "folder, zip or LMDB with the images")
    split: str = option("test", "which part of the data: all, train, valid, test")
    num_samples: int = option(0, "reconstruct the first so many images of the split (0: all)")
    weights_dir: str | None = option(
        None, "folder with alexnet-owt-7be5be79.pth for LPIPS (torch's cache is searched too)"
    )
    reference_compat: bool = option(
        False, "convert to 8 bits and count MSE and SSIM as the published script does"
    )
    baselines: bool = option(
        False, "also score the mean image and PCA with latent_dim components (fitted on train)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, num_samples=0)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: the content of metrics.json, the figures as a table, and what was written."""

    metrics: dict[str, Any]
    table: str
    folder: Path
    samples: Path  # all reconstructions in dataset order
    comparison: Path  # originals, x_T, reconstructions


@torch.no_grad()
def reconstruct_images(
    model: DBAE,
    x0: Tensor,
    config: ReconstructionConfig,
    positions: Sequence[int],
    callback: Callable[[Any], None] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Encode, decode the endpoint and sample a batch.

    Args:
        model: in eval mode.
        x0: images (N, 3, S, S) in [-1, 1] on the model's device.
        config: sampler, latent and seed are read.
        positions: each image's place in its data set, N numbers. All noise depends on the seed
            and these alone, so that neither batch size nor number of ranks matters.
        callback: called after each sampler step (`dbae.sampling.Step`).

    Returns:
        (images in [-1, 1], x_T unclamped, both (N, 3, S, S); denoiser calls per image).
    """
    z = encode(model, x0, config, positions)
    x_T = model.endpoint(z)
    out = sample_images(model, z, x_T, config, positions, callback)
    return out.images, x_T, out.nfe


@torch.no_grad()
def encode(model: DBAE, x0: Tensor, config: SamplingConfig, positions: Sequence[int]) -> Tensor:
    """z (N, latent_dim) of images (N, 3, S, S) in [-1, 1], as `config.latent` says.

    A stochastic encoder's noise for image i depends on `config.seed` and positions[i] alone.
    """
    noise = None
    if model.config.stochastic and config.latent == "sample":
        shape = (model.config.latent_dim,)
        noise = random.normal(config.seed, "latent", positions, shape, x0.device)
    return model.encode(x0, mean=config.latent == "mean", noise=noise)


def sample_images(
    model: DBAE,
    z: Tensor,
    x_T: Tensor,
    config: SamplingConfig,
    positions: Sequence[int],
    callback: Callable[[Any], None] | None = None,
) -> Samples:
    """Sample from x_T (N, 3, S, S), given z (N, latent_dim), with the config's sampler.

    The sampler's noise i (churn's, DBIM's) depends on `config.seed`, the step and positions[i]
    alone, so that images of the same position differ by their z and x_T only.
    """
    step = itertools.count()

    def churn_noise(x: Tensor) -> Tensor:
        stream = f"churn{next(step)}"
        return random.normal(config.seed, stream, positions, tuple(x.shape[1:]), x.device)

    return model.sample(z, x_T, noise=churn_noise, callback=callback, **config.sampler_options())


def run(
    model: DBAE,
    dataset: ImageDataset,
    config: ReconstructionConfig,
    context: Context,
    output_dir: Path,
    progress: bool = True,
    *,
    checkpoint: Path | None = None,
    train_dataset: ImageDataset | None = None,
) -> Result | None:
    """Reconstruct the first images of a data set and score them. Every rank must call this.

    Batch b is done by rank b mod world_size. All ranks write to `output_dir`/unfinished, which
    they must share; when all is there, rank 0 puts it in place of an earlier run's files. What a
    run that was killed has left there is kept, if all else is the same, and only the rest is done.

    Args:
        model: in eval mode, on `context.device`.
        dataset: images of the model's size.
        config: the protocol; which data, baselines and folder it names is only recorded.
        context: this process's place among the ranks.
        output_dir: receives the files of `results`, samples_*.npz, comparison.png, metrics.json.
        progress: show it, on rank 0.
        checkpoint: the weights' file, to be named in the protocol.
        train_dataset: fit the baselines on these images and score them too; read on rank 0.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        UserError: no images, an unreadable one, output that cannot be written or that another
            process is writing, or a model whose output is not finite.
    """
    if len(dataset) == 0:
        raise UserError(f"data set {config.dataset}, split {config.split}, has no images")
    count = min(config.num_samples or len(dataset), len(dataset))
    if config.num_samples > count:
        context.print(f"split {config.split} has only {count} images: all of them are used")
    described = dataset.describe()  # reads all names: once is enough
    seen = seen_in_training(model, described)
    if seen:
        context.print(f"note: the model was trained on images of this split ({dataset.split}) too")
    lpips, reason = load_lpips(config.weights_dir, context.device)
    scorer = results.Scorer(lpips, reason, config.reference_compat)
    protocol = {
        "dataset": described,
        "seen_in_training": seen,
        **_protocol(model, config, context, checkpoint),
        "n": count,
    }
    identity = {
        **protocol,
        "weights": None if checkpoint else _digest(model),
        "bad_images": config.bad_images,
        "lpips": ALEXNET_SHA256 if lpips else None,
        **scorer.protocol(),
    }
    unfinished = output_dir / results.UNFINISHED
    with Unfinished(unfinished, identity, context, results.FILES, results.METRICS_FILE) as work:
        fitted: dict[str, _Baseline] = {}
        with context.together():  # before the long work, as an unreadable image may end it
            if train_dataset is not None and context.is_main:
                fitted = _fit_baselines(model.config.latent_dim, train_dataset, dataset, count)
        batches = in_batches(range(count), config.batch_size)
        names = [f"batch_{b}" for b in range(len(batches))]
        done = work.done(names[context.rank :: context.world_size], "batches")
        todo = [b for b, name in enumerate(names) if name not in done]
        mine = [b for b in todo if b % context.world_size == context.rank]
        shown = Progress(
            "reconstructed",
            len(mine),
            sum(len(batches[b]) for b in todo),
            config.steps,
            active=progress and context.is_main,
        )
        for b in mine:
            batch, files = _batch(
                b, batches[b], model, dataset, config, context, unfinished, scorer, shown
            )
            work.keep(names[b], vars(batch), files)
            shown.batch_done()
        shown.close()
        context.barrier()
        if not context.is_main:
            return None

        in_order = [_Batch(**work.read(name)) for name in names]
        parts = [
            results.part_paths(unfinished, b % context.world_size, b) for b in range(len(batches))
        ]
        samples = results.merge(unfinished, [fake for _, fake in parts], in_order[0].nfe)
        _write_comparison(unfinished / "comparison.png", in_order)
        scores = results.concatenate(batch.scores for batch in in_order)
        x_T_scores = results.concatenate(batch.x_T_scores for batch in in_order)
        metrics = {
            "kind": "reconstruction",
            **scorer.row(scores),
            "protocol": {
                **protocol,
                "nfe": in_order[0].nfe,
                "replaced": [name for batch in in_order for name in batch.replaced],
                **scorer.protocol(),
            },
            "baselines": {
                "x_T": scorer.baseline("x_T", x_T_scores, nfe=0, seed=config.seed),
                **{name: baseline.row(parts, scorer) for name, baseline in fitted.items()},
            },
            "per_image": {
                "index": [dataset.source_index(position) for position in range(count)],
                "name": [dataset.image_name(position) for position in range(count)],
                **scores,
            },
        }
        results.write_metrics(unfinished, metrics)
        work.publish()
    return Result(
        metrics=metrics,
        table=results.table(metrics),
        folder=output_dir,
        samples=output_dir / samples.name,
        comparison=output_dir / "comparison.png",
    )


def _digest(model: DBAE) -> str:
    """A SHA-256 of the model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What rank 0 needs to know of a batch beyond its files: its record."""

    nfe: int
    scores: results.Scores
    x_T_scores: results.Scores
    replaced: list[str]  # names of images that could not be read
    compared: Tensor  # uint8 (3, n, 3, H, W): originals, x_T, reconstructions; n may be 0


def _batch(
    number: int,
    positions: Sequence[int],
    model: DBAE,
    dataset: ImageDataset,
    config: ReconstructionConfig,
    context: Context,
    folder: Path,
    scorer: results.Scorer,
    progress: Progress,
) -> tuple[_Batch, list[Path]]:
    """Reconstruct, write and score the images at these positions; what was written comes back."""
    items = [dataset[position] for position in positions]
    x0 = to_model_range(torch.stack([item.image for item in items]))
    images, x_T, nfe = reconstruct_images(
        model, x0.to(context.device), config, positions, progress.step_done
    )
    if not images.isfinite().all():
        raise UserError(
            f"the model's output for images {positions[0]} to {positions[-1]} is not finite; "
            "the checkpoint's training must have diverged"
        )
    to_8_bits = floor_uint8 if config.reference_compat else to_uint8
    real, start, fake = (to_8_bits(x.float().cpu()) for x in (x0, x_T, images))

    rank = context.rank
    files = list(results.part_paths(folder, rank, number))
    for path, batch in zip(files, (real, fake), strict=True):
        results.write_samples(path, batch)
    one = context.world_size == 1  # the published name; ranks' files bear the rank
    start_name = f"x_T_sample_{number}.png" if one else f"{rank}_x_T_sample_{number}.png"
    for name, batch in (
        (f"{rank}_sample_{number}.png", fake),
        (f"{rank}_x_{number}.png", real),
        (start_name, start),
    ):
        write_png(folder / name, image_grid(batch[:_GRID_IMAGES], 8))
        files.append(folder / name)

    shown = max(0, min(len(items), _COMPARED - positions[0]))
    record = _Batch(
        nfe=nfe,
        scores=scorer(real, fake),
        x_T_scores=scorer(real, start),
        replaced=[dataset.image_name(item.index) for item in items if item.replaced],
        compared=torch.stack([real[:shown], start[:shown], fake[:shown]]),
    )
    return record, files


@dataclasses.dataclass(frozen=True)
class _Baseline:
    """A fitted method, or the reason why there is none, and what its row says about the fit."""

    label: str
    method: MeanImage | Pca | None
    about: dict[str, Any]

    def row(self, parts: Sequence[tuple[Path, Path]], scorer: results.Scorer) -> dict[str, Any]:
        """Score the method on the originals of these parts."""
        if self.method is None:
            return {"label": self.label, **self.about}
        reals = (results.read_samples(path) for path, _ in parts)
        scores = results.concatenate(scorer(real, self.method.reconstruct(real)) for real in reals)
        return scorer.baseline(self.label, scores, **self.about)


def _fit_baselines(
    components: int, train: ImageDataset, dataset: ImageDataset, count: int
) -> dict[str, _Baseline]:
    """The mean image and PCA, fitted on training images of the data set that is scored."""
    positions = training_positions(len(train), 3 * train.size**2)
    images = torch.stack([train[position].image for position in positions])
    scored = {dataset.source_index(i) for i in range(count)}
    seen = sum(train.source_index(position) in scored for position in positions)
    shared = f", {seen} of them among the scored" if seen else ""
    about: dict[str, Any] = {
        "note": f"fitted on {len(images)} images of split {train.split}{shared}",
        "fit_split": train.split,
        "fit_n": len(images),
        "fit_among_scored": seen,
        "seed": 0,
    }
    label = f"PCA, {components} components"
    if reason := Pca.impossible(components, images.shape):
        pca = _Baseline(label, None, {"reason": reason})
    else:
        pca = _Baseline(label, Pca(images, components), about)
    return {"mean_image": _Baseline("mean image", MeanImage(images), about), "pca": pca}


def _protocol(
    model: DBAE, config: ReconstructionConfig, context: Context, checkpoint: Path | None
) -> dict[str, Any]:
    """What made the images."""
    rounding = "floor((x + 1) * 127.5)" if config.reference_compat else "round((x + 1) * 127.5)"
    return {
        "split": config.split,
        "selection": "the first n images of the split, in its order",
        "num_samples": config.num_samples,
        **sampling_facts(model, config, checkpoint, rounding),
        "world_size": context.world_size,
    }


def _write_comparison(path: Path, batches: Sequence[_Batch]) -> None:
    """The first originals over their x_T over their reconstructions; small images enlarged."""
    rows = torch.cat([batch.compared for batch in batches], dim=1)
    picture = image_grid(rows.flatten(0, 1), rows.shape[1])
    write_png(path, enlarged(picture, rows.shape[-1]))
