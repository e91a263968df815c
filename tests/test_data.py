"""Images from folder, zip and LMDB; bad images; splits; conversions; the order of training."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dbae import presets
from dbae.data import (
    BadImage,
    BatchOrder,
    ImageDataset,
    RankBatches,
    decode,
    demo,
    identity_groups,
    image_grid,
    open_dataset,
    open_source,
    to_model_range,
    to_uint8,
    transform,
    user_error_from_worker,
)
from dbae.errors import UserError


def encode(image: Image.Image, format: str = "PNG", **keywords: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **keywords)
    return out.getvalue()


def plain(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one grey level: a record that says which one it is."""
    return encode(Image.new("RGB", size, (level, level, level)))


def write_lmdb(path: Path, form: str, records: list[bytes], length: bytes | None = b"") -> Path:
    """A database in DiffAE's layout, written by hand; `length` b"" means the right one."""
    path.mkdir(parents=True, exist_ok=True)
    with (
        lmdb.open(str(path), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i, record in enumerate(records):
            transaction.put((form % i).encode(), record)
        if length is not None:
            transaction.put(b"length", length or str(len(records)).encode())
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


# Decoding: every kind of image that a folder of pictures may hold


def grey16(levels: list[int]) -> Image.Image:
    return Image.fromarray(np.array([levels], dtype=np.uint16))


def exif_rotated() -> bytes:
    """Stored 2×1 with red at the left; the camera says: turn by 90° clockwise (red on top)."""
    image = Image.new("RGB", (2, 1), "blue")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, exif=exif)


def palette_with_alpha() -> bytes:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 200, 30, 90, 90, 90])
    image.putpixel((1, 0), 1)
    return encode(image, transparency=bytes([255, 0]))


RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
READABLE: dict[str, tuple[bytes, list[tuple[int, int, int]]]] = {
    "rgb jpg": (encode(Image.new("RGB", (8, 8), RED), "JPEG", quality=100), [RED]),
    "webp": (encode(Image.new("RGB", (8, 8), RED), "WEBP", lossless=True), [RED]),
    "bmp": (encode(Image.new("RGB", (3, 3), RED), "BMP"), [RED]),
    "tiff": (encode(Image.new("RGB", (3, 3), RED), "TIFF"), [RED]),
    "grey": (encode(Image.new("L", (2, 2), 77)), [(77, 77, 77)]),
    "black and white": (encode(Image.new("1", (2, 2), 1)), [WHITE]),
    "grey with alpha": (encode(Image.new("LA", (2, 2), (0, 0))), [WHITE]),
    "half-transparent red": (
        encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128))),
        [(255, 127, 127)],
    ),
    "colour key": (encode(Image.new("RGB", (2, 2), RED), transparency=RED), [WHITE]),
    "palette with alpha": (palette_with_alpha(), [(10, 200, 30), WHITE]),
    "cmyk": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), [RED]),
    "16 bit": (
        encode(grey16([0, 128 * 257, 65535])),
        [BLACK, (128, 128, 128), WHITE],
    ),
    "32 bit": (
        encode(Image.fromarray(np.array([[0, 200 * 257, 70000]], dtype=np.int32)), "TIFF"),
        [BLACK, (200, 200, 200), WHITE],
    ),
    "float": (
        encode(Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)), "TIFF"),
        [BLACK, (51, 51, 51), WHITE],
    ),
    "float 16 bit": (
        encode(Image.fromarray(np.array([[0, 514, 65535]], dtype=np.float32)), "TIFF"),
        [BLACK, (2, 2, 2), WHITE],
    ),
    "one pixel": (encode(Image.new("RGB", (1, 1), RED)), [RED]),
}


@pytest.mark.parametrize("kind", READABLE)
def test_every_mode_becomes_rgb_with_the_right_colours(kind: str) -> None:
    data, expected = READABLE[kind]
    image = decode(data, "x")
    assert image.mode == "RGB"
    found = np.asarray(image)[0, : len(expected)].astype(int)
    assert np.abs(found - np.array(expected)).max() <= 2, found
    assert transform(image, 16).shape == (3, 16, 16)


