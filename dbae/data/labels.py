"""What is known of images: attributes that are true or false, and ones that are numbers.

The demo set knows its own. CelebA's and CelebA-HQ's attribute files, and one's own of that form,
lie beside the images; LFW's attributes are in a file of another form.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from . import demo
from .datasets import DemoImages, FileImages, ImageDataset, LfwImages
from .lfw import INNER_FOLDER, LfwSource, image_name
from .sources import EXTENSIONS, LmdbSource, Source, parse_count, read_text

LABEL_FILES = ("list_attr_celeba.txt", "CelebAMask-HQ-attribute-anno.txt", "list_attr.txt")
LFW_LABELS = "lfw_attributes.txt"
CELEBA_ATTRIBUTES: tuple[str, ...] = tuple(
    """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
    """.split()
)

_FORM = "line 1 the number of rows, line 2 the attributes' names, then `file value value …`"
_LFW_FORM = "line 2 `#`, `person`, `imagenum` and names, then `Name<TAB>number<TAB>values`"


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """k attributes of n images of a data set.

    `names` are the attributes; `values` float32 (n, k), whose row r belongs to the image at
    `positions[r]` of the data set's split; `positions` int64 (n,), ascending; `source` says where
    they come from: a file's name, or "demo".
    """

    names: tuple[str, ...]
    values: np.ndarray
    positions: np.ndarray
    source: str

    def choose(self, names: Iterable[str]) -> Labels:
        """These attributes in this order; UserError, with those that there are, for another."""
        chosen = tuple(names)
        unknown = [name for name in chosen if name not in self.names]
        if unknown:
            raise UserError(
                f"attribute {', '.join(map(repr, unknown))} is not in {self.source}; choose from "
                f"{', '.join(self.names)}"
            )
        columns = [self.names.index(name) for name in chosen]
        return dataclasses.replace(self, names=chosen, values=self.values[:, columns])

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of names, values and positions."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        found.update(np.ascontiguousarray(self.values, dtype="<f4").tobytes())
        found.update(np.ascontiguousarray(self.positions, dtype="<i8").tobytes())
        return found.hexdigest()


def binary_labels(dataset: ImageDataset, file: str | None = None) -> Labels:
    """The attributes of `dataset` that are true (1.0) or false (0.0), for every image.

    The demo set knows them. Otherwise they are read from `file`, or from one of `LABEL_FILES`
    in the images' folder or the nearest folder above it (of an LMDB: beside `data.mdb`). Row i of
    the file belongs to an LMDB's image i. Other images are found by name: the path from the label
    file's folder, else the bare file name where only one has it; another extension will do where
    that leaves no doubt. Raises UserError for a missing or malformed file, an image without a row,
    a value other than −1, 0 and 1, and LFW, whose attributes are numbers.
    """
    images = dataset.images
    if isinstance(images, DemoImages):
        return _demo_labels(dataset, file, demo.ATTRIBUTES, demo.attributes)
    if isinstance(images, LfwImages):
        raise UserError(
            "lfw's attributes are real numbers, not yes or no: predict them by infer_reg_dbae.sh; "
            "infer_class_dbae.sh needs another data set, such as celeba"
        )
    assert isinstance(images, FileImages)
    return _file_labels(dataset, images.source, file, _as_binary)


def real_labels(dataset: ImageDataset, file: str | None = None) -> Labels:
    """The attributes of `dataset` that are numbers, as they are.

    The demo set's are its factors, in [−1, 1]. LFW's are read from `file` or `lfw_attributes.txt`,
    in LFW's folder or beside `lfw-py`; its images without a row are left out. Others' are read as
    in `binary_labels`. Raises UserError for a missing or malformed file, and where an image (of
    LFW: every image) has no row.
    """
    images = dataset.images
    if isinstance(images, DemoImages):
        return _demo_labels(dataset, file, demo.FACTORS, demo.factors)
    if isinstance(images, LfwImages):
        return _lfw_labels(dataset, images.source, file)
    assert isinstance(images, FileImages)
    return _file_labels(dataset, images.source, file, lambda table, _: table.values)


def _demo_labels(
    dataset: ImageDataset,
    file: str | None,
    names: tuple[str, ...],
    of_picture: Callable[[int], Mapping[str, float]],
) -> Labels:
    if file:
        raise UserError(f"--labels {file}: the demo set knows its labels and reads no file")
    rows = [list(of_picture(int(i)).values()) for i in dataset.indices]
    values = np.array(rows, dtype=np.float32).reshape(-1, len(names))
    return Labels(names, values, np.arange(len(values)), "demo")


# Files of labels


class _File(NamedTuple):
    """A label file that was read."""

    path: str  # for messages
    text: str
    folder: str  # where it lies, relative to the images' root: "" there, ".." above it

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


class _Row(NamedTuple):
    """A line of a label file."""

    line: int
    image: str
    values: list[str]


class _Table(NamedTuple):
    """What a label file says: float32 values (rows, attributes), one row for each of `images`."""

    names: tuple[str, ...]
    images: list[str]
    values: np.ndarray


def _file_labels(
    dataset: ImageDataset,
    source: Source,
    file: str | None,
    convert: Callable[[_Table, str], np.ndarray],
) -> Labels:
    """Labels in CelebA's form of all images of `dataset`, which are some of `source`'s."""
    found = _named(file, source) if file else _nearest(dataset, source)
    table = _celeba_table(found)
    values = convert(table, found.path)
    if isinstance(source, LmdbSource):
        if len(table.images) != len(source):
            raise UserError(
                f"{found.path} has {len(table.images)} rows, {source.path} {len(source)} images; "
                "row i must belong to image i of an LMDB: take the file that was made for it"
            )
        rows = np.asarray(dataset.indices)
    else:
        rows = _match(_seen_from(found.folder, source), table.images)[np.asarray(dataset.indices)]
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise UserError(
                f"{found.path} has no row for image {dataset.image_name(missing[0])}, and for "
                f"{len(missing)} of {len(dataset)} images in all; expected rows that begin with "
                f"the images' names (its first is for {table.images[0][:60]!r})"
            )
    return Labels(table.names, values[rows], np.arange(len(rows)), found.name)


def _as_binary(table: _Table, path: str) -> np.ndarray:
    """−1 and 0 → 0, 1 → 1; UserError for an attribute with other values, or with both −1 and 0."""
    no, zero, yes = (table.values == value for value in (-1, 0, 1))
    other = np.argwhere(~(no | zero | yes))
    if len(other):
        row, column = other[0]
        raise UserError(
            f"{path}: attribute {table.names[column]} of {table.images[row][:60]!r} is "
            f"{table.values[row, column]:g}; expected −1 or 1, or 0 or 1"
        )
    both = np.flatnonzero(no.any(axis=0) & zero.any(axis=0))
    if len(both):
        raise UserError(
            f"{path}: attribute {table.names[both[0]]} is −1 for some images and 0 for others, "
            "and either could mean no; expected −1 or 1, or 0 or 1"
        )
    return yes.astype(np.float32)


def _named(file: str, source: Source) -> _File:
    """The label file that the user named by --labels."""
    text = read_text(Path(file))
    if text is None:
        raise UserError(f"--labels {file} does not exist, or is not a file")
    folder = "."
    if os.path.isdir(source.path):
        folder = os.path.relpath(os.path.dirname(os.path.abspath(file)), source.path)
    return _File(file, text, "" if folder == "." else folder)


def _nearest(dataset: ImageDataset, source: Source) -> _File:
    """The first of LABEL_FILES in the nearest folder that has one."""
    looked: list[str] = []
    for place, folder, read in _places(dataset, source):
        for name in LABEL_FILES:
            text = read(name)
            if text is not None:
                return _File(os.path.join(place, name), text, folder)
        looked.append(place)
    raise UserError(
        f"there are no labels for {source.path}: looked for {', '.join(LABEL_FILES)} in "
        f"{', '.join(looked)}; name a file by --labels FILE ({_FORM})"
    )


def _places(
    dataset: ImageDataset, source: Source
) -> Iterator[tuple[str, str, Callable[[str], str | None]]]:
    """Where a label file may lie, nearest first: the folder for messages, the same relative to the
    images' root, and the way to read a file there.
    """
    if isinstance(source, LmdbSource):
        yield source.folder, "", source.sidecar
        return
    holding = {os.path.dirname(dataset.image_name(i)) for i in range(len(dataset))}
    common = os.path.commonpath(list(holding)) if holding else ""
    parts = common.split("/") if common else []
    for depth in range(len(parts), -1, -1):
        folder = "/".join(parts[:depth])
        yield str(Path(source.path, folder)), folder, _reader(source, folder)
    # Above the folder of images, or beside the zip file (so it is with CelebA's own).
    above = os.path.dirname(os.path.abspath(source.path))
    folder = ".." if os.path.isdir(source.path) else ""
    yield above, folder, lambda name: read_text(Path(above, name))


def _reader(source: Source, folder: str) -> Callable[[str], str | None]:
    return lambda name: source.sidecar(os.path.join(folder, name))


def _seen_from(folder: str, source: Source) -> list[str]:
    """The names of the source's images relative to `folder`, which is relative to their root.

    As seen from elsewhere than above or among the images they are relative to the root.
    """
    names = [source.name(i) for i in range(len(source))]
    steps = folder.split("/")
    if set(steps) == {".."}:
        root = os.path.abspath(source.path).split("/")[-len(steps) :]
        return ["/".join([*root, name]) for name in names]
    return [name.removeprefix(f"{folder}/") for name in names]


def _match(images: Sequence[str], rows: Sequence[str]) -> np.ndarray:
    """For each image the row that names it, −1 where none does; no row is given to two images."""
    found = np.full(len(images), -1)
    given = np.zeros(len(rows), dtype=bool)
    for key in (str, _stem, os.path.basename, lambda name: _stem(os.path.basename(name))):
        row_of = _index(map(key, rows))
        for name, image in _index(map(key, images)).items():
            row = row_of.get(name, -1)
            if min(row, image) >= 0 and found[image] < 0 and not given[row]:
                found[image], given[row] = row, True
        if (found >= 0).all():
            break
    return found


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _index(keys: Iterable[str]) -> dict[str, int]:
    """Where each key occurs; −1 for one that occurs more than once."""
    index: dict[str, int] = {}
    for at, key in enumerate(keys):
        index[key] = -1 if key in index else at
    return index


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if stripped := line.strip():
            yield number, stripped


def _celeba_table(file: _File) -> _Table:
    """A file of CelebA's form; UserError with the line where it is not."""
    lines = _lines(file.text)
    _, promised = next(lines, (1, ""))
    count = parse_count(promised)
    if count is None:
        raise UserError(
            f"{file.path} line 1: found {promised[:60]!r}, expected the number of rows ({_FORM})"
        )
    _, header = next(lines, (2, ""))
    names = _attribute_names(file, header.split(), _FORM)
    width = len(names)
    rows = (_Row(line, *_celeba_row(text, width)) for line, text in lines)
    table = _table(file, names, rows, _FORM)
    if len(table.images) != count:
        raise UserError(
            f"{file.path} line 1 promises {promised} rows, but {len(table.images)} follow the "
            "attributes' names; copy or download the file again, or correct the number"
        )
    return table


