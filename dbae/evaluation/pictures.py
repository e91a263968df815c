"""What interpolation and manipulation share: the input images, images made from z, their files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..cli import option
from ..data import ImageDataset, open_dataset
from ..data.images import bad_image, decode, image_grid, to_model_range, to_uint8, transform
from ..errors import UserError
from ..files import atomic_file
from ..model import DBAE
from .progress import Progress
from .protocol import SamplingConfig, enlarged
from .reconstruction import sample_images
from .results import METRICS_FILE

# assets/img1.png … img4.png are the pictures 50020, 50039, 50040 and 50094 of the demo set (of its
# test part), drawn by `dbae.data.demo.draw` at 256 pixels.
_ROOT = Path(__file__).resolve().parents[2]
_FRAME_MS = 100


@dataclasses.dataclass(frozen=True)
class PictureConfig(SamplingConfig):
    """Which images are worked on, and how new ones are sampled. Each field is a flag."""

    dataset: str = option("demo", "the data set that the model was trained on")
    data_dir: str | None = option(None, "folder, zip or LMDB with its images, where any are read")
    split: str = option("test", "part of the data set that is read: all, train, valid, test")
    images: tuple[str, ...] = option(
        (), "image files, comma-separated (neither this nor --indices: those in assets/)"
    )
    indices: tuple[int, ...] = option(
        (), "in place of --images: positions in the split of the data set, comma-separated"
    )

    default_images: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and self.indices:
            raise UserError("--images and --indices both name the input images: give one of them")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An input image.

    Attributes:
        name: of its file, or within its data set.
        pixels: uint8 (3, S, S) of the model's size.
        facts: where it comes from, JSON-able.
        note: a line that the user should see, if any.
    """

    name: str
    pixels: Tensor
    facts: dict[str, Any]
    note: str | None = None

    @property
    def stem(self) -> str:
        """The name without folders and ending, fit to begin a file's name."""
        return file_word(Path(self.name).stem)


def file_word(text: str) -> str:
    """`text` as part of a file's name: what may be trouble there becomes an underscore."""
    return re.sub(r"[^\w.-]+", "_", text)


def open_data(config: PictureConfig, size: int) -> ImageDataset:
    """The split that the config names, of images `size` pixels wide and high."""
    return open_dataset(config.dataset, config.data_dir, size, config.split, config.bad_images)


def read_pictures(
    config: PictureConfig, size: int, dataset: ImageDataset | None = None
) -> list[Picture]:
    """The input images that the config names, `size` pixels wide and high.

    `dataset`: what `config.indices` count in; not needed for files. Raises UserError for a file
    that is absent or no image, and for a position outside the split.
    """
    if config.indices:
        if dataset is None:
            raise ValueError("indices need a data set")
        return [_from_dataset(dataset, index) for index in config.indices]
    if config.images:
        return [_from_file(Path(path), size) for path in config.images]
    return [_from_file(_ROOT / path, size) for path in config.default_images]


def _from_file(path: Path, size: int) -> Picture:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"image {path} cannot be read ({error.strerror or error}): put one there, or name "
            "your own by --images"
        ) from error
    image = decode(data, str(path))
    width, height = image.size
    note = None
    if (width, height) != (size, size):
        cut = "" if width == height else "cut to its centred square and "
        note = f"{path.name} is {width}×{height}: {cut}resized to {size}×{size}"
    facts = {
        "name": path.name,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return Picture(path.name, transform(image, size, fit="center"), facts, note)


def _from_dataset(dataset: ImageDataset, position: int) -> Picture:
    if not 0 <= position < len(dataset):
        raise UserError(
            f"--indices {position}: split {dataset.split} has the positions 0 to {len(dataset) - 1}"
        )
    name = dataset.image_name(position)
    item = dataset[position]
    if item.replaced:
        raise bad_image(name, f"is unreadable (--indices {position}); choose another position")
    return Picture(name, item.image, {"name": name, "index": dataset.source_index(position)})


def notes(inputs: Sequence[Picture], dataset: ImageDataset | None) -> list[str]:
    """The lines that the user should see about what was read."""
    lines = list(dataset.notes) if dataset else []
    return lines + [given.note for given in inputs if given.note]


def to_batch(pictures: Sequence[Picture], model: DBAE) -> Tensor:
    """The pictures as the model's input: (n, 3, S, S) in [-1, 1] on its device."""
    pixels = torch.stack([picture.pixels for picture in pictures])
    return to_model_range(pixels).to(next(model.parameters()).device)


# From z to images ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Made:
    """images and x_T: uint8 (n, 3, S, S) on the CPU; nfe: denoiser calls per image."""

    images: Tensor
    x_T: Tensor
    nfe: int


@torch.no_grad()
def make_images(
    model: DBAE,
    z: Tensor,
    config: SamplingConfig,
    positions: Sequence[int],
    progress: Progress,
    endpoint_z: Tensor | None = None,
) -> Made:
    """Decode and sample, `config.batch_size` at a time.

    Args:
        model: in eval mode.
        z: (n, latent_dim) on the model's device.
        positions: n numbers, on which the churn noise depends (`sample_images`).
        progress: told of each step and batch.
        endpoint_z: what x_T is decoded from, where it is not z: (n, latent_dim).

    Raises UserError for a model whose output is not finite.
    """
    endpoint_z = z if endpoint_z is None else endpoint_z
    images, starts, nfe = [], [], 0
    for part in torch.arange(len(z)).split(config.batch_size):
        batch = slice(int(part[0]), int(part[-1]) + 1)
        x_T = model.endpoint(endpoint_z[batch])
        made = sample_images(model, z[batch], x_T, config, positions[batch], progress.step_done)
        if not made.images.isfinite().all():
            raise UserError(
                "the model's output is not finite; the checkpoint's training must have diverged"
            )
        images.append(to_uint8(made.images.cpu()))
        starts.append(to_uint8(x_T.cpu()))
        nfe = made.nfe
        progress.batch_done()
    return Made(torch.cat(images), torch.cat(starts), nfe)


def batches(n: int, config: SamplingConfig) -> int:
    """How many batches `make_images` does for n images."""
    return -(-n // config.batch_size)


# Files --------------------------------------------------------------------------------------


def prepare(folder: Path, ours: Sequence[str]) -> None:
    """Delete the folder's metrics.json, then what matches the patterns in `ours`; make the folder,
    and those in the patterns.

    So metrics.json is never found beside another run's pictures. UserError where it fails.
    """
    try:
        (folder / METRICS_FILE).unlink(missing_ok=True)
        for pattern in ours:
            (folder / pattern).parent.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(pattern):
                path.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def picture(pixels: Tensor) -> Image.Image:
    """uint8 (3, H, W) → a picture of these pixels."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def strip(images: Tensor) -> Image.Image:
    """uint8 (n, 3, S, S) → one row on white; small images enlarged."""
    return enlarged(image_grid(images, len(images)), images.shape[-1])


def write_gif(path: Path, images: Tensor) -> None:
    """Write uint8 (n, 3, S, S) as an endless loop there and back, ten images a second."""
    there_and_back = [*images, *images[1:-1].flip(0)]
    first, *others = (enlarged(picture(image), image.shape[-1]) for image in there_and_back)
    with atomic_file(path) as file:
        first.save(
            file, format="GIF", save_all=True, append_images=others, duration=_FRAME_MS, loop=0
        )