def test_exif_orientation_is_applied() -> None:
    image = decode(exif_rotated(), "x")
    assert image.size == (1, 2)
    assert image.getpixel((0, 0)) == RED


def bomb(side: int = 40_000) -> bytes:
    """A PNG header that promises side × side pixels."""

    def part(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


NOISE = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
NAN = Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32))
UNREADABLE = {
    "empty": (b"", "empty"),
    "truncated jpg": (encode(NOISE, "JPEG")[:2000], "truncated"),
    "truncated png": (encode(NOISE)[:2000], "truncated"),
    "truncated webp": (encode(NOISE, "WEBP")[:500], "image"),
    "text": (b"<html>404 not found</html>", "not an image"),
    "bomb": (bomb(), "bomb"),
    "not finite": (encode(NAN, "TIFF"), "finite"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_image_is_named_with_the_reason(kind: str) -> None:
    data, reason = UNREADABLE[kind]
    with pytest.raises(BadImage, match=reason) as error:
        decode(data, "some where/ü.png")
    assert "some where/ü.png" in one_line(error)


def test_an_error_stays_on_one_line_even_if_the_name_does_not() -> None:
    with pytest.raises(BadImage) as error:
        decode(b"", "two\nlines\x1b[2J.png")
    assert "two\\nlines\\x1b[2J.png" in one_line(error)


# Cutting and resizing (as DiffAE and the published DBAE do)


def test_stretch_is_pillows_antialiased_bilinear_resize() -> None:
    wide = NOISE.resize((60, 40))
    expected = np.asarray(wide.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(transform(wide, 16).permute(1, 2, 0).numpy(), expected)


def test_center_cuts_the_middle_square_first() -> None:
    wide = NOISE.resize((60, 40))
    expected = wide.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(transform(wide, 16, fit="center").permute(1, 2, 0), np.asarray(expected))


HALVING = """
import numpy as np, torch
from PIL import Image
from dbae.data.images import transform
levels = np.random.default_rng(0)
for side in [*range(1, 40), 64, 128, 250]:
    extremes = levels.choice([0, 1, 127, 128, 254, 255], (2 * side, 2 * side, 3))
    for pixels in (extremes, levels.integers(0, 256, extremes.shape)):
        image = Image.fromarray(pixels.astype(np.uint8))
        expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
        for fit in ("stretch", "center"):
            found = transform(image, side, fit=fit)
            assert np.array_equal(found.permute(1, 2, 0).numpy(), expected), (side, fit)
            assert found.is_contiguous()
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", ["default", "as it is"])
def test_halving_gives_pillows_very_pixels_on_any_processor(capability: str) -> None:
    chosen = {"ATEN_CPU_CAPABILITY": capability} if capability == "default" else {}
    done = subprocess.run(
        [sys.executable, "-c", HALVING], env=os.environ | chosen, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert capability != "default" or done.stdout.split() == ["DEFAULT"]


@pytest.mark.filterwarnings("error")  # torch's, of memory that may not be written
@pytest.mark.parametrize("side", [1, 2, 4])
def test_pixels_belong_to_the_tensor_alone(side: int) -> None:
    image = Image.new("RGB", (side, side), RED)
    for size in (1, 2):
        transform(image, size).zero_()
        assert image.getpixel((0, 0)) == RED
        assert transform(image, size)[0].eq(255).all()


def test_an_image_of_the_right_size_is_left_alone() -> None:
    assert np.array_equal(transform(NOISE, 64).permute(1, 2, 0).numpy(), np.asarray(NOISE))


def test_celeba_crop_keeps_128_pixels_from_left_25_top_57() -> None:
    image = NOISE.resize((178, 218))
    expected = image.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR)
    found = transform(image, 64, crop=(57, 25, 128, 128))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize(("size", "to"), [((64, 64), 64), ((178, 180), 64), ((256, 256), 256)])
def test_an_image_that_is_not_aligned_celeba_is_refused(size: tuple[int, int], to: int) -> None:
    with pytest.raises(BadImage, match="178×218") as error:
        transform(Image.new("RGB", size), to, crop=(57, 25, 128, 128), name="a/b.jpg")
    assert f"a/b.jpg: is {size[0]}×{size[1]}" in one_line(error)


def test_all_256_levels_survive_the_models_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    inside = to_model_range(levels)
    assert inside.dtype == torch.float32
    assert inside.min() == -1 and inside.max() == 1
    assert torch.equal(to_uint8(inside), levels)


def test_conversion_to_8_bits_rounds_and_clamps() -> None:
    one = 2 / 255
    images = torch.tensor([-3.0, -1 + 0.4 * one, -1 + 0.6 * one, 1 - 0.4 * one, 7.0])
    assert to_uint8(images).tolist() == [0, 0, 1, 255, 255]


def test_image_grid_lays_images_row_by_row_with_a_border() -> None:
    images = torch.stack(
        [torch.full((3, 4, 6), level, dtype=torch.uint8) for level in (10, 20, 30)]
    )
    grid = np.asarray(image_grid(images, columns=2))
    assert grid.shape == (2 * 6 + 2, 2 * 8 + 2, 3)
    assert (grid[2:6, 2:8] == 10).all() and (grid[2:6, 10:16] == 20).all()
    assert (grid[8:12, 2:8] == 30).all() and (grid[8:12, 10:16] == 255).all()


# Sources

MEMBERS = {
    "b/2.PNG": plain(2),
    "b/10.jpeg": encode(Image.new("RGB", (8, 8)), "JPEG"),
    "a ä/é 1.webp": encode(Image.new("RGB", (8, 8)), "WEBP"),
    "z.tif": encode(Image.new("RGB", (8, 8)), "TIFF"),
    ".hidden.png": plain(0),
    ".cache/x.png": plain(0),
    "__MACOSX/b/._2.png": b"resource fork",
    "notes.txt": b"not an image",
}
VISIBLE = ["a ä/é 1.webp", "b/10.jpeg", "b/2.PNG", "z.tif"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folder_and_zip_give_the_images_sorted_by_name(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        path = write_folder(tmp_path / "my pictures é", MEMBERS)
    else:
        path = write_zip(tmp_path / "my pictures é.zip", MEMBERS)
    source = open_source(path)
    assert source.kind == kind
    assert [source.name(i) for i in range(len(source))] == VISIBLE
    assert [source.read(i) for i in range(len(source))] == [MEMBERS[name] for name in VISIBLE]
    assert source.sidecar("notes.txt") == "not an image"
    assert source.sidecar("other.txt") is None


def test_loops_of_links_end_and_linked_folders_are_read(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", {"b.png": plain(1)})
    folder = write_folder(tmp_path / "data", {"sub/a.png": plain(0)})
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(folder)
    assert [source.name(i) for i in range(len(source))] == ["linked/b.png", "sub/a.png"]


@pytest.mark.parametrize("form", ["256-%05d", "None-%07d", "128-%05d", "my-set-%03d"])
@pytest.mark.parametrize("single_file", [False, True])
def test_lmdb_key_form_is_read_from_the_database(
    form: str, single_file: bool, tmp_path: Path
) -> None:
    records = [plain(level) for level in range(12)]
    path = write_lmdb(tmp_path / "größe 1", form, records)
    if single_file:
        path = Path(shutil.copy(path / "data.mdb", tmp_path / "one file"))
    source = open_source(path)
    assert source.kind == "lmdb"
    assert [source.read(i) for i in range(len(source))] == records
    assert source.name(11) == form % 11


def test_the_largest_of_several_resolutions_is_taken(tmp_path: Path) -> None:
    for resolution in (64, 1024, 256):
        records = [plain(resolution % 255)] * 3
        write_lmdb(tmp_path / "db", f"{resolution}-%05d", records)
    source = open_source(tmp_path / "db")
    assert source.name(0) == "1024-00000"
    assert source.read(2) == plain(1024 % 255)


def not_an_lmdb(path: Path) -> Path:
    return write_folder(path, {"data.mdb": b"nonsense" * 2000})


def truncated_lmdb(path: Path) -> Path:
    write_lmdb(path, "256-%05d", [random.Random(0).randbytes(50_000)] * 40)
    os.truncate(path / "data.mdb", 300_000)
    return path


def slightly_truncated_lmdb(path: Path) -> Path:
    """Its last page is missing: it opens, but reading the last record would kill the process."""
    write_lmdb(path, "256-%05d", [random.Random(0).randbytes(50_000)] * 40)
    with lmdb.open(str(path), readonly=True, lock=False) as database:
        used = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    os.truncate(path / "data.mdb", used - 3 * 4096)
    return path


def truncated_zip(path: Path) -> Path:
    whole = write_zip(path.with_suffix(".whole"), {"a.png": plain(1), "b.png": plain(2)})
    path.write_bytes(whole.read_bytes()[:-40])
    return path


UNUSABLE = {
    "missing": (lambda path: path, "does not exist"),
    "other file": (lambda path: path.write_text("hello") and path, "neither"),
    "empty folder": (lambda path: path.mkdir() or path, "holds no images"),
    "folder of texts": (lambda path: write_folder(path, {"a.txt": b"x"}), "holds no images"),
    "zip without images": (lambda path: write_zip(path, {"a.txt": b"x"}), "holds no images"),
    "truncated zip": (truncated_zip, "not a complete zip"),
    "not an lmdb": (not_an_lmdb, "cannot be opened as an LMDB"),
    "empty data.mdb": (
        lambda path: write_folder(path, {"data.mdb": b""}),
        "cannot be opened as an LMDB",
    ),
    "truncated lmdb": (truncated_lmdb, "cut short"),
    "slightly truncated lmdb": (slightly_truncated_lmdb, "cut short"),
    "no length": (lambda path: write_lmdb(path, "256-%05d", [plain(0)], None), "no key `length`"),
    "length 0": (lambda path: write_lmdb(path, "256-%05d", [plain(0)], b"0"), "'0'"),
    "length abc": (lambda path: write_lmdb(path, "256-%05d", [plain(0)], b"abc"), "'abc'"),
    "other keys": (lambda path: write_lmdb(path, "image%d", [plain(0)]), "256-00000"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_source_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    make, words = UNUSABLE[kind]
    path = make(tmp_path / "my data ü.zip" if kind == "truncated zip" else tmp_path / "my data ü")
    with pytest.raises(UserError) as error:
        open_source(path)
    assert words in one_line(error) and "my data ü" in one_line(error)


def test_a_record_that_the_lmdb_lacks_is_a_bad_image(tmp_path: Path) -> None:
    source = open_source(write_lmdb(tmp_path, "256-%05d", [plain(0), plain(1)], b"4"))
    with pytest.raises(BadImage, match="256-00003") as error:
        source.read(3)
    assert "no such key" in one_line(error)


def test_a_damaged_zip_member_is_a_bad_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": plain(1), "b.png": plain(2)})
    data = bytearray(path.read_bytes())
    data[60] ^= 255  # inside the first member
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(BadImage, match=r"a\.png"):
        source.read(0)
    assert source.read(1) == plain(2)


def three_kinds(tmp_path: Path, count: int) -> dict[str, Path]:
    files = {f"{i:03d}.png": plain(i) for i in range(count)}
    return {
        "folder": write_folder(tmp_path / "a folder", files),
        "zip": write_zip(tmp_path / "ä.zip", files),
        "lmdb": write_lmdb(tmp_path / "lm db", "None-%07d", list(files.values())),
    }


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb"])
def test_workers_read_the_same_images_after_the_parent_has(kind: str, tmp_path: Path) -> None:
    """The parent's handle is open when the workers are forked: they must not use it."""
    dataset = open_dataset("folder", str(three_kinds(tmp_path, 60)[kind]), 8, "all")
    alone = [dataset[i].image for i in range(60)]
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=7, num_workers=2)
        batches = list(loader)
        assert torch.equal(torch.cat([batch.image for batch in batches]), torch.stack(alone))
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(60))
        assert not torch.cat([batch.replaced for batch in batches]).any()
    assert [int(image[0, 0, 0]) for image in alone] == list(range(60))


def test_sources_travel_to_processes_that_are_not_forks(tmp_path: Path) -> None:
    for path in three_kinds(tmp_path, 3).values():
        dataset = open_dataset("folder", str(path), 8, "all")
        dataset[0]
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[2].image, dataset[2].image)
        assert copy.describe() == dataset.describe()


