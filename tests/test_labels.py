"""Labels of images from files of several forms; LFW; a data set's other splits, people, subsets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import NOISE, encode, one_line, plain, write_folder, write_lmdb, write_zip

from dbae import presets
from dbae.data import (
    CELEBA_ATTRIBUTES,
    ImageDataset,
    Labels,
    binary_labels,
    demo,
    open_dataset,
    real_labels,
    transform,
)
from dbae.distributed import Context
from dbae.errors import UserError
from dbae.presets import ModelConfig, TrainConfig
from dbae.training import Trainer

NAMES = ("Smiling", "Male", "Young")


def value(i: int, attribute: int) -> int:
    """The label 0 or 1 that the files here give to image i: its number in binary."""
    return i >> attribute & 1


def expected(numbers: Sequence[int]) -> np.ndarray:
    return np.array([[value(i, k) for k in range(len(NAMES))] for i in numbers], dtype=np.float32)


def row(file: str, i: int) -> str:
    return f"{file}  " + "  ".join(str(2 * value(i, k) - 1) for k in range(len(NAMES)))


def celeba_form(files: Sequence[str], numbers: Sequence[int] | None = None) -> str:
    """A file of CelebA's form for these images, the i-th of which has the labels of number i."""
    rows = map(row, files, range(len(files)) if numbers is None else numbers)
    return "\n".join([str(len(files)), " ".join(NAMES) + " ", *rows, ""])


def pictures(count: int, form: str = "{:03d}.png") -> dict[str, bytes]:
    return {form.format(i): plain(i) for i in range(count)}


def folder(path: Path, split: str = "all") -> ImageDataset:
    return open_dataset("folder", str(path), 8, split)


