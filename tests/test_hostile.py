"""Hostile and broken data: what a file, its name or its place may do to whoever reads it."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from PIL import EpsImagePlugin, Image
from test_data import bomb, encode, one_line, plain, write_folder, write_lmdb, write_zip

from dbae import DBAE, create_model, load_model
from dbae.checkpoint import read_weights, save_weights, to_released
from dbae.data import BadImage, binary_labels, decode, identity_groups, open_dataset, open_source
from dbae.data import sources as sources_module
from dbae.data.loader import in_batches, load_batches
from dbae.data.sources import FolderSource, LmdbSource
from dbae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def growth(work: Callable[[], str]) -> tuple[str, int]:
    """What `work` returns in a process of its own, and by how many MiB that one's memory grew.

    It may not take more than 1.5 GiB: beyond that it has none. A process that was killed says so.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 1536 * MIB,) * 2)
            said = work()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            os.write(writing, f"{peak // 1024} {said}".encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0 and answer, f"the reading process ended with {code} and said {answer!r}"
    grown, _, said = answer.partition(" ")
    return said, int(grown)


def refusal(work: Callable[[], object]) -> str:
    """The one line that refuses; what it returned where nothing did."""
    try:
        return f"accepted: {work()!r}"
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 1000
        return str(error)


# Images


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    piece = struct.pack(form, *values)
    return data[:at] + piece + data[at + len(piece) :]


def webp_bomb() -> bytes:
    """An animation's header with a canvas of 16383 × 16383."""
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    side = struct.pack("<I", 16382)[:3]
    at = data.index(b"VP8X") + 12
    return data[:at] + side + side + data[at + 6 :]


def tiff_bomb() -> bytes:
    data = encode(Image.new("L", (5, 7)), "TIFF")
    wide, high = struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 257, 4, 1)
    for tag in (wide, high):
        data = patched(data, data.index(tag) + 8, "<I", 60_000)
    return data