def test_one_lmdb_serves_several_datasets_under_several_names(tmp_path: Path) -> None:
    path = three_kinds(tmp_path, 40)["lmdb"]
    (tmp_path / "link").symlink_to(path)
    datasets = [
        open_dataset("folder", str(name), 8, split)
        for name in (path, path / "data.mdb", tmp_path / "link")
        for split in ("train", "all")
    ]
    assert {int(dataset[0].image.max()) for dataset in datasets[1::2]} == {0}
    assert len(datasets[0]) < len(datasets[1]) == 40


# People and splits


@pytest.mark.parametrize("place", ["identity.txt", "set/identity.txt", "set/images/identity.txt"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_identities_are_found_next_to_or_above_the_images(
    place: str, kind: str, tmp_path: Path
) -> None:
    text = "2\n1.jpg Ann_Lee\n2 b.jpg Bo Öz\n"
    files = {f"set/images/{name}": plain(0) for name in ("1.jpg", "2 b.jpg", "3.jpg")}
    files[place] = text.encode()
    make = write_folder if kind == "folder" else write_zip
    source = open_source(make(tmp_path / "x", files))
    assert identity_groups(source) == ["Ann_Lee", "Bo Öz", "set/images/3.jpg"]


def test_identities_are_found_above_the_folder_that_was_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"images/1.jpg": plain(0), "identity.txt": b"1.jpg Ann\n"})
    assert identity_groups(open_source(tmp_path / "images")) == ["Ann"]