def _celeba_row(text: str, width: int) -> tuple[str, list[str]]:
    """The image and the values of a line; the image's name may hold spaces before its ending."""
    image, *values = text.split()
    if len(values) > width:
        longer, *last = text.rsplit(None, width)
        if longer.lower().endswith(EXTENSIONS):
            return longer, last
    return image, values


def _attribute_names(file: _File, names: Sequence[str], form: str) -> tuple[str, ...]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        found = f"the attribute {twice[0]} twice" if twice else "no attributes"
        raise UserError(f"{file.path} line 2: found {found} (expected: {form})")
    return tuple(names)


def _table(file: _File, names: tuple[str, ...], rows: Iterable[_Row], form: str) -> _Table:
    """Check and convert rows; UserError with the line of the first that is wrong."""
    line_of: dict[str, int] = {}
    numbers = array.array("f")  # CelebA has 8 million: they must not be objects
    number = functools.lru_cache(maxsize=1024)(float)  # and most are one of two
    for line, image, values in rows:
        if len(values) != len(names):
            raise UserError(
                f"{file.path} line {line}: found {len(values)} values for {image[:60]!r}, expected "
                f"{len(names)}, one for each attribute in line 2"
            )
        if image in line_of:
            raise UserError(
                f"{file.path} line {line}: {image[:60]!r} has a row already, in line "
                f"{line_of[image]}"
            )
        line_of[image] = line
        try:
            numbers.extend(map(number, values))
        except ValueError as error:  # which says: could not convert string to float: 'x'
            reason = str(error)[:100]
            raise UserError(f"{file.path} line {line}: {reason}; expected numbers") from None
    table = np.array(numbers, dtype=np.float32).reshape(-1, len(names))
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = bad[0]
        raise UserError(
            f"{file.path} line {list(line_of.values())[row]}: attribute {names[column]} is "
            f"{table[row, column]}; expected a finite number"
        )
    if not line_of:
        raise UserError(f"{file.path} holds no rows (expected: {form})")
    return _Table(names, list(line_of), table)


