"""z of a data set, encoded once and kept: what probes, neighbours and the report read.

A cache is a folder `sample_{step}/latents/{data}_{split}` beside the checkpoint:
`latents.npz` and `latents.safetensors` with the same arrays and provenance, `latents.json` with
figures about z, and `neighbours.png`. It is used again as long as checkpoint, images and their
preparation are the same, and made anew otherwise. While it is made, parts of z are kept in
`unfinished`, so that the same command goes on from there after a kill.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import image_grid, to_model_range
from ..data.loader import default_workers, in_batches, load_batches
from ..distributed import Context
from ..encoder import DEAD_STD, reparameterise
from ..errors import UserError
from ..files import atomic_file, write_text
from ..lock import FolderLock
from ..model import DBAE
from ..random import fold
from .progress import Progress
from .protocol import enlarged, model_facts, results_folder, seen_in_training, versions, write_png
from .results import UNFINISHED
from .unfinished import Unfinished, complete

if TYPE_CHECKING:
    from ..data import ImageDataset
    from ..data.labels import Labels

NPZ, SAFETENSORS, JSON = "latents.npz", "latents.safetensors", "latents.json"
NEIGHBOURS = "neighbours.png"
_FILES = re.compile(r"latents\.(npz|safetensors|json)|neighbours\.png")
_PART_IMAGES = 1024  # that a kill may cost each rank: a part is kept when so many are encoded
_QUERIES, _NEAREST = 6, 7  # rows and columns beside the query of neighbours.png
_ARRAYS = ("mean", "log_sigma", "flipped_mean", "flipped_log_sigma")
# What must agree for a cache to serve: a fact's name, and what one is called where it does not.
_IDENTITY = {
    "checkpoint_sha256": "of another checkpoint",
    "model": "of another model",
    "precision": "of another --precision",
    "fingerprint": "of other images",
    "transform": "of images cut otherwise",
    "size": "of images of another size",
}


@dataclasses.dataclass(frozen=True)
class Latents:
    """The encoder's output for n images.

    `mean` (n, latent_dim): z of a deterministic encoder, μ of a stochastic one, whose log σ is
    `log_sigma`. `flipped_…`: the same of the mirrored images, or None. All float32 on the CPU.
    `index` (n,): the images' numbers in their source. `provenance`: JSON-able.
    """

    mean: Tensor
    log_sigma: Tensor | None
    flipped_mean: Tensor | None
    flipped_log_sigma: Tensor | None
    index: Tensor
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.mean)

    def z(
        self, latent: str = "mean", seed: int = 0, draw: int = 0, flip: Tensor | None = None
    ) -> Tensor:
        """z (n, latent_dim).

        Args:
            latent: "mean", or "sample": μ + σ ε. A deterministic encoder has one z only.
            seed, draw: ε is a function of these two and the row.
            flip: bool (n,): where z of the mirrored image is taken.
        """
        mean, log_sigma = self.mean, self.log_sigma
        if flip is not None:
            mean = torch.where(flip[:, None], _there(self.flipped_mean), mean)
            if log_sigma is not None:
                log_sigma = torch.where(flip[:, None], _there(self.flipped_log_sigma), log_sigma)
        if latent == "mean" or log_sigma is None:
            return mean
        generator = torch.Generator().manual_seed(fold(seed, "latent of a probe", draw))
        return reparameterise(mean, log_sigma, torch.randn(mean.shape, generator=generator))

    def rows(self, chosen: slice | Sequence[int] | np.ndarray) -> Latents:
        """The latents of these rows."""
        where = chosen if isinstance(chosen, slice) else torch.as_tensor(np.asarray(chosen))
        arrays: dict[str, Any] = {name: getattr(self, name) for name in (*_ARRAYS, "index")}
        arrays = {name: None if array is None else array[where] for name, array in arrays.items()}
        return dataclasses.replace(self, **arrays)


def _there(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("these latents were encoded without the mirrored images")
    return value


def encode_images(model: DBAE, images: Tensor) -> Tensor:
    """uint8 images (n, 3, S, S) → z, of a stochastic encoder μ: float32 (n, latent_dim), CPU."""
    return _encode(model, images, flip=False)["mean"]


@torch.no_grad()
def _encode(model: DBAE, images: Tensor, flip: bool) -> dict[str, Tensor]:
    """The arrays of a batch of uint8 images, by their names in the cache."""
    x0 = to_model_range(images.to(next(model.parameters()).device))
    found = {}
    for prefix, x in (("", x0), ("flipped_", x0.flip(3))) if flip else (("", x0),):
        if model.config.stochastic:
            mean, log_sigma = model.encode_stats(x)
            found[prefix + "log_sigma"] = log_sigma.float().cpu()
        else:
            mean = model.encode(x)
        found[prefix + "mean"] = mean.float().cpu()
    return found


def latents_of(
    model: DBAE,
    dataset: ImageDataset,
    context: Context,
    checkpoint: Path,
    *,
    count: int = 0,
    flip: bool = False,
    labels: Labels | None = None,
    batch_size: int = 64,
    folder: Path | None = None,
) -> Latents | None:
    """The latents of the first `count` images (0: all): from the cache, else encoded into it.

    A cache of the whole data set (split `all`) serves its parts too. Every rank must call this;
    each encodes some batches. What a killed run has encoded, with all else the same, is kept.
    `folder` is by default the data set's in `cache_folder`. `labels` are stored beside the latents.

    Returns:
        The latents on rank 0, None on the others.

    Raises:
        UserError: an unreadable image, a model whose output is not finite, no space, a cache that
            another process is making.
    """
    folder = folder or cache_folder(checkpoint, dataset)
    count = min(count or len(dataset), len(dataset))
    facts = _provenance(model, dataset, checkpoint) if context.is_main else {}
    kept, reason = None, ""
    if context.is_main:
        complete(folder / UNFINISHED, _FILES, NPZ)
        kept, reason = _from_cache(folder, facts, count, flip)
        if kept is None and labels is None:
            whole = _from_whole(dataset, facts, checkpoint, count, flip)
            kept, folder = whole or (None, folder)
    (use_cache, *_) = context.gather_objects(kept is not None)
    if use_cache:
        if kept is None:
            return None
        context.print(f"latents of {dataset.name}, {dataset.split}: {count} read from {folder}")
        digest = labels.digest() if labels else None
        if digest is not None and digest != kept.provenance.get("labels_sha256"):
            with FolderLock(folder):
                _write(folder, kept, labels)
        return kept.rows(slice(count))
    if reason:
        context.print(f"latents in {folder} are {reason}: encoding again")
    facts |= {"n": count, "flipped": flip}
    identity = {
        **facts,
        "batch_size": batch_size,
        "part_images": _PART_IMAGES,
        "world_size": context.world_size,
        "device": context.device.type,
        "bad_images": dataset.bad_images,
    }
    with Unfinished(folder / UNFINISHED, identity, context, _FILES, NPZ) as work:
        parts = _encode_parts(model, dataset, context, work, count, flip, batch_size)
        if not context.is_main:
            return None
        arrays, replaced = _join(work, parts, count)
        index = torch.tensor([dataset.source_index(i) for i in range(count)])
        found = _latents(arrays, index, facts | {"replaced": replaced})
        _write(work.folder, found, labels)
        _write_figures(work.folder, found, dataset)
        work.publish()
    return found


def _latents(arrays: dict[str, Any], index: Tensor, provenance: dict[str, Any]) -> Latents:
    """From arrays by their names in the cache, of which only `mean` is always there."""
    log_sigma, flipped_mean, flipped_log_sigma = (arrays.get(name) for name in _ARRAYS[1:])
    return Latents(arrays["mean"], log_sigma, flipped_mean, flipped_log_sigma, index, provenance)


def cache_folder(checkpoint: Path, dataset: ImageDataset) -> Path:
    """`sample_{step}/latents/{data}_{split}` beside the checkpoint.

    {data} is the data set's name, or for `folder` that of the folder, zip or LMDB itself.
    """
    name = dataset.name
    if name == "folder":
        name = Path(str(dataset.images.identity()["path"])).stem
    name = re.sub(r"[^\w.-]", "_", f"{name}_{dataset.split}")
    return results_folder(checkpoint) / "latents" / name


def read(folder: Path) -> Latents:
    """The latents in a cache folder. UserError where there are none or the file is not whole."""
    path = folder / NPZ
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files
                      if name in (*_ARRAYS, "index")}  # fmt: skip
            provenance = json.loads(str(archive["provenance"]))
        return Latents(
            **{name: arrays.get(name) for name in _ARRAYS[1:]},
            mean=arrays["mean"], index=arrays["index"], provenance=provenance,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {NPZ}; scripts/dbae_encode.py makes one") from None
    except Exception as error:  # damaged archives make numpy and zipfile raise many kinds
        raise UserError(f"{path} is not a whole latents file ({type(error).__name__})") from error


# Encoding -----------------------------------------------------------------------------------


def _encode_parts(
    model: DBAE,
    dataset: ImageDataset,
    context: Context,
    work: Unfinished,
    count: int,
    flip: bool,
    batch_size: int,
) -> dict[str, list[list[int]]]:
    """Encode what is not done of the first `count` images; returns all ranks' parts, by name.

    A part is some of a rank's batches, one after the other.
    """
    batches = in_batches(range(count), batch_size)
    world = context.world_size
    of_rank = [_parts(rank, batches[rank::world], batch_size) for rank in range(world)]
    parts = {name: part for of_one in of_rank for name, part in of_one.items()}
    mine = of_rank[context.rank]
    done = work.done(list(mine), "parts")
    todo = {name: part for name, part in mine.items() if name not in done}
    left = [batch for name, part in parts.items() if name not in done for batch in part]
    own = list(itertools.chain(*todo.values()))
    workers = default_workers(dataset, context.ranks_here())
    images = load_batches(dataset, own, workers, context.device.type == "cuda")
    shown = Progress("encoded", len(own), sum(map(len, left)), active=context.is_main)
    for name, part in todo.items():
        encoded: list[dict[str, Tensor]] = []
        replaced = 0
        for batch in itertools.islice(images, len(part)):
            encoded.append(_encode(model, batch.images, flip))
            replaced += batch.replaced
            if not all(array.isfinite().all() for array in encoded[-1].values()):
                raise UserError("z is not finite; the checkpoint's training must have diverged")
            shown.batch_done()
        arrays = {key: torch.cat([found[key] for found in encoded]) for key in encoded[0]}
        work.keep(name, {"replaced": replaced, "arrays": arrays})
    shown.close()
    context.barrier()
    return parts


def _parts(rank: int, batches: list[list[int]], batch_size: int) -> dict[str, list[list[int]]]:
    """A rank's batches as parts of `_PART_IMAGES` images, and what these are called."""
    size = max(1, _PART_IMAGES // batch_size)
    starts = range(0, len(batches), size)
    return {f"part_{rank}_{i}": batches[at : at + size] for i, at in enumerate(starts)}


def _join(
    work: Unfinished, parts: dict[str, list[list[int]]], count: int
) -> tuple[dict[str, Tensor], int]:
    """The arrays of all parts in data-set order, and how many images were replaced."""
    joined: dict[str, Tensor] = {}
    replaced = 0
    for name, part in parts.items():
        content = work.read(name)
        replaced += content["replaced"]
        rows = list(itertools.chain(*part))
        for key, values in content["arrays"].items():
            if key not in joined:
                joined[key] = torch.empty(count, values.shape[1])
            joined[key][rows] = values
    return joined, replaced


def _provenance(model: DBAE, dataset: ImageDataset, checkpoint: Path) -> dict[str, Any]:
    described = dataset.describe()
    return {
        **model_facts(model, checkpoint),
        "dataset": described,
        **{name: described[name] for name in ("fingerprint", "transform", "size")},
        "seen_in_training": seen_in_training(model, described),
        "image_range": "[-1, 1]",
        "versions": versions(),
    }


def _from_cache(
    folder: Path, facts: dict[str, Any], count: int, flip: bool
) -> tuple[Latents | None, str]:
    """The latents of a cache that fits and has the first `count`, else None and why it does not."""
    if not (folder / NPZ).exists():
        return None, ""
    try:
        kept = read(folder)
    except UserError:
        return None, "damaged"
    ours = json.loads(json.dumps({name: facts[name] for name in _IDENTITY}))
    for name, what in _IDENTITY.items():
        before = "fp32" if name == "precision" else None  # of caches that do not tell
        if kept.provenance.get(name, before) != ours[name]:
            return None, what
    if len(kept) < count:
        return None, f"of {len(kept)} images only"
    if flip and kept.flipped_mean is None:
        return None, "without mirrored images"
    return kept, ""


def _from_whole(
    dataset: ImageDataset, facts: dict[str, Any], checkpoint: Path, count: int, flip: bool
) -> tuple[Latents, Path] | None:
    """The first `count` images' latents out of a cache of the whole data set, and its folder."""
    if dataset.split == "all":
        return None
    whole = dataset.in_split("all")
    folder = cache_folder(checkpoint, whole)
    if not (folder / NPZ).exists():
        return None
    of_whole = {**facts, "fingerprint": whole.describe()["fingerprint"]}
    kept, _ = _from_cache(folder, of_whole, 0, flip)
    if kept is None:
        return None
    row_of = {index: row for row, index in enumerate(kept.index.tolist())}
    rows = [row_of.get(dataset.source_index(i), -1) for i in range(count)]
    return None if min(rows) < 0 else (kept.rows(rows), folder)


# Files --------------------------------------------------------------------------------------


def _write(folder: Path, latents: Latents, labels: Labels | None) -> None:
    """latents.npz and latents.safetensors."""
    from safetensors.numpy import save

    arrays = {name: getattr(latents, name) for name in (*_ARRAYS, "index")}
    stored = {name: value.numpy() for name, value in arrays.items() if value is not None}
    provenance = dict(latents.provenance)
    if labels is not None:
        inside = labels.positions < len(latents)
        stored["labels"] = labels.values[inside]
        stored["label_positions"] = labels.positions[inside]
        provenance |= {
            "label_names": list(labels.names),
            "labels_from": labels.source,
            "labels_sha256": labels.digest(),
        }
    text = json.dumps(provenance)
    with atomic_file(folder / SAFETENSORS) as file:
        contiguous = {name: np.ascontiguousarray(value) for name, value in stored.items()}
        file.write(save(contiguous, metadata={"provenance": text}))
    with atomic_file(folder / NPZ) as file:
        np.savez(file, provenance=np.array(text), **stored)


def _write_figures(folder: Path, latents: Latents, dataset: ImageDataset) -> None:
    """latents.json, and neighbours.png: a few images and those nearest to them in z."""
    z = latents.mean.double()
    queries = _spread(len(z), _QUERIES)
    nearest = neighbours(z, queries, _NEAREST)
    rows = [[query, *found] for query, found in zip(queries, nearest, strict=True)]
    pictures = torch.stack([dataset[i].image for row in rows for i in row])
    write_png(folder / NEIGHBOURS, enlarged(image_grid(pictures, len(rows[0])), dataset.size))
    names = [[dataset.image_name(i) for i in row] for row in rows]
    content = {
        "kind": "latents",
        "protocol": latents.provenance,
        "n": len(z),
        "latent_dim": z.shape[1],
        "z": statistics(z),
        "neighbours": {
            "file": NEIGHBOURS,
            "distance": "Euclidean, z standardised per dimension",
            "queries": [row[0] for row in names],
            "neighbours": [row[1:] for row in names],
        },
    }
    write_text(folder / JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _spread(n: int, count: int) -> list[int]:
    """Up to `count` rows out of n, evenly spread."""
    count = min(n, count)
    return [i * n // count for i in range(count)]


def statistics(z: Tensor) -> dict[str, Any]:
    """Figures about z (n, d) of a data set.

    Returns mean and std per dimension, `spectrum` (the eigenvalues of the covariance, largest
    first), `dead` (dimensions of a standard deviation below 0.01) and `effective_rank`
    (exp of the entropy of the normalised spectrum; Roy & Vetterli 2007): 1 … d.
    """
    z = z.double()
    std = z.std(0, correction=0)
    centred = z - z.mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / len(z)).clamp(min=0).flip(0)
    share = spectrum / spectrum.sum().clamp(min=1e-300)
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "mean": z.mean(0).tolist(),
        "std": std.tolist(),
        "spectrum": spectrum.tolist(),
        "dead": torch.nonzero(std < DEAD_STD).flatten().tolist(),
        "effective_rank": float(entropy.exp()),
    }


def neighbours(z: Tensor, queries: Sequence[int], count: int) -> list[list[int]]:
    """For each query row the `count` other rows nearest to it in z (n, d), nearest first.

    Euclidean distance after standardising each dimension.
    """
    std = z.std(0, correction=0)
    scaled = (z - z.mean(0)) / torch.where(std > 0, std, torch.ones_like(std))
    found = []
    for query in queries:
        distance = (scaled - scaled[query]).square().sum(1)
        distance[query] = torch.inf
        found.append(distance.topk(min(count, len(z) - 1), largest=False).indices.tolist())
    return found