def people_zip(tmp_path: Path) -> Path:
    people = [i // 3 for i in range(600)]
    lines = [f"{i:06d}.png person_{person}\n" for i, person in enumerate(people)]
    files = {f"faces/images/{i:06d}.png": plain(i % 256) for i in range(600)}
    return write_zip(tmp_path / "f.zip", {**files, "faces/identity.txt": "".join(lines).encode()})


def splits_of(path: Path, preset: str = "folder") -> dict[str, ImageDataset]:
    return {
        split: open_dataset(preset, str(path), 8, split) for split in ("train", "valid", "test")
    }


def test_people_never_straddle_splits(tmp_path: Path) -> None:
    splits = splits_of(people_zip(tmp_path))
    people = {
        name: {int(part.source_index(i)) // 3 for i in range(len(part))}
        for name, part in splits.items()
    }
    assert not people["train"] & people["valid"]
    assert not people["train"] & people["test"]
    assert not people["valid"] & people["test"]
    assert sum(map(len, people.values())) == 200
    assert sum(map(len, splits.values())) == 600
    assert 140 <= len(people["train"]) <= 180 and len(people["test"]) >= 8


def test_hashed_splits_depend_on_the_name_alone(tmp_path: Path) -> None:
    few = {f"{i:03d}.png": plain(i) for i in range(100)}
    more = {**few, **{f"new{i}.png": plain(i) for i in range(50)}}
    before, after = (
        {name: {part.image_name(i) for i in range(len(part))} for name, part in splits.items()}
        for splits in (
            splits_of(write_folder(tmp_path / "few", few)),
            splits_of(write_folder(tmp_path / "more", more)),
        )
    )
    for split, names in before.items():
        assert names and names <= after[split]
    at = int.from_bytes(hashlib.sha256(b"000.png").digest()[:8], "big") / 2**64
    expected = "train" if at < 0.8 else "valid" if at < 0.9 else "test"
    assert "000.png" in before[expected]


@pytest.mark.parametrize("root", ["", "download/set/"])
def test_folders_named_like_splits_are_the_splits(root: str, tmp_path: Path) -> None:
    files = {f"{root}train/x/{i}.png": plain(i) for i in range(3)}
    files |= {f"{root}val/{i}.png": plain(i) for i in range(2)}
    files |= {f"{root}test/1.png": plain(9), f"{root}extra/1.png": plain(9)}
    path = write_folder(tmp_path / "d", files)
    splits = splits_of(path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "valid": 2, "test": 1}
    assert splits["valid"].image_name(0) == f"{root}val/0.png"
    assert len(open_dataset("folder", str(path), 8, "all")) == 7


def small_celeba(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {"train": (0, 80), "valid": (80, 90), "test": (90, 100)}
    preset = presets.PRESETS["celeba"]
    data = dataclasses.replace(preset.data, crop=None, splits=ranges)
    monkeypatch.setitem(presets.PRESETS, "celeba", dataclasses.replace(preset, data=data))


def test_declared_ranges_are_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_celeba(monkeypatch)
    path = write_lmdb(tmp_path, "None-%07d", [plain(i) for i in range(100)])
    splits = splits_of(path, "celeba")
    assert [part.indices for part in splits.values()] == [
        range(0, 80),
        range(80, 90),
        range(90, 100),
    ]
    assert splits["test"].source_index(3) == 93
    assert int(splits["test"][3].image.max()) == 93
    assert splits["train"].notes == []


def test_a_copy_of_another_length_is_split_in_proportion_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_celeba(monkeypatch)
    path = write_lmdb(tmp_path, "None-%07d", [plain(i) for i in range(30)])
    splits = splits_of(path, "celeba")
    assert [part.indices for part in splits.values()] == [
        range(0, 24),
        range(24, 27),
        range(27, 30),
    ]
    assert len(splits["train"].notes) == 1
    assert "30 images instead of 100" in splits["train"].notes[0]


def test_the_real_celeba_ranges_are_the_published_ones() -> None:
    splits = presets.PRESETS["celeba"].data.splits
    assert splits is not None
    sizes = [stop - first for first, stop in splits.values()]
    assert sizes == [162_770, 19_867, 19_962]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nosuch", None), "unknown"),
        (("ffhq", None), "pass --data_dir"),
        (("demo", "DIR"), "reads no files"),
        (("demo", None, 32, "holdout"), "train, test, all"),
        (("folder", "DIR", 8, "holdout"), "train, valid, test, all"),
        (("folder", "DIR", 8, "valid"), "is empty"),
        (("folder", "DIR", 8, "all", "ignore"), "--bad_images"),
    ],
)
def test_what_cannot_be_opened_is_explained(
    arguments: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, {"000.png": plain(1)})
    given: list[Any] = [str(tmp_path) if value == "DIR" else value for value in arguments]
    with pytest.raises(UserError, match=words) as error:
        open_dataset(*given)
    one_line(error)


def test_the_demo_data_set_has_disjoint_splits_and_needs_no_files() -> None:
    train, test = (open_dataset("demo", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (50_000, 5_000)
    assert test.source_index(0) == 50_000
    item = test[1]
    assert item.image.shape == (3, 32, 32) and item.image.dtype == torch.uint8
    assert item.index == 1 and not item.replaced
    assert train.describe()["fingerprint"] != test.describe()["fingerprint"]
    with pytest.raises(IndexError):
        test[5_000]


def test_describe_is_json_and_tells_data_sets_apart(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "my set", {f"{i}.png": plain(i) for i in range(30)})
    first = open_dataset("folder", str(path), 8, "train").describe()
    assert json.loads(json.dumps(first)) == first
    assert first["path"] == "my set" and first["kind"] == "folder" and first["n"] < 30
    assert open_dataset("folder", f"{path}/", 8, "train").describe() == first
    others = [open_dataset("folder", str(path), 8, "all").describe()]
    (path / "0.png").write_bytes(plain(99))
    others.append(open_dataset("folder", str(path), 8, "train").describe())
    (path / "5.png").rename(path / "5b.png")
    others.append(open_dataset("folder", str(path), 8, "train").describe())
    prints = [first["fingerprint"], *(other["fingerprint"] for other in others)]
    assert len(set(prints)) == 4


# Scaled decoding of large JPEGs


def grainy(width: int, height: int) -> Image.Image:
    """A large picture with edges, surfaces and grain, as a photograph has."""
    face = Image.fromarray(demo.draw(3, 256)).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 12, (height, width, 1))
    return Image.fromarray((np.asarray(face) + grain).clip(0, 255).astype(np.uint8))


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((1024, 1024), (256, 256)),  # an eighth would be 128: too close to 64
        ((2048, 1536), (256, 192)),
        ((1600, 1560), (400, 390)),  # at an eighth the centred square would begin within a pixel
        ((1024, 1020), (512, 510)),
        ((1023, 1023), (1023, 1023)),
        ((380, 380), (380, 380)),
    ],
)
def test_fast_decoding_stays_within_a_grey_level(
    size: tuple[int, int], decoded: tuple[int, int], tmp_path: Path
) -> None:
    image = grainy(*size)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(image, "JPEG", quality=90, exif=exif)
        write_folder(tmp_path, {f"{orientation}.jpg": data})
        turned = decoded if orientation < 5 else decoded[::-1]
        assert decode(data, "x", 64).size == turned
    plain_set = open_dataset("folder", str(tmp_path), 64, "all")
    fast_set = open_dataset("folder", str(tmp_path), 64, "all", fast_decode=True)
    for i in range(8):
        apart = rms(fast_set[i].image, plain_set[i].image)
        assert apart < 0.7 if decoded != size else apart == 0


