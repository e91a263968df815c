"""Data sets: which images, cut how, in which split, as uint8 tensors for a DataLoader."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..presets import DataPreset, get_preset
from . import demo
from .images import BadImage, decode, transform
from .lfw import LAYOUT, LfwSource
from .sources import Source, identity_groups, open_source

BAD_IMAGES = ("error", "skip")
_TRIES = 100  # bad images in a row that `skip` passes over before it gives up
_SHARES = (("train", 0.8), ("valid", 0.9), ("test", 1.0))  # upper ends of the hashed splits
_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}

Indices: TypeAlias = range | np.ndarray  # of images in the whole source


class Item(NamedTuple):
    """One image of a split; a batch of them collates to an Item of tensors."""

    image: Tensor  # uint8 (3, S, S)
    index: int  # type: ignore[assignment]  # the position in the split that was asked for
    replaced: bool  # whether a readable neighbour stands in for an unreadable image


class Images(Protocol):
    """Numbered pixels: what `ImageDataset` needs to know of a source."""

    kind: str

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The stable name of image i."""
        ...

    def pixels(self, i: int, size: int) -> Tensor:
        """Image i as uint8 (3, size, size); BadImage when it cannot be had."""
        ...

    def groups(self) -> list[str]:
        """For each image the person that it shows, or its own name."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON-able facts on which images these are and how they are cut."""
        ...

    def digest(self) -> bytes:
        """A cheap hash of names, first and last record."""
        ...


class FileImages:
    """Encoded images of a `Source`, decoded, cropped and resized as a preset says."""

    def __init__(
        self,
        source: Source,
        crop: tuple[int, int, int, int] | None,
        fit: str,
        fast_decode: bool = False,
    ) -> None:
        self.source = source
        self.crop = crop
        self.fit = fit
        self.fast = fast_decode and crop is None  # a crop counts the pixels of the whole image
        self.kind = source.kind

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def pixels(self, i: int, size: int) -> Tensor:
        name = self.source.name(i)
        image = decode(self.source.read(i), name, size if self.fast else None)
        return transform(image, size, self.crop, self.fit, name)

    def groups(self) -> list[str]:
        return identity_groups(self.source)

    def splits(self) -> Mapping[str, Indices]:
        """The division that the source itself makes, by its folders or by hash."""
        return _folder_splits(self.source) or _hashed_splits(self.source)

    def identity(self) -> dict[str, Any]:
        crop = self.crop and "crop top {}, left {}, {}×{}; ".format(*self.crop)
        fast = "; large JPEGs by scaled decoding" if self.fast else ""
        return {
            "path": os.path.basename(os.path.realpath(self.source.path)),
            "transform": f"{crop or ''}{self.fit}; bilinear, antialiased{fast}",
        }

    def digest(self) -> bytes:
        found = hashlib.sha256()
        for i in range(len(self)):
            found.update(self.name(i).encode("utf-8", "surrogateescape") + b"\0")
        for i in (0, len(self) - 1):
            try:
                found.update(hashlib.sha256(self.source.read(i)).digest())
            except BadImage:
                found.update(b"unreadable")
        return found.digest()


class LfwImages(FileImages):
    """LFW, which names people and lists its splits itself."""

    source: LfwSource

    def groups(self) -> list[str]:
        return self.source.people()

    def splits(self) -> Mapping[str, Indices]:
        return self.source.splits


class DemoImages:
    """The first `length` pictures of the procedural demo set."""

    kind = "demo"

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"demo-{i:05d}"

    def pixels(self, i: int, size: int) -> Tensor:
        return torch.from_numpy(demo.draw(i, size)).permute(2, 0, 1).contiguous()

    def groups(self) -> list[str]:
        return [self.name(i) for i in range(self.length)]

    def identity(self) -> dict[str, Any]:
        return {"path": None, "transform": "drawn at this size"}

    def digest(self) -> bytes:
        # Of what is drawn, not of pixels: these may differ by a level between processors.
        drawn = [(demo.attributes(i), demo.factors(i)) for i in (0, self.length - 1)]
        return hashlib.sha256(repr((self.length, drawn)).encode()).digest()