def small_celeba(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The preset celeba for plain images: 80 % train, 10 % valid, 10 % test."""
    parts = {"train": (0, 8), "valid": (8, 9), "test": (9, 10)}
    splits = {name: (first * count // 10, stop * count // 10) for name, (first, stop) in
              parts.items()}  # fmt: skip
    preset = presets.PRESETS["celeba"]
    data = dataclasses.replace(preset.data, crop=None, splits=splits)
    monkeypatch.setitem(presets.PRESETS, "celeba", dataclasses.replace(preset, data=data))


# A data set and its siblings


def people_folder(path: Path) -> Path:
    lines = [f"{name} person {i // 3}\n" for i, name in enumerate(pictures(120))]
    return write_folder(path, {**pictures(120), "identity.txt": "".join(lines[:-3]).encode()})


def test_another_split_is_the_one_that_open_dataset_gives(tmp_path: Path) -> None:
    path = people_folder(tmp_path / "faces")
    dataset = open_dataset("folder", str(path), 8, "all", bad_images="skip")
    assert dataset.splits == ("train", "valid", "test")
    for split in (*dataset.splits, "all"):
        sibling = dataset.in_split("test").in_split(split)
        opened = open_dataset("folder", str(path), 8, split, bad_images="skip")
        assert sibling.describe() == opened.describe()
        assert (sibling.split, sibling.bad_images) == (split, "skip")
        assert torch.equal(sibling[0].image, opened[0].image)
        assert sibling.images is dataset.images


def test_notes_travel_to_other_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_celeba(monkeypatch, 100)
    path = write_lmdb(tmp_path, "None-%07d", list(pictures(30).values()))
    everything = open_dataset("celeba", str(path), 8, "all")
    assert everything.notes == []
    assert everything.in_split("test").notes == open_dataset("celeba", str(path), 8, "test").notes
    assert len(everything.in_split("test").notes) == 1


@pytest.mark.parametrize("split", ["holdout", "valid"])
def test_a_split_that_cannot_be_had_is_the_same_mistake_everywhere(
    split: str, tmp_path: Path
) -> None:
    path = write_folder(tmp_path, pictures(1))
    dataset = folder(path)
    assert len(dataset.splits) == 1 and split not in dataset.splits
    with pytest.raises(UserError) as at_once:
        folder(path, split)
    with pytest.raises(UserError) as later:
        dataset.in_split(split)
    assert one_line(at_once) == one_line(later)


def test_groups_are_people_where_they_are_known(tmp_path: Path) -> None:
    path = people_folder(tmp_path / "faces")
    for split in ("train", "test", "all"):
        dataset = folder(path, split)
        number = [dataset.source_index(i) for i in range(len(dataset))]
        known = [f"person {i // 3}" if i < 117 else f"{i:03d}.png" for i in number]
        assert dataset.groups() == known
    test = open_dataset("demo", split="test")
    assert test.groups()[:2] == ["demo-50000", "demo-50001"]


def test_a_subset_is_these_images_of_the_same_split(tmp_path: Path) -> None:
    path = people_folder(tmp_path / "faces")
    test = folder(path, "test")
    part = test.subset([5, 0, 3])
    assert [part.image_name(i) for i in range(3)] == [test.image_name(i) for i in (5, 0, 3)]
    assert torch.equal(part[0].image, test[5].image) and part[0].index == 0
    assert part.groups() == [test.groups()[i] for i in (5, 0, 3)]
    assert part.subset(np.array([2])).source_index(0) == test.source_index(3)
    ours, whole = part.describe(), test.describe()
    assert ours["fingerprint"] != whole["fingerprint"]
    assert {**ours, "n": 0, "fingerprint": ""} == {**whole, "n": 0, "fingerprint": ""}
    assert (ours["split"], ours["n"], len(test)) == ("test", 3, whole["n"])
    assert part.in_split("test").describe() == whole
    assert len(test.subset([])) == 0
    for outside in ([0, len(test)], [-1]):
        with pytest.raises(IndexError, match=str(outside[-1])):
            test.subset(outside)


# Labels as such


def test_the_demo_sets_labels_are_what_was_drawn() -> None:
    test = open_dataset("demo", split="test").subset([7, 2])
    yes, numbers = binary_labels(test), real_labels(test)
    assert (yes.names, numbers.names) == (demo.ATTRIBUTES, demo.FACTORS)
    assert yes.source == numbers.source == "demo"
    for labels, of_picture in ((yes, demo.attributes), (numbers, demo.factors)):
        assert labels.values.dtype == np.float32
        assert labels.positions.tolist() == [0, 1]
        for i, source_index in enumerate((50_007, 50_002)):
            exact = list(of_picture(source_index).values())
            np.testing.assert_allclose(labels.values[i], exact, rtol=1e-6)


def test_attributes_are_chosen_by_name_and_order() -> None:
    labels = binary_labels(open_dataset("demo", split="test").subset(range(20)))
    chosen = labels.choose(["smile", "glasses"])
    assert chosen.names == ("smile", "glasses")
    assert np.array_equal(chosen.values, labels.values[:, [2, 0]])
    assert np.array_equal(chosen.positions, labels.positions)
    with pytest.raises(UserError, match=r"'smirk'.*glasses, hat, smile") as error:
        labels.choose(["smile", "smirk"])
    one_line(error)


def test_the_digest_is_one_of_names_values_and_positions() -> None:
    labels = Labels(("a", "b"), np.eye(2, dtype=np.float32), np.arange(2), "somewhere")
    others = [
        dataclasses.replace(labels, names=("a", "c")),
        dataclasses.replace(labels, values=1 - labels.values),
        dataclasses.replace(labels, positions=labels.positions + 1),
        labels.choose(["b", "a"]),
        labels.choose(["a"]),
    ]
    assert len({item.digest() for item in (labels, *others)}) == 6
    assert dataclasses.replace(labels, source="elsewhere").digest() == labels.digest()
    assert labels.choose(["a", "b"]).digest() == labels.digest()
    assert len(labels.digest()) == len(hashlib.sha256().hexdigest())


def test_celebas_attributes_are_the_forty_in_the_files_order() -> None:
    assert len(set(CELEBA_ATTRIBUTES)) == len(CELEBA_ATTRIBUTES) == 40
    assert CELEBA_ATTRIBUTES[0] == "5_o_Clock_Shadow"
    assert (CELEBA_ATTRIBUTES[20], CELEBA_ATTRIBUTES[39]) == ("Male", "Young")


# Files of CelebA's form


@pytest.mark.parametrize("single_file", [False, True])
def test_row_i_belongs_to_index_i_of_an_lmdb_in_every_split(
    single_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_celeba(monkeypatch, 40)
    write_lmdb(tmp_path, "None-%07d", list(pictures(40).values()))
    files = [f"{i + 1:06d}.jpg" for i in range(40)]
    (tmp_path / "list_attr_celeba.txt").write_text(celeba_form(files))
    path = tmp_path / "data.mdb" if single_file else tmp_path
    for split, numbers in (
        ("train", range(32)),
        ("valid", range(32, 36)),
        ("test", range(36, 40)),
        ("all", range(40)),
    ):
        dataset = open_dataset("celeba", str(path), 8, split)
        labels = binary_labels(dataset)
        assert labels.names == NAMES and labels.source == "list_attr_celeba.txt"
        assert np.array_equal(labels.values, expected(numbers))
        assert labels.positions.tolist() == list(range(len(numbers)))
        assert np.array_equal(real_labels(dataset).values, 2 * labels.values - 1)
        level = [int(dataset[i].image.max()) for i in (0, len(dataset) - 1)]
        assert np.array_equal(labels.values[[0, -1]], expected(level))


def test_an_lmdb_needs_exactly_one_row_per_image(tmp_path: Path) -> None:
    write_lmdb(tmp_path, "256-%05d", list(pictures(7).values()))
    for count in (6, 8):
        (tmp_path / "list_attr.txt").write_text(celeba_form([f"{i}.jpg" for i in range(count)]))
        with pytest.raises(UserError, match=f"{count} rows.* 7 images") as error:
            binary_labels(folder(tmp_path))
        one_line(error)


def check(dataset: ImageDataset, file: Path | str | None = None) -> Labels:
    """Every image, which says its number by its grey level, has the labels of that number."""
    labels = binary_labels(dataset, file and str(file))
    numbers = [int(dataset[i].image.max()) for i in range(len(dataset))]
    assert np.array_equal(labels.values, expected(numbers))
    assert labels.values.dtype == np.float32
    assert labels.positions.tolist() == list(range(len(dataset)))
    return labels


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("place", ["", "set", "set/images"])
def test_the_label_file_lies_with_the_images_or_above_them(
    kind: str, place: str, tmp_path: Path
) -> None:
    files = pictures(100, "set/images/{:06d}.jpg")
    text = celeba_form([f"{i:06d}.jpg" for i in range(100)])
    members = {**files, f"{place}/list_attr.txt".lstrip("/"): text.encode()}
    make = write_folder if kind == "folder" else write_zip
    path = make(tmp_path / "my faces ü.zip", members)
    for split in ("train", "test", "all"):
        assert check(folder(path, split)).source == "list_attr.txt"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_label_file_may_lie_beside_the_folder_or_zip_of_images(
    kind: str, tmp_path: Path
) -> None:
    text = celeba_form([f"{i:03d}.png" for i in range(10)])
    (tmp_path / "list_attr_celeba.txt").write_text(text)
    make = write_folder if kind == "folder" else write_zip
    check(folder(make(tmp_path / "img_align_celeba", pictures(10))))


def test_the_nearest_file_and_then_the_first_name_is_taken(tmp_path: Path) -> None:
    files = pictures(5, "images/{}.png")
    right = celeba_form([f"{i}.png" for i in range(5)]).encode()
    wrong = right.replace(b"Male", b"Wrong")
    for name, other in (
        ("images/list_attr_celeba.txt", "images/CelebAMask-HQ-attribute-anno.txt"),
        ("images/CelebAMask-HQ-attribute-anno.txt", "images/list_attr.txt"),
        ("images/list_attr.txt", "list_attr_celeba.txt"),
    ):
        path = write_folder(tmp_path / name, {**files, name: right, other: wrong})
        assert check(folder(path)).names == NAMES


def test_a_split_in_a_folder_of_its_own_has_its_own_file(tmp_path: Path) -> None:
    files = {f"{split}/{i}.png": plain(i) for split in ("train", "test") for i in range(3)}
    for split in ("train", "test"):
        files[f"{split}/list_attr.txt"] = celeba_form(["0.png", "1.png", "2.png"]).encode()
    path = write_folder(tmp_path, files)
    check(folder(path, "train"))
    check(folder(path, "test"))
    with pytest.raises(UserError, match="there are no labels"):
        binary_labels(folder(path))


def test_a_named_file_goes_before_those_that_lie_there(tmp_path: Path) -> None:
    wrong = celeba_form(["x.png"]).encode()
    path = write_folder(tmp_path / "faces", {**pictures(5), "list_attr.txt": wrong})
    elsewhere = write_folder(tmp_path / "else where", {}) / "meine Attribute.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text(celeba_form([f"{i:03d}.png" for i in range(5)]))
    assert check(folder(path), elsewhere).source == "meine Attribute.txt"


@pytest.mark.parametrize("place", ["..", "", "a", "else/where"])
def test_rows_may_give_paths_from_the_label_files_folder(place: str, tmp_path: Path) -> None:
    """The base names are not unique, so nothing but the path tells the images apart."""
    names = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    root = tmp_path / "faces"
    write_folder(root, {name: plain(i) for i, name in enumerate(names)})
    prefix = "faces/" if place == ".." else ""
    rows = [name.removeprefix("a/") if place == "a" else prefix + name for name in names]
    file = root / place / "labels.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(celeba_form(rows))
    check(folder(root), file)


def test_another_extension_is_accepted_where_stems_are_unique(tmp_path: Path) -> None:
    text = celeba_form([f"{i:03d}.jpg" for i in range(10)])
    path = write_folder(tmp_path, {**pictures(10), "list_attr_celeba.txt": text.encode()})
    check(folder(path))


@pytest.mark.parametrize("rows", [["a/1.png"], ["1.png"], ["1.jpg"], ["a/1.jpg", "c/1.jpg"]])
def test_a_row_is_never_given_to_an_image_it_may_not_mean(rows: list[str], tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a/1.png": plain(0), "b/1.png": plain(1)})
    (path / "list_attr.txt").write_text(celeba_form(rows))
    with pytest.raises(UserError, match=r"no row for image \w/1\.png"):
        binary_labels(folder(path))


def test_one_row_never_serves_two_images(tmp_path: Path) -> None:
    files = {"x/1.png": plain(0), "y/1.jpg": encode(Image.new("RGB", (8, 8)), "JPEG")}
    path = write_folder(tmp_path, {**files, "list_attr.txt": celeba_form(["x/1.jpg"]).encode()})
    with pytest.raises(UserError, match=r"no row for image y/1\.jpg, and for 1 of 2"):
        binary_labels(folder(path))


def test_the_row_of_the_same_path_is_not_replaced_by_a_lesser_match(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a/1.png": plain(0), "c.png": plain(1)})
    (path / "list_attr.txt").write_text(celeba_form(["a/1.jpg", "b/1.png"]))
    check(folder(path).subset([0]))


def test_a_whole_label_file_serves_some_of_the_images(tmp_path: Path) -> None:
    some = {f"{i:03d}.png": plain(i) for i in (3, 4, 9)}
    text = celeba_form([f"{i:03d}.png" for i in range(20)])
    check(folder(write_folder(tmp_path, {**some, "list_attr.txt": text.encode()})))


def test_images_without_a_row_are_counted_and_named(tmp_path: Path) -> None:
    text = celeba_form(["000.png", "002.png"], [0, 2])
    path = write_folder(tmp_path, {**pictures(5), "list_attr.txt": text.encode()})
    with pytest.raises(UserError, match=r"no row for image 001\.png, and for 3 of 5") as error:
        binary_labels(folder(path))
    one_line(error)
    check(folder(path).subset([0, 2]))


def test_celebamask_hqs_file_with_its_double_spaces_is_read(tmp_path: Path) -> None:
    text = f"30\n{' '.join(CELEBA_ATTRIBUTES)}\n" + "".join(
        f"{i}.jpg " + " ".join(" 1" if k == i else "-1" for k in range(40)) + "\n"
        for i in range(30)
    )
    write_folder(tmp_path, {"CelebAMask-HQ-attribute-anno.txt": text.encode()})
    write_lmdb(tmp_path, "128-%05d", list(pictures(30).values()))
    labels = binary_labels(open_dataset("celebahq", str(tmp_path), 128))
    assert labels.names == CELEBA_ATTRIBUTES
    assert np.array_equal(labels.values, np.eye(30, 40))


WRITTEN = {
    "windows": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "blank lines": lambda text: text.encode() + b"\n  \n\n",
    "no last newline": lambda text: text.rstrip().encode(),
    "tabs": lambda text: text.replace("  ", "\t").encode(),
    "not utf-8": lambda text: text.replace("3\n", "4\n", 1).encode() + row("Jos", 0).encode()
    .replace(b"Jos", b"Jos\xe9.png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("way", WRITTEN)
def test_ways_of_writing_the_same_file(way: str, kind: str, tmp_path: Path) -> None:
    data = WRITTEN[way](celeba_form(["0.png", "mein Bild 1.png", "ä.png"]))
    files = {"0.png": plain(0), "mein Bild 1.png": plain(1), "ä.png": plain(2)}
    make = write_folder if kind == "folder" else write_zip
    check(folder(make(tmp_path / "x", {**files, "list_attr.txt": data})))


def test_real_values_are_given_as_they_are(tmp_path: Path) -> None:
    text = "2\nage fever\n000.png 31.5 -4e-2\n001.png 7 1000\n"
    path = write_folder(tmp_path, {**pictures(2), "list_attr.txt": text.encode()})
    labels = real_labels(folder(path))
    assert labels.names == ("age", "fever")
    np.testing.assert_array_equal(labels.values, np.float32([[31.5, -0.04], [7, 1000]]))
    with pytest.raises(UserError, match=r"age of '000\.png' is 31\.5; expected −1 or 1") as error:
        binary_labels(folder(path))
    one_line(error)


def test_zeros_and_ones_are_binary_too_but_not_mixed_with_minus_ones(tmp_path: Path) -> None:
    path = write_folder(tmp_path, pictures(2))
    file = path / "list_attr.txt"
    file.write_text("2\nfirst second\n000.png 0 -1\n001.png 1 1\n")
    assert binary_labels(folder(path)).values.tolist() == [[0, 0], [1, 1]]
    file.write_text("2\nfirst second\n000.png 0 -1\n001.png 1 0\n")
    with pytest.raises(UserError, match="second is −1 for some images and 0 for others") as error:
        binary_labels(folder(path))
    one_line(error)


MISTAKES = {
    "empty": ("", "line 1: found '', expected the number of rows"),
    "a csv file": ("image_id,Male\n000.png,1\n", "line 1: found 'image_id,Male'"),
    "no count": (f"{' '.join(NAMES)}\n{row('000.png', 0)}\n", "line 1: found 'Smiling Male Young'"),
    "count alone": ("1\n", "line 2: found no attributes"),
    "no rows": ("0\nMale Young\n", "holds no rows"),
    "an attribute twice": ("1\nMale Male\n000.png 1 1\n", "'?Male'? twice"),
    "count too large": ("3\nMale\n000.png 1\n001.png -1\n", "promises 3 rows, but 2 follow"),
    "count too small": ("1\nMale\n000.png 1\n001.png -1\n", "promises 1 rows, but 2 follow"),
    "a value too few": ("2\nA B\n000.png 1 1\n001.png 1\n", "line 4: found 1 values for '001.png'"),
    "a value too many": ("2\nA B\n\n000.png 1 1 1\n", "line 4: found 3 values for '000.png'"),
    "a word": ("2\nA B\n000.png 1 1\n001.png 1 yes\n", "line 4: .*'yes'; expected numbers"),
    "not a number": ("2\nA B\n000.png 1 1\n001.png 1 nan\n", "line 4: attribute B is nan"),
    "infinite": ("2\nA B\n000.png -inf 1\n001.png 1 1\n", "line 3: attribute A is -inf"),
    "too large for float32": ("1\nA B\n\n000.png 1 1e99\n", "line 4: attribute B is inf"),
    "a file twice": ("2\nA\n000.png 1\n000.png 1\n", "line 4: '000.png' has a row .* in line 3"),
}  # fmt: skip


@pytest.mark.parametrize("read", [binary_labels, real_labels])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_malformed_file_is_explained_by_its_line(mistake: str, read, tmp_path: Path) -> None:
    text, words = MISTAKES[mistake]
    path = write_folder(tmp_path, {**pictures(2), "list_attr.txt": text.encode()})
    with pytest.raises(UserError, match=words) as error:
        read(folder(path))
    assert "list_attr.txt" in one_line(error)


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb"])
def test_without_a_file_it_is_said_what_is_looked_for_and_where(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "faces"
    if kind == "lmdb":
        write_lmdb(path, "256-%05d", [plain(0)])
    else:
        make = write_folder if kind == "folder" else write_zip
        make(path, pictures(2, "set/images/{}.png"))
    with pytest.raises(UserError) as error:
        binary_labels(folder(path))
    line = one_line(error)
    places = ["faces"] if kind == "lmdb" else ["faces/set/images, ", "faces/set, ", "faces, "]
    for word in (
        "list_attr_celeba.txt, CelebAMask-HQ-attribute-anno.txt, list_attr.txt", "--labels FILE",
        "line 1 the number of rows", *places, str(tmp_path),
    ):  # fmt: skip
        assert word in line


def test_a_named_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    path = write_folder(tmp_path, pictures(1))
    for name in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(UserError, match=f"--labels {name} does not exist") as error:
            binary_labels(folder(path), str(name))
        one_line(error)
    with pytest.raises(UserError, match="the demo set knows its labels") as error:
        real_labels(open_dataset("demo"), "x.txt")
    one_line(error)


# LFW

TRAIN = {"Ann_Lee": 2, "Bo_van_Ek": 1, "Cy": 3}
TEST = {"Di_Öz": 1, "Ed": 2}
LFW_NAMES = ["Male", "Asian", "Big Nose"]


def people_list(people: dict[str, int]) -> bytes:
    lines = "".join(f"{name}\t{count}\n" for name, count in people.items())
    return f"{len(people)}\n{lines}".encode()


def lfw_name(person: str, number: int) -> str:
    return f"lfw_funneled/{person}/{person}_{number:04d}.jpg"


def jpeg(level: int) -> bytes:
    return encode(Image.new("RGB", (25, 25), (level, level, level)), "JPEG", quality=100)


def lfw(path: Path, folder: str = "") -> Path:
    """LFW with nine images in its lists, of grey levels 10, 20, …, and one that is in none."""
    counts = [(person, number + 1) for people in (TRAIN, TEST) for person, count in people.items()
              for number in range(count)]  # fmt: skip
    files = {lfw_name(*one): jpeg(10 * (i + 1)) for i, one in enumerate(counts)}
    files[lfw_name("Unlisted", 1)] = jpeg(255)
    files["peopleDevTrain.txt"] = people_list(TRAIN)
    files["peopleDevTest.txt"] = people_list(TEST)
    return write_folder(path, {f"{folder}{name}": data for name, data in files.items()})


def attributes(rows: Sequence[tuple[str, int]], names: Sequence[str] = LFW_NAMES) -> str:
    """lfw_attributes.txt; row i has the values i, i + 0.5, −i, …"""
    lines = ["# lfw_attributes.txt v1.0", "\t".join(["#", "person", "imagenum", *names])]
    for i, (person, number) in enumerate(rows):
        values = [float(i), i + 0.5, -float(i)]
        lines.append("\t".join([person.replace("_", " "), str(number), *map(str, values)]))
    return "\n".join([*lines, ""])


ROWS = [("Ed", 2), ("Cy", 3), ("Nobody_Known", 1), ("Ann_Lee", 1), ("Ed", 1), ("Ann_Lee", 2)]


def open_lfw(path: Path, split: str = "train", size: int = 8) -> ImageDataset:
    return open_dataset("lfw", str(path), size, split)


@pytest.mark.parametrize("inner", ["", "lfw-py/"])
def test_lfw_is_read_in_the_order_of_its_lists_in_both_layouts(inner: str, tmp_path: Path) -> None:
    path = lfw(tmp_path / "lfw", inner)
    levels = {}
    for split in ("train", "test", "all"):
        dataset = open_lfw(path, split)
        levels[split] = [round(int(dataset[i].image.max()), -1) for i in range(len(dataset))]
    assert levels == {
        "train": [10, 20, 30, 40, 50, 60], "test": [70, 80, 90], "all": [*range(10, 91, 10)]
    }  # fmt: skip
    train = open_lfw(path)
    assert train.splits == ("train", "test") and train.kind == train.name == "lfw"
    assert train.image_name(1) == "lfw_funneled/Ann_Lee/Ann_Lee_0002.jpg"
    assert train.groups() == ["Ann_Lee", "Ann_Lee", "Bo_van_Ek", "Cy", "Cy", "Cy"]
    assert train.in_split("test").groups() == ["Di_Öz", "Ed", "Ed"]
    assert open_dataset("lfw", str(path), 8).describe() == train.describe()
    assert open_lfw(path / inner).describe()["fingerprint"] == train.describe()["fingerprint"]


@pytest.mark.parametrize(("size", "larger", "edge"), [(64, 70, 3), (128, 140, 6), (256, 281, 12)])
def test_lfw_is_enlarged_by_a_tenth_and_cut(size: int, larger: int, edge: int) -> None:
    image = NOISE.resize((250, 250))
    resized = image.resize((larger, larger), Image.Resampling.BILINEAR)
    cut = resized.crop((edge, edge, edge + size, edge + size))
    found = transform(image, size, fit="enlarge").permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(cut))
    assert presets.PRESETS["lfw"].data.fit == "enlarge"


def test_lfws_order_of_cutting_is_recorded(tmp_path: Path) -> None:
    assert open_lfw(lfw(tmp_path)).describe()["transform"].startswith("enlarge")


def broken_lfw(path: Path, change: str, data: bytes | None) -> Path:
    lfw(path)
    target = path / change
    if data is not None:
        target.write_bytes(data)
    elif target.is_dir():
        target.rename(path / "funneled")
    else:
        target.unlink()
    return path


LFW_MISTAKES = {
    "no folder": ("lfw_funneled", None, "lacks lfw_funneled; .*NAME_0001"),
    "no list": ("peopleDevTest.txt", None, "lacks peopleDevTest.txt; .*nothing is downloaded"),
    "no image": (lfw_name("Cy", 2), None, "lacks lfw_funneled/Cy/Cy_0002.jpg.* 1 of the 9"),
    "more images promised": (
        "peopleDevTrain.txt", people_list({**TRAIN, "Cy": 5}), "Cy_0004.jpg.* 2 of the 11"
    ),
    "people that mix": (
        "peopleDevTest.txt", people_list({**TEST, "Cy": 3, "Ann_Lee": 2}), "Ann_Lee is in .*2 peo"
    ),
    "wrong count": ("peopleDevTrain.txt", b"2\nCy\t1\n", "begins with '2' and lists 1 people"),
    "no count": ("peopleDevTrain.txt", b"Ed\t1\nCy\t1\n", r"begins with 'Ed 1' and lists 1 people"),
    "empty list": ("peopleDevTrain.txt", b"", "begins with 'nothing'"),
    "no number": ("peopleDevTrain.txt", b"1\n\nCy\n", "line 3: found 'Cy'"),
    "no images": ("peopleDevTrain.txt", b"1\nCy\t0\n", "line 2: found 'Cy 0'"),
    "twice": ("peopleDevTrain.txt", b"2\nCy\t1\nCy\t1\n", "line 3: Cy is in the list already"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", LFW_MISTAKES)
def test_what_is_wrong_with_lfw_is_one_clear_line(mistake: str, tmp_path: Path) -> None:
    change, data, words = LFW_MISTAKES[mistake]
    with pytest.raises(UserError, match=words) as error:
        open_lfw(broken_lfw(tmp_path / "lfw", change, data))
    one_line(error)


def test_where_lfw_belongs_is_said_when_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"PK")
    for path, words in (
        (None, "pass --data_dir"),
        (str(tmp_path / "nowhere"), "does not exist"),
        (str(tmp_path / "file.zip"), "is not a folder"),
        (str(tmp_path), "lacks lfw_funneled, peopleDevTrain.txt, peopleDevTest.txt"),
    ):
        with pytest.raises(UserError, match=words) as error:
            open_dataset("lfw", path)
        line = one_line(error)
        for part in (
            "lfw_funneled/NAME/NAME_0001.jpg", "peopleDevTrain.txt", "peopleDevTest.txt", "lfw-py/",
            "nothing is downloaded",
        ):  # fmt: skip
            assert part in line


@pytest.mark.parametrize(
    ("inner", "place"),
    [("", ""), ("lfw-py/", ""), ("lfw-py/", "lfw-py"), ("", None), ("lfw-py/", None)],
)
def test_lfws_attributes_go_to_their_images_and_the_rest_is_left_out(
    inner: str, place: str | None, tmp_path: Path
) -> None:
    path = lfw(tmp_path / "lfw", inner)
    file = (
        tmp_path / "labels" / "mine.txt" if place is None else path / place / "lfw_attributes.txt"
    )
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(attributes(ROWS).replace("\n", "\r\n").encode())
    named = str(file) if place is None else None
    for split, positions, rows in (
        ("train", [0, 1, 5], [3, 5, 1]),
        ("test", [1, 2], [4, 0]),
        ("all", [0, 1, 5, 7, 8], [3, 5, 1, 4, 0]),
    ):
        labels = real_labels(open_lfw(path, split), named)
        assert labels.names == tuple(LFW_NAMES) and labels.source == file.name
        assert labels.positions.tolist() == positions and labels.positions.dtype == np.int64
        assert labels.values.tolist() == [[i, i + 0.5, -i] for i in rows]
        assert labels.values.dtype == np.float32
    labelled = open_lfw(path).subset(real_labels(open_lfw(path), named).positions)
    assert real_labels(labelled, named).positions.tolist() == [0, 1, 2]
    if inner:  # the same when the inner folder is named
        assert len(real_labels(open_lfw(path / inner), named).positions) == 3


ATTRIBUTE_MISTAKES = {
    "header": ("# x\n# person\tMale\n", r"line 2: found '# person\\tMale'"),
    "one line": ("# x\n", "line 2: found ''"),
    "no rows": (attributes([]), "holds no rows"),
    "a value too few": (attributes(ROWS, [*LFW_NAMES, "Bald"]), "line 3: found 3 values .* 4"),
    "no number": (attributes(ROWS).replace("Cy\t3", "Cy"), "line 4: found 'Cy"),
    "a word": (attributes(ROWS).replace("0.5", "half"), "line 3: .*'half'; expected numbers"),
    "nan": (attributes(ROWS).replace("1.5", "nan"), "line 4: attribute Asian is nan"),
    "twice": (attributes([*ROWS, ("Cy", 3)]), "line 9: .*Cy_0003.jpg' has a row .* in line 4"),
    "others": (attributes([("Nobody", 1), ("Ed", 1)]), "none of the 2 rows .* 6 images of split"),
    "names": (attributes(ROWS, ["Male", "Male", "Bald"]), "line 2: found the attribute Male twice"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ATTRIBUTE_MISTAKES)
def test_what_is_wrong_with_lfws_attributes_is_one_clear_line(mistake: str, tmp_path: Path) -> None:
    text, words = ATTRIBUTE_MISTAKES[mistake]
    (lfw(tmp_path) / "lfw_attributes.txt").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        real_labels(open_lfw(tmp_path))
    assert "lfw_attributes.txt" in one_line(error)


def test_lfw_without_attributes_or_for_yes_and_no_says_what_to_do(tmp_path: Path) -> None:
    dataset = open_lfw(lfw(tmp_path / "lfw", "lfw-py/"))
    with pytest.raises(UserError) as error:
        real_labels(dataset)
    line = one_line(error)
    for word in ("lfw_attributes.txt", str(tmp_path / "lfw" / "lfw-py"), "--labels FILE"):
        assert word in line
    assert f"or {tmp_path / 'lfw'}," in line
    with pytest.raises(UserError, match=r"infer_reg_dbae\.sh") as error:
        binary_labels(dataset)
    one_line(error)


def test_a_model_trains_on_lfw(tmp_path: Path) -> None:
    model = ModelConfig(32, latent_dim=4, num_channels=32, num_res_blocks=1, endpoint_channels=4)
    config = TrainConfig(
        dataset="lfw", data_dir=str(lfw(tmp_path / "lfw")), workdir=str(tmp_path), batch_size=2,
        microbatch=2, max_steps=1, save_interval=1, sample_interval=0, num_workers=0,
    )  # fmt: skip
    trainer = Trainer(model, config, Context())
    trainer.run()
    assert (trainer.folder / "ema_0.9999_000001.pt").exists()
    assert trainer.folder.name.startswith("lfw32_")