def test_fast_decoding_is_off_unless_asked_for_and_says_so(tmp_path: Path) -> None:
    large = encode(grainy(1024, 1024), "JPEG", quality=95)
    write_folder(tmp_path, {"a.jpg": large})
    assert decode(large, "a.jpg").size == (1024, 1024)
    plain_set = open_dataset("folder", str(tmp_path), 64, "all")
    fast_set = open_dataset("folder", str(tmp_path), 64, "all", fast_decode=True)
    exact = transform(Image.open(io.BytesIO(large)), 64)
    assert torch.equal(plain_set[0].image, exact)
    assert not torch.equal(fast_set[0].image, exact)
    told = fast_set.describe(), plain_set.describe()
    assert {name for name in told[0] if told[0][name] != told[1][name]} == {"transform"}
    assert told[0]["transform"] == told[1]["transform"] + "; large JPEGs by scaled decoding"
    assert fast_set.in_split("all").describe() == fast_set.subset([0]).describe() == told[0]


def test_fast_decoding_leaves_a_crop_that_counts_pixels_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": encode(grainy(1424, 1744), "JPEG")})
    sets = [
        open_dataset("celeba", str(tmp_path), 8, "all", fast_decode=fast) for fast in (False, True)
    ]
    assert torch.equal(sets[0][0].image, sets[1][0].image)
    assert sets[0].describe() == sets[1].describe()


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.97])
def test_a_truncated_jpeg_is_refused_by_fast_decoding_too(kept: float) -> None:
    data = encode(grainy(1024, 1024), "JPEG")
    with pytest.raises(BadImage, match="cannot be decoded") as error:
        decode(data[: int(kept * len(data))], "a.jpg", 64)
    one_line(error)