class Division:
    """Which of a data set's images belong to which split. Raises UserError as `open_dataset` does.

    `path` is what the user named, if anything; `declared` are the preset's index ranges, if any.
    """

    def __init__(
        self,
        images: Images,
        name: str,
        path: str | None,
        declared: dict[str, tuple[int, int]] | None,
    ) -> None:
        self.images = images
        self.name = name
        self.path = path
        self.declared = declared

    @functools.cached_property  # split `all` does not need it, and hashing takes a while
    def _parts(self) -> tuple[Mapping[str, Indices], list[str]]:
        if self.declared:
            return _ranges(len(self.images), self.declared)
        assert isinstance(self.images, FileImages)  # the demo set declares its splits
        return self.images.splits(), []

    @functools.cached_property  # it reads all names, and siblings ask for it again
    def digest(self) -> bytes:
        """`Images.digest` of the images."""
        return self.images.digest()

    def names(self) -> tuple[str, ...]:
        """The splits that hold images, without `all`."""
        return tuple(name for name, indices in self._parts[0].items() if len(indices))

    def part(self, split: str) -> tuple[Indices, list[str]]:
        """The source indices of `split`, and the lines that the user should see about them."""
        if split == "all":
            return range(len(self.images)), []
        parts, notes = self._parts
        if split not in parts:
            known = ", ".join([*parts, "all"])
            raise UserError(f"split {split!r} of {self.name} is unknown; choose one of {known}")
        if len(parts[split]) == 0:
            raise UserError(
                f"split {split!r} of {self.path or self.name} is empty: there are only "
                f"{len(self.images)} images in all; use the split all or add images"
            )
        return parts[split], list(notes)


class ImageDataset(Dataset[Item]):
    """One split of a data set as square uint8 images.

    `kind` is folder, zip, lmdb, lfw or demo; `indices` are the split's source indices; `notes` are
    lines that the user should see. With `bad_images` "error" an unreadable image raises BadImage;
    with "skip" the next readable image of the same split stands in, always the same one, and the
    item says so.
    """

    def __init__(
        self, division: Division, split: str, size: int, bad_images: str = "error"
    ) -> None:
        self.images = division.images
        self.kind = self.images.kind
        self.name = division.name
        self.split = split
        self.size = size
        self.bad_images = bad_images
        self.indices, self.notes = division.part(split)
        self._division = division

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that hold images and that `in_split` takes, besides `all`."""
        return self._division.names()

    def in_split(self, split: str) -> ImageDataset:
        """Another split of the same opened images; UserError where it is unknown or empty."""
        return ImageDataset(self._division, split, self.size, self.bad_images)

    def subset(self, positions: Sequence[int] | np.ndarray) -> ImageDataset:
        """The images at these positions (whole numbers, in this order), as the same split.

        Raises IndexError for a position outside 0..len-1.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise IndexError(f"image {outside[0]} of {len(self)}")
        part = copy.copy(self)
        part.indices = np.asarray(self.indices)[chosen]
        return part

    def groups(self) -> list[str]:
        """For each image the person that it shows, or the image's own name where that is unknown.

        Images of one group belong on the same side of any further division.
        """
        groups = self.images.groups()
        return [groups[i] for i in self.indices]

    def source_index(self, i: int) -> int:
        """The number in the whole source of this split's image i: the row of a label file."""
        return int(self.indices[i])

    def image_name(self, i: int) -> str:
        """The stable name of this split's image i."""
        return self.images.name(self.source_index(i))

    def __getitem__(self, i: int) -> Item:
        """The image at position i of the split.

        Raises IndexError outside 0..len-1, BadImage as described above, and UserError when "skip"
        finds no readable image among the next hundred.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        if self.bad_images == "error":
            return Item(self.images.pixels(self.source_index(i), self.size), i, False)
        tries = min(_TRIES, len(self))
        for step in range(tries):
            try:
                source_index = self.source_index((i + step) % len(self))
                return Item(self.images.pixels(source_index, self.size), i, step > 0)
            except BadImage as error:
                last = error
        raise UserError(
            f"{tries} unreadable images in a row from {self.image_name(i)} on; the last: {last}"
        )

    def describe(self) -> dict[str, Any]:
        """What these images are, JSON-able, for the protocol beside a result.

        `source` is a SHA-256 of the source's names and of its first and last record: cheap, and
        another one for another set of files. `fingerprint` is one of these and of the split.
        """
        chosen = np.asarray(self.indices, dtype="<i8").tobytes()
        source = self._division.digest
        return {
            "dataset": self.name,
            "kind": self.kind,
            "split": self.split,
            "n": len(self),
            "size": self.size,
            **self.images.identity(),
            "source": source.hex(),
            "fingerprint": hashlib.sha256(source + chosen).hexdigest(),
        }


def open_dataset(
    preset_name: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    split: str | None = None,
    bad_images: str = "error",
    fast_decode: bool = False,
) -> ImageDataset:
    """The images of data set `preset_name` at `data_dir`, in `split`, as `image_size` squares.

    Size and split default to the preset's. Split `all` is always there. The others are the
    preset's index ranges or LFW's lists of people; else the top-level folders `train`, `valid` (or
    `val`), `test`; else a fixed 80/10/10 division by a hash of the person (`identity.txt`) or the
    image's name.

    `fast_decode` reads JPEGs of many times the size with less work, within about half a grey level
    (RMS) of the same pixels: for training, not for figures. `describe` then says so in `transform`;
    the fingerprint, which tells images from others, stays.

    Raises UserError for an unknown name, split or policy, missing or unusable data, an empty split.
    """
    preset = get_preset(preset_name)
    size = image_size or preset.model.image_size
    split = split or preset.train.get("split", "train")
    if bad_images not in BAD_IMAGES:
        raise UserError(f"--bad_images {bad_images!r} is unknown; choose error or skip")
    images = _open_images(preset_name, preset.data, data_dir, fast_decode)
    division = Division(images, preset_name, data_dir, preset.data.splits)
    return ImageDataset(division, split, size, bad_images)


def _open_images(name: str, preset: DataPreset, data_dir: str | None, fast_decode: bool) -> Images:
    if preset.source == "demo":
        if data_dir:
            raise UserError(
                f"--data_dir {data_dir}: the demo set is drawn on the fly and reads no files; "
                "for your own images use the data set `folder`"
            )
        return DemoImages(max(stop for _, stop in (preset.splits or {}).values()))
    lfw = preset.source == "lfw"
    if not data_dir:
        expected = LAYOUT if lfw else f"{name}/data.mdb, a folder of images, or a zip"
        raise UserError(
            f"data set {name} needs its images: pass --data_dir DIR or set the data root in "
            f"args.sh (expected there: {expected})"
        )
    if lfw:
        return LfwImages(LfwSource(data_dir), preset.crop, preset.fit, fast_decode)
    return FileImages(open_source(data_dir), preset.crop, preset.fit, fast_decode)


def _ranges(
    length: int, declared: dict[str, tuple[int, int]]
) -> tuple[dict[str, range], list[str]]:
    """The declared index ranges; for a source of another length, the same proportions of it."""
    if len(declared) == 1:  # one split, which is everything
        return {name: range(length) for name in declared}, []
    total = max(stop for _, stop in declared.values())
    if length == total:
        return {name: range(*bounds) for name, bounds in declared.items()}, []
    scaled = {
        name: range(first * length // total, stop * length // total)
        for name, (first, stop) in declared.items()
    }
    parts = ", ".join(f"{name} {len(part)}" for name, part in scaled.items())
    note = f"{length} images instead of {total}: split in the same proportions ({parts})"
    return scaled, [note]


def _folder_splits(source: Source) -> dict[str, np.ndarray]:
    """The splits that the source's own top-level folders make; none without train and another."""
    parts = [source.name(i).split("/") for i in range(len(source))]
    depth = 0
    # Folders that hold everything (an archive's single root) do not count as top level.
    while parts[0][depth] not in _FOLDERS and all(
        len(path) > depth + 1 and path[depth] == parts[0][depth] for path in parts
    ):
        depth += 1
    found: dict[str, list[int]] = {}
    for i, path in enumerate(parts):
        if len(path) > depth + 1 and path[depth] in _FOLDERS:
            found.setdefault(_FOLDERS[path[depth]], []).append(i)
    if "train" not in found or len(found) < 2:
        return {}
    return {name: np.asarray(indices) for name, indices in found.items()}


