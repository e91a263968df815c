"""Reconstruct a data set: image → z → x_T → sampler → image, and score it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .. import random
from ..checkpoint import atomic_file, newest_weights, step_of
from ..cli import option
from ..data.images import image_grid, to_model_range, to_uint8
from ..distributed import Context
from ..errors import UserError
from ..model import DBAE
from ..sampling import SAMPLERS, check_options
from . import results
from .baselines import MeanImage, Pca, training_positions
from .metrics import floor_uint8, load_lpips

if TYPE_CHECKING:
    from ..data import ImageDataset

_GRID_IMAGES = 64  # at most so many in one PNG
_COMPARED = 12  # columns of comparison.png


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """What is reconstructed, how, and how it is scored. Each field is a command-line flag."""

    dataset: str = option("demo", "which data preset to read; the checkpoint decides the size")
    data_dir: str | None = option(None, "folder, zip or LMDB with the images")
    split: str = option("test", "which part of the data: all, train, valid, test")
    num_samples: int = option(0, "reconstruct the first so many images of the split (0: all)")
    batch_size: int = option(64, "images per forward pass")
    sampler: str = option("euler", "how the reverse bridge is integrated", choices=SAMPLERS)
    steps: int = option(100, "grid points N of the sampler")
    rho: float = option(7.0, "exponent of the time grid")
    churn: float = option(0.0, "share of each step done by the SDE, in [0, 1); 0 is the ODE")
    guidance: float = option(1.0, "weight w of the pull towards x_T")
    latent: str = option(
        "sample",
        "z of a stochastic encoder: drawn, as published, or its mean",
        choices=("sample", "mean"),
    )
    seed: int = option(0, "all noise is a function of this and the image's place in the split")
    bad_images: str = option(
        "error", "an unreadable image stops the run or is replaced", choices=("error", "skip")
    )
    weights_dir: str | None = option(
        None, "folder with alexnet-owt-7be5be79.pth for LPIPS (torch's cache is searched too)"
    )
    reference_compat: bool = option(
        False, "convert to 8 bits and count MSE and SSIM as the published script does"
    )
    baselines: bool = option(
        False, "also score the mean image and PCA with latent_dim components (fitted on train)"
    )
    output_dir: str | None = option(
        None, "folder of the results (default: sample_STEP/SAMPLER_… beside the checkpoint)"
    )

    def __post_init__(self) -> None:
        try:
            check_options(self.sampler, self.steps, self.rho, self.churn, self.guidance)
        except UserError as error:  # begins with the option's name, which here is a flag
            raise UserError(f"--{error}") from None
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} must be at least 1")
        for name in ("num_samples", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must not be negative")
        for field in dataclasses.fields(self):
            known = field.metadata["choices"]
            if known and getattr(self, field.name) not in known:
                raise UserError(
                    f"--{field.name} {getattr(self, field.name)!r} is unknown; choose one of "
                    f"{', '.join(known)}"
                )

    def output_folder(self, checkpoint: Path) -> Path:
        """--output_dir, else `sample_{step}/euler_7.0_100_w=1.0_churn=0.0` beside the checkpoint.

        The step is the number that the file's name ends in; without one it is the name's stem.
        """
        if self.output_dir is not None:
            return Path(self.output_dir)
        checkpoint = newest_weights(checkpoint)
        step = step_of(checkpoint)
        return (
            checkpoint.parent
            / f"sample_{checkpoint.stem if step < 0 else step}"
            / f"{self.sampler}_{float(self.rho)}_{self.steps}"
            f"_w={float(self.guidance)}_churn={float(self.churn)}"
        )


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
    seed, device = config.seed, x0.device
    noise = None
    if model.config.stochastic and config.latent == "sample":
        noise = random.normal(seed, "latent", positions, (model.config.latent_dim,), device)
    z = model.encode(x0, mean=config.latent == "mean", noise=noise)
    x_T = model.endpoint(z)
    step = itertools.count()

    def churn_noise(x: Tensor) -> Tensor:
        return random.normal(seed, f"churn{next(step)}", positions, tuple(x.shape[1:]), device)

    out = model.sample(
        z,
        x_T,
        sampler=config.sampler,
        steps=config.steps,
        rho=config.rho,
        churn=config.churn,
        guidance=config.guidance,
        noise=churn_noise,
        callback=callback,
    )
    return out.images, x_T, out.nfe


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
    they must share; when all is there, rank 0 puts it in place of an earlier run's files.

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
        UserError: no images, an unreadable one, output that cannot be written, or a model whose
            output is not finite.
    """
    if len(dataset) == 0:
        raise UserError(f"data set {config.dataset}, split {config.split}, has no images")
    count = min(config.num_samples or len(dataset), len(dataset))
    if config.num_samples > count:
        context.print(f"split {config.split} has only {count} images: all of them are used")
    described = dataset.describe()  # reads all names: once is enough
    seen = _seen(model, described)
    if seen:
        context.print(f"note: the model was trained on images of this split ({dataset.split}) too")
    lpips, reason = load_lpips(config.weights_dir, context.device)
    scorer = results.Scorer(lpips, reason, config.reference_compat)
    unfinished = output_dir / results.UNFINISHED
    fitted: dict[str, _Baseline] = {}
    if context.is_main:
        results.prepare(unfinished)
        if train_dataset is not None:  # before the long work, as an unreadable image may end it
            fitted = _fit_baselines(model.config.latent_dim, train_dataset, dataset, count)
    context.barrier()

    starts = range(0, count, config.batch_size)
    batches = [range(start, min(start + config.batch_size, count)) for start in starts]
    mine = range(context.rank, len(batches), context.world_size)
    shown = _Progress(len(mine), config.steps, count, active=progress and context.is_main)
    done = {}
    for b in mine:
        done[b] = _batch(b, batches[b], model, dataset, config, context, unfinished, scorer, shown)
        shown.batch_done()
    shown.close()
    for of_rank in context.gather_objects(done):
        done |= of_rank
    if not context.is_main:
        return None

    in_order = [done[b] for b in range(len(batches))]
    parts = [results.part_paths(unfinished, b % context.world_size, b) for b in range(len(batches))]
    samples = results.merge(unfinished, [fake for _, fake in parts], done[0].nfe)
    _write_comparison(unfinished / "comparison.png", in_order)
    scores = results.concatenate(batch.scores for batch in in_order)
    x_T_scores = results.concatenate(batch.x_T_scores for batch in in_order)
    metrics = {
        **scorer.row(scores),
        "protocol": {
            "dataset": described,
            "seen_in_training": seen,
            **_protocol(model, config, context, checkpoint),
            "n": count,
            "nfe": done[0].nfe,
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
    results.publish(unfinished)
    return Result(
        metrics=metrics,
        table=results.table(metrics),
        folder=output_dir,
        samples=output_dir / samples.name,
        comparison=output_dir / "comparison.png",
    )


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What rank 0 needs to know of a batch beyond its files."""

    nfe: int
    scores: results.Scores
    x_T_scores: results.Scores
    replaced: list[str]  # names of images that could not be read
    compared: Tensor  # uint8 (3, n, 3, H, W): originals, x_T, reconstructions; n may be 0


def _batch(
    number: int,
    positions: range,
    model: DBAE,
    dataset: ImageDataset,
    config: ReconstructionConfig,
    context: Context,
    folder: Path,
    scorer: results.Scorer,
    progress: _Progress,
) -> _Batch:
    """Reconstruct, write and score the images at these positions."""
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
    real_path, fake_path = results.part_paths(folder, rank, number)
    results.write_samples(real_path, real)
    results.write_samples(fake_path, fake)
    one = context.world_size == 1  # the published name; ranks' files bear the rank
    start_name = f"x_T_sample_{number}.png" if one else f"{rank}_x_T_sample_{number}.png"
    for name, batch in (
        (f"{rank}_sample_{number}.png", fake),
        (f"{rank}_x_{number}.png", real),
        (start_name, start),
    ):
        _write_png(folder / name, image_grid(batch[:_GRID_IMAGES], 8))

    shown = max(0, min(len(items), _COMPARED - positions[0]))
    return _Batch(
        nfe=nfe,
        scores=scorer(real, fake),
        x_T_scores=scorer(real, start),
        replaced=[dataset.image_name(item.index) for item in items if item.replaced],
        compared=torch.stack([real[:shown], start[:shown], fake[:shown]]),
    )


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
    weights = None if checkpoint is None else newest_weights(checkpoint)
    average = re.fullmatch(r"ema_([\d.]+)_\d+", weights.stem) if weights else None
    live = weights is not None and weights.stem.startswith("model_")
    rounding = "floor((x + 1) * 127.5)" if config.reference_compat else "round((x + 1) * 127.5)"
    used = ("num_samples", "batch_size", "sampler", "steps", "rho", "churn", "guidance", "seed")
    return {
        "split": config.split,
        "selection": "the first n images of the split, in its order",
        "checkpoint": weights.name if weights else None,
        "checkpoint_sha256": _sha256(weights) if weights else None,
        "ema": float(average[1]) if average else (False if live else None),
        "model": dataclasses.asdict(model.config),
        "schedule": model.config.schedule,
        "end_data": model.config.end_data,
        **{name: getattr(config, name) for name in used},
        "clip_denoised": True,
        "latent": config.latent if model.config.stochastic else "deterministic",
        "image_range": "[-1, 1] for the model",
        "image_8_bit": f"{rounding}, clamped to 0..255",
        "world_size": context.world_size,
        "device": context.device.type,
    }


def _seen(model: DBAE, ours: dict[str, Any]) -> bool | None:
    """Whether the model was trained on images of this description; None where nothing tells."""
    trained = model.trained_on
    if trained is None or "source" not in trained:
        return None
    same_images = trained["source"] == ours["source"]
    return same_images and (trained["split"] in ("all", ours["split"]) or ours["split"] == "all")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_png(path: Path, picture: Image.Image) -> None:
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def _write_comparison(path: Path, batches: Sequence[_Batch]) -> None:
    """The first originals over their x_T over their reconstructions; small images enlarged."""
    rows = torch.cat([batch.compared for batch in batches], dim=1)
    picture = image_grid(rows.flatten(0, 1), rows.shape[1])
    if rows.shape[-1] <= 64:
        picture = picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)
    _write_png(path, picture)


class _Progress:
    """A bar of sampler steps on a terminal, else a line every ten seconds at most."""

    def __init__(self, batches: int, steps: int, images: int, *, active: bool) -> None:
        self._images, self._batches, self._done = images, batches, 0
        self._started = self._last = time.monotonic()
        self._active = active
        self._bar: Any = None
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=batches * steps, desc="reconstructing", unit="step")

    def step_done(self, _: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def batch_done(self) -> None:
        self._done += 1
        now, last = time.monotonic(), self._done == self._batches
        rate = self._done / self._batches * self._images / (now - self._started)  # of all ranks
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.1f} images/s")
        elif self._active and (last or now - self._last > 10):
            self._last = now
            left = (self._batches - self._done) / self._batches * self._images / rate
            print(
                f"reconstructed {self._done * self._images // self._batches}/{self._images} images,"
                f" {rate:.1f} images/s, ETA {left:.0f} s",
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