BOMBS = {
    "png": bomb(60_000),
    "gif": patched(encode(Image.new("P", (4, 4)), "GIF"), 6, "<HH", 65_535, 65_535),
    "bmp": patched(encode(Image.new("RGB", (4, 4)), "BMP"), 18, "<ii", 60_000, 60_000),
    "tiff": tiff_bomb(),
    "webp": webp_bomb(),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken(kind: str) -> None:
    said, grown = growth(lambda: refusal(lambda: decode(BOMBS[kind], "x.png")))
    assert "could be decompression bomb" in said
    assert grown < 50


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_taken(kind: str, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encode(red, kind, save_all=True, append_images=[blue], **lossless)
    assert decode(data, "x").getpixel((3, 3)) == (255, 0, 0)
    dataset = open_dataset("folder", str(write_folder(tmp_path, {"a.png": data})), 8, "all")
    assert dataset[0].image[:, 3, 3].tolist() == [255, 0, 0]


def test_a_phones_jpeg_of_several_pictures_is_a_jpeg() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert decode(encode(red, "MPO", save_all=True, append_images=[blue]), "x").size == (8, 8)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
FOREIGN = {"eps": EPS, "pdf": b"%PDF-1.4\n%%EOF\n", "svg": b"<svg xmlns='x'><script/></svg>"}


@pytest.mark.parametrize("kind", FOREIGN)
def test_documents_named_png_start_no_program(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript, trace = tmp_path / "gs", tmp_path / "started"
    ghostscript.write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadImage, match="not an image in one of the formats JPEG, PNG") as error:
        decode(FOREIGN[kind], "a.png")
    one_line(error)
    assert not trace.exists()


# Names and places


def test_links_that_lead_nowhere_or_in_circles_are_passed_over(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", {"a.png": plain(1)})
    for link, to in (("self.png", "self.png"), ("x", "y"), ("y", "x"), ("gone.png", "no.png")):
        (folder / link).symlink_to(to)
    (folder / "up").symlink_to("..")
    assert [*map(open_source(folder).name, range(len(open_source(folder))))] == ["a.png"]


def test_names_that_are_not_utf_8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    folder = os.fsencode(write_folder(tmp_path / "data", {"z.png": plain(9)}))
    for name, data in ((b"\xff\xfe.png", plain(3)), (b"\xe9.png", b"")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    dataset = open_dataset("folder", os.fsdecode(folder), 8, "all", "skip")
    assert [dataset.image_name(i) for i in range(3)] == ["z.png", "\\xe9.png", "\\xff\\xfe.png"]
    assert [int(dataset[i].image.max()) for i in range(3)] == [9, 3, 3]
    command = [sys.executable, str(ROOT / "scripts/make_lmdb.py"), folder, str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--workers", "0", "--bad_images", "skip"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"left out 1 unreadable images: \\xe9.png" in done.stdout


def test_a_name_cannot_break_the_line_that_tells_of_it(tmp_path: Path) -> None:
    name = "two\nlines, \x1b[2J, \u2028, \x85.png"
    dataset = open_dataset("folder", str(write_folder(tmp_path, {name: b""})), 8, "all")
    shown = f"image {name.encode('unicode_escape').decode()}: the file is empty (0 bytes)"
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            list(load_batches(dataset, [[0]], workers, False))
        assert str(error.value) == shown


def test_a_message_is_of_bounded_length(tmp_path: Path) -> None:
    line = refusal(lambda: open_dataset("folder", "x" * 10**6))
    assert line.startswith("xxx") and "expected a folder, zip or LMDB" in line


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/zero", "/dev/full/x"])
def test_a_place_that_cannot_be_is_one_line(path: str, tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, {"a.png": plain(1)}))
    attempts: list[Callable[[], object]] = [
        lambda: open_source(path),
        lambda: load_model(path),
        lambda: binary_labels(open_dataset("folder", folder, 8, "all"), path),
        lambda: open_dataset("lfw", path),
    ]
    for attempt in attempts:
        assert not refusal(attempt).startswith("accepted")


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[Path]:
    """The folder's content at a place that cannot be written to: a mount, where that may be."""
    place = folder.with_name("read-only")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    shutil.copytree(folder, place, dirs_exist_ok=True)
    try:
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        elif os.geteuid() == 0:
            pytest.skip("may neither mount nor be kept from writing")
        else:
            place.chmod(stat.S_IRUSR | stat.S_IXUSR)
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
        else:
            place.chmod(stat.S_IRWXU)


def test_data_on_a_read_only_mount_are_read_and_not_written(tmp_path: Path) -> None:
    files = {f"{i}.png": plain(i) for i in range(5)}
    folder = write_folder(tmp_path / "all", {f"folder/{n}": data for n, data in files.items()})
    write_zip(folder / "a.zip", files)
    write_lmdb(folder / "lmdb", "None-%07d", list(files.values()))
    with unwritable(folder) as place:
        for kind in ("folder", "a.zip", "lmdb", "lmdb/data.mdb"):
            dataset = open_dataset("folder", str(place / kind), 8, "all")
            batches = list(load_batches(dataset, in_batches(range(5), 5), 2, False))
            assert batches[0].images[:, 0, 0, 0].tolist() == list(range(5))
        command = [sys.executable, str(ROOT / "scripts/make_lmdb.py"), str(place / "folder")]
        for out in (place / "new", place / "lmdb"):
            done = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 2
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
            assert str(out) in done.stderr
        del dataset, batches


# Zip files


def edited(path: Path, name: str, field: int, form: str, value: int) -> Path:
    """Change a field (its offset in the local header) in both of a member's headers."""
    data = path.read_bytes()
    for magic, names, fields in ((b"PK\3\4", 30, 0), (b"PK\1\2", 46, 2)):
        at = data.index(name.encode(), data.index(magic)) - names
        while data[at : at + 4] != magic:
            at = data.index(name.encode(), at + names + 1) - names
        data = patched(data, at + fields + field, form, value)
    path.write_bytes(data)
    return path


def with_members(path: Path) -> Path:
    """b.png of 32 MiB of zeros, compressed to 32 KiB; a.png and c.png that can be read."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in (("a.png", plain(1)), ("b.png", bytes(32 * MIB)), ("c.png", plain(3))):
            archive.writestr(name, data)
    return path


def recompressed(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, data in (("a.png", plain(1)), ("b.png", bytes(32 * MIB)), ("c.png", plain(3))):
            method = zipfile.ZIP_BZIP2 if name == "b.png" else zipfile.ZIP_STORED
            archive.writestr(name, data, method)
    return path


BAD_MEMBERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "wrong check sum": (lambda p: edited(with_members(p), "b.png", 14, "<I", 1), "CRC-32"),
    "encrypted": (lambda p: edited(with_members(p), "b.png", 6, "<H", 1), "encrypted"),
    "4 GB": (lambda p: edited(with_members(p), "b.png", 22, "<I", 2**32 - 2), "more than 512 MiB"),
    "a smaller size": (lambda p: edited(with_members(p), "b.png", 22, "<I", 99), "CRC-32"),
    "an unknown method": (lambda p: edited(with_members(p), "b.png", 8, "<H", 77), "compression"),
    "a method without bounds": (recompressed, "compression 12, neither stored nor deflate"),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_bad_zip_member_is_a_bad_image_and_takes_no_memory(kind: str, tmp_path: Path) -> None:
    make, words = BAD_MEMBERS[kind]
    path = make(tmp_path / "a.zip")
    said, grown = growth(lambda: refusal(lambda: open_source(path).read(1)))
    assert "image b.png: cannot be read from the zip" in said and words in said
    # The member's own 32 MiB are unpacked where only the check sum at their end tells.
    assert grown < (100 if kind == "wrong check sum" else 20)
    dataset = open_dataset("folder", str(path), 8, "all", "skip")
    for workers in (0, 2):
        batches = list(load_batches(dataset, [[0, 1], [2]], workers, False))
        levels = torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist()
        assert levels == [1, 3, 3] and [batch.replaced for batch in batches] == [1, 0]


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """600 MiB in 600 KiB, honestly declared."""
    path = tmp_path / "a.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w") as member,
    ):
        for _ in range(150):
            member.write(bytes(4 * MIB))
    said, grown = growth(lambda: refusal(lambda: open_source(path).read(0)))
    assert "more than 512 MiB" in said and grown < 20


def test_zip_members_that_lead_elsewhere_are_passed_over(tmp_path: Path) -> None:
    names = ["../up.png", "a/../../up.png", "/etc/abs.png", "//x/y.png", "in/a.png", "nul_.txt.png"]
    path = write_zip(tmp_path / "a.zip", dict.fromkeys(names, plain(1)))
    path.write_bytes(path.read_bytes().replace(b"nul_.txt.png", b"nul\0.txt.png"))
    before = sorted(p for p in tmp_path.rglob("*"))
    dataset = open_dataset("folder", str(path), 8, "all")
    assert [dataset.image_name(i) for i in range(len(dataset))] == ["in/a.png"]
    assert int(dataset[0].image.max()) == 1
    assert open_dataset("folder", str(path), 8, "train").describe()["n"] == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before
    outside = write_zip(tmp_path / "b.zip", {"/etc/abs.png": plain(1), "../b.png": plain(1)})
    with pytest.raises(UserError, match="holds no images"):
        open_source(outside)


@pytest.mark.parametrize("damage", ["check sum", "utf-16"])
def test_a_damaged_text_in_a_zip_is_told(damage: str, tmp_path: Path) -> None:
    text = "a.png Ann\n".encode("utf-16" if damage == "utf-16" else "utf-8")
    path = write_zip(tmp_path / "a.zip", {"a.png": plain(1), "identity.txt": text})
    if damage == "check sum":
        path.write_bytes(path.read_bytes().replace(text, b"b" + text[1:]))
    with pytest.raises(UserError, match=r"identity\.txt in the zip .*a\.zip") as error:
        identity_groups(open_source(path))
    assert ("CRC" if damage == "check sum" else "UTF-16") in one_line(error)


def test_a_damaged_member_does_not_hide_that_the_zip_is_gone(tmp_path: Path) -> None:
    """Skipping every image of a file that vanished would be silence."""
    path = write_zip(tmp_path / "a.zip", {"a.png": plain(1), "b.png": plain(2)})
    dataset = open_dataset("folder", str(path), 8, "all", "skip")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.zip is not a complete zip") as error:
        pickle.loads(pickle.dumps(dataset))[0]  # as a worker gets it
    assert not isinstance(error.value, BadImage)


# Files that are too large


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def test_a_file_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a.png": plain(1)})
    sparse(folder / "b.png", 10**10)
    sparse(folder / "list_attr.txt", 10**10)
    source = FolderSource(str(folder))
    for work in (
        lambda: source.read(1),
        lambda: source.sidecar("list_attr.txt"),
        lambda: binary_labels(open_dataset("folder", str(folder), 8, "all")),
    ):
        said, grown = growth(lambda work=work: refusal(work))  # type: ignore[misc]
        assert "it has 10000000000 bytes, more than 512 MiB" in said and grown < 20


@pytest.mark.parametrize("place", ["count", "header", "row", "value"])
def test_a_line_of_a_hundred_megabytes_is_told_in_few_words(place: str, tmp_path: Path) -> None:
    parts = {"count": b"1", "header": b"A", "row": b"a.png", "value": b"1"}
    parts[place] = {"count": b"1", "header": b"B", "row": b"r", "value": b"v"}[place] * 10**8
    text = b"%(count)b\n%(header)b\n%(row)b %(value)b\n" % {k.encode(): v for k, v in parts.items()}
    write_folder(tmp_path, {"a.png": plain(1), "list_attr.txt": text})
    dataset = open_dataset("folder", str(tmp_path), 8, "all")
    said, _ = growth(lambda: refusal(lambda: binary_labels(dataset).values.tolist()))
    expected = {
        "count": "line 1: found '1111",
        "header": "accepted: [[1.0]]",
        "row": "has no row for image a.png",
        "value": "line 3: could not convert string to float: 'vvvv",
    }
    assert expected[place] in said


# Texts


def test_a_text_in_utf_16_is_told(tmp_path: Path) -> None:
    text = "1\nA\na.png 1\n".encode("utf-16")
    write_folder(tmp_path, {"a.png": plain(1), "list_attr.txt": text})
    with pytest.raises(UserError, match="UTF-16") as error:
        binary_labels(open_dataset("folder", str(tmp_path), 8, "all"))
    assert "list_attr.txt" in one_line(error)


def test_a_number_of_five_thousand_digits_is_no_number(tmp_path: Path) -> None:
    text = b"9" * 5000 + b"\nA\na.png 1\n"
    write_folder(tmp_path, {"a.png": plain(1), "list_attr.txt": text})
    with pytest.raises(
        UserError, match=r"line 1: found '999.*expected the number of rows"
    ) as error:
        binary_labels(open_dataset("folder", str(tmp_path), 8, "all"))
    one_line(error)


def test_rows_that_name_other_places_open_nothing(tmp_path: Path) -> None:
    """`..` in a row is a name like any other; it may stand for an image of its own name alone."""
    data = write_folder(tmp_path / "data", {"a.png": plain(1), "b.png": plain(2)})
    os.mkfifo(tmp_path / "c.png")  # to open it would wait for ever
    (data / "list_attr.txt").write_text("2\nA\n../c.png 1\n/etc/passwd 1\n")
    with pytest.raises(UserError, match=r"no row for image a\.png, and for 2 of 2") as error:
        binary_labels(open_dataset("folder", str(data), 8, "all"))
    one_line(error)


def test_people_whose_names_look_like_paths_are_people(tmp_path: Path) -> None:
    text = b"a.png /etc/passwd\nb.png ../../x\nc.png y\n"
    files = {f"{name}.png": plain(1) for name in "abc"}
    path = write_folder(tmp_path, {**files, "identity.txt": text})
    assert identity_groups(open_source(path)) == ["/etc/passwd", "../../x", "y"]
    assert len(open_dataset("folder", str(path), 8, "train")) >= 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("../../etc\t1", "found '../../etc 1'"),
        ("..\t1", "found '.. 1'"),
        ("/etc\t1", "found '/etc 1'"),
        (f"Ann\t{10**12}", "promises 1000000000000 images"),
        (f"Ann\t{'9' * 5000}", "expected a name and the number of images"),
        ("A\0nn\t1", "NUL bytes"),
    ],
)
def test_lfws_lists_lead_nowhere_and_promise_no_masses(
    line: str, words: str, tmp_path: Path
) -> None:
    files = {
        "lfw_funneled/Bo/Bo_0001.jpg": plain(1),
        "peopleDevTrain.txt": f"1\n{line}\n".encode(),
        "peopleDevTest.txt": b"1\nBo\t1\n",
    }
    write_folder(tmp_path, files)
    said, grown = growth(lambda: refusal(lambda: open_dataset("lfw", str(tmp_path))))
    assert words in said and "peopleDevTrain.txt" in said and grown < 20


# LMDB


def put(path: Path, **records: bytes) -> Path:
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode().replace(b"_", b"-"), value)
    return path


def test_lmdb_records_that_are_no_images_or_missing_are_bad_images(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path, "256-%05d", [plain(i, (8 + i, 9)) for i in range(8)])
    put(path, **{"256_00002": b"some text", "256_00003": b""})
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"256-00005")
    source = open_source(path)
    for i, reason in ((2, "not an image"), (3, "empty"), (5, "no such key")):
        with pytest.raises(BadImage, match=f"image 256-0000{i}: .*{reason}") as error:
            decode(source.read(i), source.name(i))
        one_line(error)
    dataset = open_dataset("folder", str(path), 8, "all", "skip")
    found = []
    for workers in (0, 2):
        batches = list(load_batches(dataset, in_batches(range(8), 3), workers, False))
        found.append(torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist())
        assert [batch.replaced for batch in batches] == [1, 2, 0]
    assert found[0] == found[1] == [0, 1, 4, 4, 4, 6, 6, 7]


@pytest.mark.parametrize("length", [b"9" * 5000, b"1" + b"0" * 19, b"1000000000000", b"9", b"\xff"])
def test_a_length_that_cannot_be_is_one_line(length: bytes, tmp_path: Path) -> None:
    path = write_lmdb(tmp_path, "256-%05d", [plain(0)] * 4, length)
    said, grown = growth(lambda: refusal(lambda: open_source(path)))
    assert "key `length`" in said and grown < 20


def test_a_smaller_length_counts(tmp_path: Path) -> None:
    source = open_source(write_lmdb(tmp_path, "256-%05d", [plain(i) for i in range(9)], b"4"))
    assert len(source) == 4 and source.read(3) == plain(3)


def test_a_key_of_any_bytes_is_found_and_printable(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"\xffset-00000", plain(7))
        transaction.put(b"length", b"1")
    source = open_source(tmp_path)
    assert source.read(0) == plain(7) and source.name(0) == "\\xffset-00000"


def test_a_key_leads_to_no_file_elsewhere(tmp_path: Path) -> None:
    """Keys are names, and names of folders are asked for their identity.txt."""
    (tmp_path / "identity.txt").write_text("x-00000 Ann\n")
    path = write_lmdb(tmp_path / "deep" / "db", "256-%05d", [plain(0)])
    put(path, **{f"{tmp_path}/x_00000": plain(1), "../../x_00000": plain(1)})
    assert identity_groups(open_source(path)) == ["256-00000"]


def test_a_record_that_is_too_large_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_lmdb(tmp_path, "256-%05d", [plain(0), bytes(5000)]))
    monkeypatch.setattr(sources_module, "_MOST_BYTES", 4000)
    assert source.read(0) == plain(0)
    with pytest.raises(BadImage, match=r"256-00001.*5000 bytes") as error:
        source.read(1)
    one_line(error)


def damaged_lmdb(path: Path, damage: Callable[[bytearray, int], None]) -> Path:
    """A database of some 50 pages, of which the root of the tree was changed."""
    records = [random.Random(i).randbytes(600) for i in range(300)]
    file = write_lmdb(path, "256-%05d", records) / "data.mdb"
    data = bytearray(file.read_bytes())
    branches = [at for at in range(8192, len(data), 4096) if data[at + 10] == 1]
    damage(data, branches[-1])
    file.write_bytes(data)
    return path


def set_at(offset: int, form: str, value: int) -> Callable[[bytearray, int], None]:
    return lambda data, page: struct.pack_into(form, data, page + offset, value)


def in_circles(data: bytearray, page: int) -> None:
    """Every child of the root is the root."""
    (lower,) = struct.unpack_from("<H", data, page + 12)
    for pointer in range(16, lower, 2):
        (node,) = struct.unpack_from("<H", data, page + pointer)
        struct.pack_into("<H", data, page + node, page // 4096)


DAMAGES = {
    "a child far outside": lambda data, page: struct.pack_into(
        "<HH", data, page + struct.unpack_from("<H", data, page + 16)[0], 0xFFFF, 0x7F
    ),
    "nodes outside the page": set_at(16, "<H", 0xFFF0),
    "too many nodes": set_at(12, "<H", 0xFFFE),
    "a leaf that is none": set_at(10, "<H", 2),
    "circles": in_circles,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_lmdb_is_refused_and_kills_nobody(kind: str, tmp_path: Path) -> None:
    path = damaged_lmdb(tmp_path, DAMAGES[kind])

    def read_all() -> str:
        source = LmdbSource(str(path))
        return "".join(refusal(lambda i=i: source.read(i)) for i in range(300))  # type: ignore[misc]

    said, grown = growth(lambda: refusal(read_all))
    assert "is damaged or cut short" in said and str(tmp_path) in said
    assert grown < 50
    with pytest.raises(UserError, match="is damaged or cut short") as error:  # nor is it written to
        from dbae.data.lmdb_writer import LmdbConfig
        from dbae.data.lmdb_writer import write_lmdb as write

        write(str(write_folder(tmp_path / "in", {"a.png": plain(0)})), str(path), LmdbConfig())
    one_line(error)


# Checkpoints


@pytest.fixture(scope="module")
def small() -> DBAE:
    return create_model("demo", latent_dim=4)


def repacked(path: Path, method: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, data in members:
            archive.writestr(member.filename, data)


def test_a_packed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(80 * MIB // 4)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)
    said, grown = growth(lambda: refusal(lambda: load_model(path)))
    assert "not a readable PyTorch checkpoint" in said and grown < 40


def test_one_wrong_bit_in_a_checkpoint_is_found(small: DBAE, tmp_path: Path) -> None:
    """torch itself would load it without a word."""
    path = tmp_path / "a.pt"
    save_weights(path, small)
    data = bytearray(path.read_bytes())
    weights = small.unet.label_emb.weight.detach().numpy().tobytes()
    data[data.index(weights) + 9] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(UserError, match=r"a\.pt is not a readable .*BadZipFile") as error:
        load_model(path)
    one_line(error)


def changed(small: DBAE, **fields: Any) -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict(to_released(small.state_dict()))
    config = {**vars(small.config), **fields}
    state._metadata = {"dbae": {"model": config}}  # type: ignore[attr-defined]
    return state


def with_metadata(small: DBAE, metadata: Any) -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict(to_released(small.state_dict()))
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


CONFIGURATIONS: dict[str, Callable[[DBAE], Any]] = {
    "a text for a number": lambda model: changed(model, latent_dim="4"),
    "no blocks, by half": lambda model: changed(model, num_res_blocks=1.5),
    "a hundred million channels": lambda model: changed(model, num_channels=64 * 10**8),
    "more than fits a word": lambda model: changed(model, num_channels=64 * 10**30),
    "a billion blocks": lambda model: changed(model, num_res_blocks=10**9),
    "a billion numbers in z": lambda model: changed(model, latent_dim=10**9),
    "a list for the sizes": lambda model: changed(model, image_size=[32]),
    "not finite": lambda model: changed(model, sigma_data=float("nan")),
    "a number for all": lambda model: with_metadata(model, {"dbae": 5}),
    "a list for all": lambda model: with_metadata(model, [1]),
    "data of another kind": lambda model: with_metadata(
        model, {"dbae": {"model": vars(model.config), "data": "x"}}
    ),
    "no model": lambda model: with_metadata(model, {"dbae": {"x": 1}}),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_hostile_configuration_in_a_checkpoint_is_one_line(
    kind: str, small: DBAE, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save(CONFIGURATIONS[kind](small), path)
    said, grown = growth(lambda: refusal(lambda: load_model(path).config))
    if kind == "a list for all":  # then it is a released file, whose shapes speak
        assert said.startswith("accepted")
    else:
        assert not said.startswith("accepted")
    assert grown < 300


TENSORS: dict[str, Callable[[], Any]] = {
    "a number repeated without end": lambda: torch.zeros(1).expand(10**6, 10**6),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "no tensor": lambda: [1.0],
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_plain_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    torch.save({"a": TENSORS[kind]()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="expected a dict of tensors by name") as error:
        read_weights(tmp_path / "a.pt")
    one_line(error)


def test_a_released_file_cannot_promise_more_than_it_holds(small: DBAE, tmp_path: Path) -> None:
    """An empty tensor may have any shape, from which the architecture would be read."""
    state = dict(to_released(small.state_dict()))
    state["input_blocks.0.0.weight"] = torch.zeros(64 * 10**6, 0)
    torch.save(state, tmp_path / "a.pt")
    said, grown = growth(lambda: refusal(lambda: load_model(tmp_path / "a.pt")))
    assert not said.startswith("accepted") and grown < 300


def test_a_deep_config_json_is_one_line(small: DBAE, tmp_path: Path) -> None:
    torch.save(dict(to_released(small.state_dict())), tmp_path / "a.pt")
    for content in (b"[" * 10**6, b"\xff\xfe", b'{"model": 5}', b"[1, 2]", b"null"):
        (tmp_path / "config.json").write_bytes(content)
        said, _ = growth(lambda: refusal(lambda: load_model(tmp_path / "a.pt")))
        assert "config" in said and not said.startswith("accepted"), content[:20]


def test_a_large_model_that_is_there_is_loaded(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.pt", create_model("demo", num_res_blocks=9))
    assert load_model(tmp_path / "a.pt").config.num_res_blocks == 9


def test_the_child_process_of_these_tests_tells_when_it_dies() -> None:
    """A reader that crashes must not pass for one that refuses."""
    with pytest.raises(AssertionError, match="ended with -9"):
        growth(lambda: str(os.kill(os.getpid(), signal.SIGKILL)))
    said, grown = growth(lambda: str(len(bytearray(b"x" * 100 * MIB))))
    assert said == str(100 * MIB) and grown >= 100