def _hashed_splits(source: Source) -> dict[str, np.ndarray]:
    """80 % train, 10 % valid, 10 % test by a hash of each image's group (person or name)."""
    chosen: dict[str, list[int]] = {name: [] for name, _ in _SHARES}
    groups = identity_groups(source)
    # A zip's single root folder is no part of the names: folder and zip are divided alike.
    # (People's names are free text, and commonpath wants either all or none to begin with "/".)
    root = os.path.commonpath([f"/{group}" for group in groups])[1:] if len(groups) > 1 else ""
    for i, group in enumerate(groups):
        group = group.removeprefix(f"{root}/") if root else group
        digest = hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()
        at = int.from_bytes(digest[:8], "big") / 2**64
        chosen[next(name for name, end in _SHARES if at <= end)].append(i)
    return {name: np.asarray(found, dtype=np.int64) for name, found in chosen.items()}


_WORKER_ERROR = re.compile(r"Caught \w+ in .*", re.DOTALL)


def user_error_from_worker(error: BaseException) -> UserError | None:
    """The one-line `UserError` behind an exception raised in a DataLoader's worker process.

    torch wraps the message in the worker's traceback; its last line is the original one. An
    error of this process is returned as it is; None when no UserError is behind `error`.
    """
    if not isinstance(error, UserError):
        return None
    text = str(error.args[0])
    if not _WORKER_ERROR.match(text):
        return error
    last = text.rstrip().splitlines()[-1]
    return type(error)(last.partition(": ")[2])
