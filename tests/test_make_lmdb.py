"""scripts/make_lmdb.py as a user runs it; its databases as another program reads them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from dbae.data import identity_groups, lmdb_writer, open_dataset, open_source
from dbae.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_lmdb.py"


def picture(seed: int, size: tuple[int, int] = (40, 30), format: str = "PNG") -> bytes:
    coarse = Image.frombytes("RGB", (4, 4), random.Random(seed).randbytes(48))
    out = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


def folder_of(path: Path, count: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"bild {i:04d}.png").write_bytes(picture(i, size))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def make(*arguments: object) -> str:
    """What the script prints; in this process, as starting torch takes seconds."""
    main = runpy.run_path(str(SCRIPT))["main"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(list(map(str, arguments))) == 0
    return printed.getvalue()


def refused(*arguments: object) -> str:
    """The one line that the script says when it refuses."""
    with pytest.raises(UserError) as error:
        make(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_as_others_do(path: Path) -> dict[bytes, bytes]:
    """Every record, with nothing but lmdb and what DiffAE's readers assume."""
    with (
        lmdb.open(str(path), readonly=True, lock=False, readahead=False) as environment,
        environment.begin() as transaction,
    ):
        return {bytes(key): bytes(value) for key, value in transaction.cursor()}


def test_resized_images_are_written_in_diffaes_layout(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "meine bilder ü", 40)
    out = tmp_path / "aus gabe é"
    flags = ["--size", 16, "--format", "png", "--workers", 2]
    done = subprocess.run(
        command(source, out, *flags), capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "wrote and verified 40 images, keys 16-00000 to 16-00039" in done.stdout
    records = read_as_others_do(out)
    assert records.pop(b"length") == b"40"
    assert sorted(records) == [f"16-{i:05d}".encode() for i in range(40)]
    for i in (0, 39):
        found = np.asarray(Image.open(io.BytesIO(records[f"16-{i:05d}".encode()])))
        centre = Image.open(io.BytesIO(picture(i))).crop((5, 0, 35, 30))
        expected = np.asarray(centre.resize((16, 16), Image.Resampling.BILINEAR))
        assert np.array_equal(found, expected)
    ours = open_dataset("folder", str(out), 16, "all")
    assert len(ours) == 40 and ours.image_name(39) == "16-00039"


def test_size_stores_what_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "in", 5, (40, 32))
    make(source, tmp_path / "out", "--size", 16, "--format", "png", "--workers", 0)
    plain = open_dataset("folder", str(source), 16, "all")
    expected = [plain[i].image for i in range(5)]
    for module, name in ((Image.Image, "resize"), (torch.nn.functional, "interpolate")):
        monkeypatch.setattr(module, name, None)  # nothing may be resized from here on
    stored = open_dataset("folder", str(tmp_path / "out"), 16, "all")
    assert all(torch.equal(stored[i].image, expected[i]) for i in range(5))


