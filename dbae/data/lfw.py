"""Labeled Faces in the Wild (LFW), in the layout that torchvision's LFWPeople uses.

That class is not used: it insists on a download from a host that is gone, or on check sums.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from .sources import FolderSource, parse_count, read_text

IMAGES = "lfw_funneled"
PEOPLE_FILES = {"train": "peopleDevTrain.txt", "test": "peopleDevTest.txt"}
_MOST_IMAGES = 1_000_000  # in a list (LFW has 13,233): names of more would fill the memory
INNER_FOLDER = "lfw-py"  # torchvision's own name for the folder that holds it all
LAYOUT = (
    f"{IMAGES}/NAME/NAME_0001.jpg, {' and '.join(PEOPLE_FILES.values())} in that folder or "
    f"together in {INNER_FOLDER}/ there; nothing is downloaded"
)


def image_name(person: str, number: int) -> str:
    """Where image `number` (from 1) of a person lies, relative to the folder that holds LFW."""
    return f"{IMAGES}/{person}/{person}_{number:04d}.jpg"


class LfwSource(FolderSource):
    """The images of the people in LFW's development lists, train before test, in their order.

    `path` is the folder that holds `lfw_funneled`; `splits` are the indices of train and test.
    Raises UserError, one line each, for a missing folder, list or image, for a list that is not
    in LFW's form, and for a person in both lists.
    """

    kind = "lfw"

    def __init__(self, path: str) -> None:
        folder = _find(path)
        people = {split: _read_people(folder / file) for split, file in PEOPLE_FILES.items()}
        both = people["train"].keys() & people["test"].keys()
        if both:
            raise UserError(
                f"{min(both)} is in {' and in '.join(PEOPLE_FILES.values())} of {folder} "
                f"({len(both)} people are); people must not be in both: take LFW's own lists"
            )
        self._people: list[str] = []
        self.splits: dict[str, range] = {}
        names: list[str] = []
        for split, images in people.items():
            first = len(names)
            for person, count in images.items():
                names += [image_name(person, number + 1) for number in range(count)]
                self._people += [person] * count
            self.splits[split] = range(first, len(names))
        _require(folder, names)
        super().__init__(str(folder), names)

    def people(self) -> list[str]:
        """For each image the person that it shows, as the folders are named."""
        return self._people


def _find(path: str) -> Path:
    """The folder at or below `path` that holds LFW."""
    if not os.path.isdir(path):
        found = "is not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {found}; lfw expects {LAYOUT}")

    def missing(folder: Path) -> list[str]:
        return [name for name in (IMAGES, *PEOPLE_FILES.values()) if not (folder / name).exists()]

    folder = min(Path(path), Path(path, INNER_FOLDER), key=lambda folder: len(missing(folder)))
    if missing(folder):
        raise UserError(f"{folder} lacks {', '.join(missing(folder))}; lfw expects {LAYOUT}")
    return folder


def _read_people(file: Path) -> dict[str, int]:
    """A list of people: line 1 how many, then `Name<TAB>number of images` → name: number.

    The names are those of folders, and lead nowhere else.
    """
    text = (read_text(file) or "").splitlines()
    lines = [(at, line.split()) for at, line in enumerate(text, start=1) if line.strip()]
    people: dict[str, int] = {}
    for at, words in lines[1:]:
        count = parse_count(words[1]) if len(words) == 2 else None
        if not count or "/" in words[0] or words[0] == "..":
            raise UserError(
                f"{file} line {at}: found {' '.join(words)[:60]!r}, expected a name and the number "
                "of images"
            )
        if words[0] in people:
            raise UserError(f"{file} line {at}: {words[0]} is in the list already")
        people[words[0]] = count
    if sum(people.values()) > _MOST_IMAGES:
        raise UserError(
            f"{file} promises {sum(people.values())} images, expected at most {_MOST_IMAGES}; take "
            "LFW's own list"
        )
    promised = " ".join(lines[0][1])[:60] if lines else "nothing"
    if not people or promised != str(len(people)):
        raise UserError(
            f"{file} begins with {promised!r} and lists {len(people)} people; expected their "
            "number on line 1, then a line `Name<TAB>number of images` for each"
        )
    return people


def _require(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]}, and in all {len(missing)} of the {len(names)} images "
            f"that its lists name; unpack LFW's funneled images again (lfw expects {LAYOUT})"
        )