# Bad images in a data set


def spoiled_folder(tmp_path: Path) -> Path:
    """Twenty images of which 3, 4 and 19 cannot be read, each for a reason of its own."""
    files = {f"{i:02d}.png": plain(i) for i in range(20)}
    files["03.png"] = b""
    files["04.png"] = files["04.png"][:40]
    return write_folder(tmp_path / "böse bilder", files)


def test_skip_takes_the_next_readable_image_always_the_same(tmp_path: Path) -> None:
    path = spoiled_folder(tmp_path)
    dataset = open_dataset("folder", str(path), 8, "all", bad_images="skip")
    (path / "19.png").unlink()  # deleted after indexing
    runs = [
        [item for batch in DataLoader(dataset, batch_size=5, num_workers=workers) for item in
         zip(batch.image[:, 0, 0, 0].tolist(), batch.index.tolist(), batch.replaced.tolist(),
             strict=True)]
        for workers in (0, 2)
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert [level for level, _, _ in runs[0]] == [0, 1, 2, 5, 5, *range(5, 19), 0]
    assert [index for _, index, _ in runs[0]] == list(range(20))
    assert [index for _, index, replaced in runs[0] if replaced] == [3, 4, 19]


def test_skip_stays_within_the_split(tmp_path: Path) -> None:
    files = {f"train/{i}.png": plain(10 + i) for i in range(3)}
    files |= {"test/0.png": plain(200), "train/2.png": b""}
    path = write_folder(tmp_path, files)
    dataset = open_dataset("folder", str(path), 8, "train", bad_images="skip")
    assert int(dataset[2].image.max()) == 10 and dataset[2].replaced


def test_skip_gives_up_when_nothing_is_readable(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {f"{i}.png": b"" for i in range(3)})
    dataset = open_dataset("folder", str(path), 8, "all", bad_images="skip")
    with pytest.raises(UserError, match="3 unreadable images in a row") as error:
        dataset[0]
    one_line(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_in_a_worker_reaches_the_user_as_one_line(workers: int, tmp_path: Path) -> None:
    dataset = open_dataset("folder", str(spoiled_folder(tmp_path)), 8, "all")
    with pytest.raises(BadImage) as caught:
        list(DataLoader(dataset, batch_size=5, num_workers=workers))
    shown = user_error_from_worker(caught.value)
    assert isinstance(shown, BadImage)
    assert str(shown) == "image 03.png: the file is empty (0 bytes)"
    assert user_error_from_worker(ValueError("x")) is None


# The order of training


def test_every_epoch_is_another_permutation() -> None:
    order = BatchOrder(11, seed=3)
    epochs = [order.indices(epoch * 11, 11) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert BatchOrder(11, seed=4).indices(0, 11) != epochs[0]


def test_the_order_is_a_function_of_the_position() -> None:
    whole = BatchOrder(7, seed=0).indices(0, 50)
    fresh = BatchOrder(7, seed=0)
    for start in (40, 3, 0, 13, 7, 6):
        assert fresh.indices(start, 10) == whole[start : start + 10]
    assert Counter(whole[:49]) == dict.fromkeys(range(7), 7)


def test_the_order_is_the_one_that_earlier_versions_gave() -> None:
    assert BatchOrder(10, seed=0).indices(0, 10) == [5, 3, 9, 0, 8, 4, 7, 6, 1, 2]


def steps(world_size: int, start: int, stop: int, global_batch: int = 8) -> list[list[int]]:
    """The global batches of a run with that many ranks, each with an order of its own."""
    per_rank = [
        RankBatches(
            BatchOrder(23, seed=5), start, stop, global_batch // world_size, rank, world_size
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in per_rank} == {(stop - start) // global_batch}
    return [list(chain(*parts)) for parts in zip(*per_rank, strict=True)]


def test_one_two_and_four_ranks_see_the_same_global_batches() -> None:
    alone = steps(1, 0, 96)
    assert steps(2, 0, 96) == alone
    assert steps(4, 0, 96) == alone
    assert sorted([*chain(*alone)][:23]) == list(range(23)) != [*chain(*alone)][:23]


def test_a_restart_with_another_world_size_continues_the_order() -> None:
    assert steps(2, 0, 40) + steps(4, 40, 64) + steps(1, 64, 96) == steps(1, 0, 96)


def test_rank_batches_drive_a_data_loader(tmp_path: Path) -> None:
    dataset = open_dataset("folder", str(three_kinds(tmp_path, 23)["zip"]), 8, "all")
    batches = RankBatches(BatchOrder(23, seed=5), 16, 48, 4, rank=1, world_size=2)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=2)
    seen = [batch.index.tolist() for batch in loader]
    assert seen == list(batches) and len(seen) == 4


def test_positions_that_make_no_whole_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number of global batches"):
        RankBatches(BatchOrder(5, 0), 0, 9, 2, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        RankBatches(BatchOrder(5, 0), 0, 8, 2, 2, 2)
    with pytest.raises(ValueError, match="at least one image"):
        BatchOrder(0, 0)