def test_size_0_keeps_the_encoded_bytes_of_a_zip(tmp_path: Path) -> None:
    files = {
        f"in/{i}.{kind.lower()}": picture(i, format=kind) for i, kind in enumerate(("PNG", "WEBP"))
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    make(tmp_path / "a.zip", tmp_path / "out", "--digits", 7, "--workers", 0)
    records = read_as_others_do(tmp_path / "out")
    expected = {f"None-{i:07d}".encode(): data for i, data in enumerate(files.values())}
    assert records == {**expected, b"length": b"2"}


@pytest.mark.parametrize(("format", "pillow"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_format_quality_fit_and_prefix_are_obeyed(format: str, pillow: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 1)
    sizes = []
    for quality in (30, 100):
        flags = ["--format", format, "--quality", quality, "--prefix", "my.set", "--fit", "stretch"]
        out = tmp_path / f"q{quality}"
        make(source, out, "--size", 24, "--workers", 0, *flags)
        data = read_as_others_do(out)[b"my.set-00000"]
        image = Image.open(io.BytesIO(data))
        assert image.format == pillow and image.size == (24, 24)
        sizes.append(len(data))
    assert sizes[0] < sizes[1]
    whole = Image.open(io.BytesIO(picture(0))).resize((24, 24), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).mean() < 4


def progress(path: Path) -> int:
    """How many images a run that is still going has committed."""
    try:
        with (
            lmdb.open(str(path), readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            assert transaction.get(b"length") is None
            return int(json.loads(transaction.get(b"make_lmdb") or b'{"done": 0}')["done"])
    except lmdb.Error:  # not there yet
        return 0


def is_running(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "zombie" not in status.read_text()


def test_a_killed_run_continues_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 300)
    flags = ["--size", 256, "--format", "png", "--workers", 1]
    whole, out = tmp_path / "whole", tmp_path / "killed é"
    running = subprocess.Popen(command(source, out, *flags), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 40
    while progress(out) < 64 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert children
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, children)), "the killed run left its workers behind"
    done = progress(out)
    assert 64 <= done < 300

    with pytest.raises(UserError, match="no key `length`"):  # no reader takes it for complete
        open_source(out)
    assert "begun with other quality" in refused(
        source, out, "--size", 256, "--format", "jpg", "--quality", 50, "--workers", 1
    ).replace("format, ", "")
    (source / "one more.png").write_bytes(picture(7))
    assert "begun with other images" in refused(source, out, *flags)
    (source / "one more.png").unlink()
    assert progress(out) == done

    assert f"continued at image {done} of an interrupted run" in make(source, out, *flags)
    make(source, whole, *flags)
    records = read_as_others_do(out)
    assert records == read_as_others_do(whole)
    assert records[b"length"] == b"300" and len(records) == 301


def test_a_killed_worker_is_one_line_and_the_same_command_continues(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 300)
    flags = ["--size", 256, "--format", "png", "--workers", 2]
    out = tmp_path / "out"
    running = subprocess.Popen(command(source, out, *flags), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 40
    while progress(out) < 64 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)  # as the kernel does when memory runs out
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 2
    assert said.startswith("error: an encoding process was lost (") and said.count("\n") == 1, said
    assert "run the same command again, it continues" in said and "--workers" in said
    done = progress(out)
    assert 64 <= done < 300
    assert f"continued at image {done} of an interrupted run" in make(source, out, *flags)
    assert read_as_others_do(out)[b"length"] == b"300"


def test_a_source_that_vanishes_meanwhile_is_one_line(tmp_path: Path) -> None:
    """A worker opens the zip anew; what it says must reach the user without its traceback."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", picture(0))
    source = open_source(tmp_path / "a.zip")
    (tmp_path / "a.zip").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lmdb_writer, "open_source", lambda _: source)
        line = refused(tmp_path / "a.zip", tmp_path / "out", "--workers", 1, "--bad_images", "skip")
    assert line.startswith(f"{tmp_path}/a.zip is not a complete zip file")


def test_an_unfinished_database_that_was_damaged_is_not_continued(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 40)
    (source / "bild 0039.png").write_bytes(b"")
    flags = ["--workers", 0]
    assert "bild 0039.png" in refused(source, tmp_path / "out", *flags)
    assert progress(tmp_path / "out") == 32
    with lmdb.open(str(tmp_path / "out")) as environment, environment.begin(write=True) as writer:
        writer.put(b"make_lmdb", b"{")
    assert "does not say how far it got" in refused(source, tmp_path / "out", *flags)
    os.truncate(tmp_path / "out" / "data.mdb", 3 * 4096)
    assert "damaged or cut short" in refused(source, tmp_path / "out", *flags)


def test_a_finished_database_is_not_written_over(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 3)
    make(source, tmp_path / "out", "--workers", 0)
    before = (tmp_path / "out" / "data.mdb").read_bytes()
    assert "finished LMDB" in refused(source, tmp_path / "out", "--workers", 0)
    assert (tmp_path / "out" / "data.mdb").read_bytes() == before


def test_a_foreign_database_is_not_written_over(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "out")) as environment, environment.begin(write=True) as writer:
        writer.put(b"something", b"else")
    assert "another database" in refused(folder_of(tmp_path / "in", 3), tmp_path / "out")
    assert read_as_others_do(tmp_path / "out") == {b"something": b"else"}


def test_an_unreadable_image_stops_the_run_or_is_left_out(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 6)
    (source / "bild 0002.png").write_bytes(b"")
    line = refused(source, tmp_path / "a", "--size", 8, "--workers", 1)
    assert "bild 0002.png" in line and "empty" in line and "--bad_images skip" in line
    flags = ["--size", 8, "--format", "png", "--workers", 1, "--bad_images", "skip"]
    printed = make(source, tmp_path / "b", *flags)
    assert "left out 1 unreadable images: bild 0002.png" in printed
    records = read_as_others_do(tmp_path / "b")
    assert records[b"length"] == b"5" and len(records) == 6
    third = Image.open(io.BytesIO(records[b"8-00002"]))
    expected = Image.open(io.BytesIO(picture(3))).crop((5, 0, 35, 30)).resize(
        (8, 8), Image.Resampling.BILINEAR
    )  # fmt: skip
    assert np.array_equal(np.asarray(third), np.asarray(expected))


def test_nothing_readable_leaves_no_complete_database(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no")
    line = refused(tmp_path / "in", tmp_path / "out", "--bad_images", "skip", "--workers", 0)
    assert "none of the images could be read" in line
    assert b"length" not in read_as_others_do(tmp_path / "out")


def test_people_are_kept_apart_in_the_database_too(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 30)
    (source / "bild 0001.png").write_bytes(b"")  # left out: keys and file numbers part ways
    lines = [f"bild {i:04d}.png Person {i // 4}\n" for i in range(30)]
    (source / "identity.txt").write_text("".join(lines))
    out = tmp_path / "out"
    make(source, out, "--size", 8, "--workers", 0, "--bad_images", "skip")
    expected = [f"Person {i // 4}" for i in range(30) if i != 1]
    assert identity_groups(open_source(out)) == expected
    train = [open_dataset("folder", str(path), 8, "train") for path in (source, out)]
    from_folder = {int(train[0].image_name(i)[5:9]) // 4 for i in range(len(train[0]))}
    from_lmdb = {int(expected[train[1].source_index(i)][7:]) for i in range(len(train[1]))}
    assert from_folder == from_lmdb


def test_a_full_disk_is_one_line_and_the_run_continues_later(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 96)
    flags = ["--size", 96, "--format", "png", "--workers", 0]

    def little_room() -> None:  # a limit on the size of files stands for the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    done = subprocess.run(
        command(source, tmp_path / "out", *flags),
        capture_output=True, text=True, preexec_fn=little_room, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "of disk are free); make room there" in done.stderr
    assert 0 < progress(tmp_path / "out") < 96
    assert "continued at image" in make(source, tmp_path / "out", *flags)
    assert read_as_others_do(tmp_path / "out")[b"length"] == b"96"


def test_the_map_grows_with_the_data(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = Image.frombytes("RGB", (1500, 1500), random.Random(0).randbytes(3 * 1500 * 1500))
    noise.save(tmp_path / "in" / "0.bmp")
    for i in range(1, 12):
        os.link(tmp_path / "in" / "0.bmp", tmp_path / "in" / f"{i}.bmp")
    make(tmp_path / "in", tmp_path / "out", "--workers", 0)
    assert os.path.getsize(tmp_path / "out" / "data.mdb") > 1 << 26
    source = open_source(tmp_path / "out")
    assert source.read(11) == (tmp_path / "in" / "0.bmp").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "-1"], "--size -1"),
        (["--quality", "50"], "need --size"),
        (["--size", "8", "--quality", "0"], "1 to 100"),
        (["--size", "8", "--format", "png", "--quality", "9"], "no meaning"),
        (["--size", "8", "--format", "gif"], "gif"),
        (["--prefix", "two words"], "--prefix"),
        (["--digits", "0"], "--digits"),
        (["--nosuch", "1"], "--nosuch"),
    ],
)
def test_a_wrong_flag_is_one_line_and_writes_nothing(
    flags: list[str], words: str, tmp_path: Path
) -> None:
    assert words in refused(folder_of(tmp_path / "in", 2), tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_wrong_source_or_place_is_one_line(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere", tmp_path / "out")
    source = folder_of(tmp_path / "in", 2)
    assert "the source itself" in refused(source, source)
    (tmp_path / "file").write_text("x")
    assert "cannot make the folder" in refused(source, tmp_path / "file")