def _lfw_labels(dataset: ImageDataset, source: LfwSource, file: str | None) -> Labels:
    """LFW's real-valued attributes, of those images of `dataset` that have a row."""
    found = _named(file, source) if file else _lfw_file(source)
    table = _lfw_table(found)
    row_of = {image: row for row, image in enumerate(table.images)}
    rows = np.array([row_of.get(dataset.image_name(i), -1) for i in range(len(dataset))])
    positions = np.flatnonzero(rows >= 0)
    if len(positions) == 0:
        raise UserError(
            f"none of the {len(table.images)} rows of {found.path} belongs to one of the "
            f"{len(dataset)} images of split {dataset.split} (its first is for "
            f"{table.images[0][:60]})"
        )
    return Labels(table.names, table.values[rows[positions]], positions, found.name)


def _lfw_file(source: LfwSource) -> _File:
    folder = os.path.abspath(source.path)
    looked = [folder]
    if os.path.basename(folder) == INNER_FOLDER:
        looked.append(os.path.dirname(folder))
    for place in looked:
        path = os.path.join(place, LFW_LABELS)
        text = read_text(Path(path))
        if text is not None:
            return _File(path, text, "")
    raise UserError(
        f"lfw's attributes are missing: put {LFW_LABELS} into {' or '.join(looked)}, or name it by "
        f"--labels FILE ({_LFW_FORM}); nothing is downloaded"
    )


def _lfw_table(file: _File) -> _Table:
    """`lfw_attributes.txt`; UserError with the line where it is not of that form."""
    lines = _lines(file.text)
    next(lines, None)
    _, header = next(lines, (2, ""))
    words = [word.strip() for word in header.split("\t")]
    if words[:3] != ["#", "person", "imagenum"]:
        raise UserError(f"{file.path} line 2: found {header[:60]!r}, expected {_LFW_FORM}")
    names = _attribute_names(file, words[3:], _LFW_FORM)
    return _table(file, names, (_lfw_row(file, line, text) for line, text in lines), _LFW_FORM)


def _lfw_row(file: _File, line: int, text: str) -> _Row:
    person, *words = text.split("\t")
    number = parse_count(words[0].strip()) if words else None
    if number is None:
        raise UserError(
            f"{file.path} line {line}: found {text[:60]!r}, expected `Name<TAB>number<TAB>values`"
        )
    return _Row(line, image_name(person.strip().replace(" ", "_"), number), words[1:])
