"""Readers fed with arbitrary bytes: they answer or raise `UserError` in one line, nothing else.

Each example of files is read in a process of its own with little memory, so that a crash is seen.
What is tried is the same each time. `DBAE_FUZZ=50 pytest tests/test_fuzz.py` tries fifty times as
much, another time something else; hypothesis then says how to repeat what it found.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import runpy
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import encode, plain, write_folder, write_lmdb, write_zip
from test_hostile import growth, refusal
from test_labels import attributes, celeba_form, lfw

from dbae import create_model, load_model
from dbae.checkpoint import read_weights, save_weights
from dbae.data import (
    binary_labels,
    decode,
    identity_groups,
    open_dataset,
    open_source,
    real_labels,
    transform,
)
from dbae.errors import UserError
from dbae.evaluation import command, reproduce
from dbae.evaluation.classifier import AttributeClassifier, load_classifier, save_classifier

ROOT = Path(__file__).resolve().parents[1]
TIMES = int(os.environ.get("DBAE_FUZZ", "1"))
MOST_MIB = 300


def examples(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def check(read: Callable[[], object]) -> None:
    """Read in another process; fail unless it answers, or refuses in one line, in little memory."""
    _, grown = growth(lambda: refusal(read)[:2000])
    assert grown < MOST_MIB, f"{grown} MiB were taken"


@st.composite
def mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a few changes: flipped bits, cuts, pieces moved, repeated or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 40, 500, 4096]))
        kind = draw(st.integers(0, 6))
        if kind <= 1 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            start = draw(st.integers(0, max(0, len(data) - 1)))
            data[at : at + length] = data[start : start + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * draw(st.integers(1, 3))
        elif kind == 5:
            data[at : at + length] = draw(st.binary(max_size=16))
        else:
            value = draw(st.sampled_from([0, 1, 127, 128, 255]))
            data[at : at + length] = bytes([value]) * min(length, len(data) - at)
    return bytes(data)


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[Path]:
    """The folder that examples are written to."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# Images

PICTURE = Image.effect_noise((12, 9), 60).convert("RGB")
IMAGES = [
    *(encode(PICTURE, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")),
    encode(PICTURE.convert("RGBA"), "WEBP", lossless=True),
    encode(PICTURE.convert("P"), "PNG", transparency=bytes([0, 9])),
    encode(PICTURE.convert("I;16"), "TIFF", compression="tiff_lzw"),
    encode(PICTURE.convert("CMYK"), "JPEG", exif=Image.Exif()),
    encode(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(9)]),
]


@given(st.sampled_from(IMAGES).flatmap(mutations) | st.binary(max_size=200))
@examples(120)
def test_any_bytes_as_an_image(data: bytes) -> None:
    check(lambda: transform(decode(data, "x.png"), 8, fit="enlarge").sum())


# Sources


def read_all(path: Path) -> str:
    """Do with a source all that the package does; BadImage is what each image may be."""
    source = open_source(path)
    open_dataset("folder", str(path), 8, "train", "skip").describe()
    people = identity_groups(source)
    last = min(len(source), 50)
    return str([refusal(lambda i=i: len(source.read(i))) for i in range(last)] + people[:3])  # type: ignore[misc]


def whole_zip(method: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name in ("train/a.png", "train/b ä.png", "test/c.jpg"):
            archive.writestr(name, plain(3))
        archive.writestr("identity.txt", "a.png Ann\nb ä.png Bo\n")
    return content.getvalue()


@given(
    st.sampled_from([whole_zip(zipfile.ZIP_STORED), whole_zip(zipfile.ZIP_DEFLATED)])
    .flatmap(mutations)
    .flatmap(lambda data: st.sampled_from([data, b"PK" + data]))
)
@examples(80)
def test_any_bytes_as_a_zip(place: Path, data: bytes) -> None:
    (place / "a.zip").write_bytes(data)
    check(lambda: read_all(place / "a.zip"))


NAME = st.lists(st.sampled_from(["/", "..", "a", ".png", "é", "\n", "\\", "train"]), min_size=1)


@given(st.lists(NAME.map("".join), max_size=4), st.lists(NAME.map("".join), max_size=3))
@examples(60)
def test_any_names_in_a_zip(place: Path, names: list[str], people: list[str]) -> None:
    lines = "".join(f"{name}.png {person}\n" for name, person in zip(names, people, strict=False))
    files = {**{f"{name}.png": plain(1) for name in names}, "identity.txt": lines.encode()}
    path = write_zip(place / "b.zip", files)
    check(lambda: read_all(path))


@functools.cache
def whole_lmdb(count: int, least: int, most: int) -> bytes:
    """Records of these sizes: within a page, or with pages of their own."""
    dice = random.Random(count)
    with tempfile.TemporaryDirectory() as folder:
        records = [dice.randbytes(dice.randrange(least, most)) for _ in range(count)]
        path = write_lmdb(Path(folder), "256-%05d", records)
        with lmdb.open(folder, readonly=True, lock=False) as environment:
            used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        return (path / "data.mdb").read_bytes()[:used]


@st.composite
def damaged_pages(draw: st.DrawFn) -> bytes:
    """A database in which a page's header or its table of nodes was changed, where it matters."""
    sizes = draw(st.sampled_from([(300, 10, 900), (60, 3000, 9000), (3, 10, 50)]))
    whole = whole_lmdb(*sizes)
    if draw(st.booleans()):
        return draw(mutations(whole))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = 4096 * draw(st.integers(0, len(data) // 4096 - 1)) + draw(st.integers(0, 160))
        data[at] = draw(st.sampled_from([0, 1, 2, 255]) | st.integers(0, 255))
    return bytes(data)


@given(damaged_pages())
@examples(120)
def test_any_bytes_as_an_lmdb(place: Path, data: bytes) -> None:
    (place / "a.mdb").write_bytes(data)
    check(lambda: read_all(place / "a.mdb"))


@given(st.dictionaries(st.binary(min_size=1, max_size=40), st.binary(max_size=60), max_size=6))
@examples(30)
def test_any_keys_and_values_in_an_lmdb(records: dict[bytes, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_lmdb(Path(folder), "256-%05d", [plain(1), plain(2)])
        with lmdb.open(folder) as environment, environment.begin(write=True) as transaction:
            for key, value in records.items():
                transaction.put(key, value)
                transaction.put(key[:8] + b"-0001", value)
        check(lambda: read_all(Path(folder)))


# Texts

CELEBA = celeba_form(["a.png", "b.png", "c d.png"]).encode()
PIECES = st.sampled_from(
    ["a.png", "b.png", "-1", "1", "0", "3", "nan", "1e999", "９", "²", "9" * 4301, "\0", "\x85",
     "\u2028", "\ufeff", "/", "..", "\t", " ", "\n", "\r\n", "A", "x" * 3000],
)  # fmt: skip
TEXTS = (
    mutations(CELEBA)
    | st.lists(PIECES, max_size=30).map("".join).map(str.encode)
    | st.tuples(*[PIECES] * 6).map(lambda p: "{}\n{} {}\n{} {} {}\n".format(*p).encode())
    | st.lists(PIECES, max_size=9).map(lambda more: b"2\nA B\n" + " ".join(more).encode())
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
)


@given(TEXTS)
@examples(90)
def test_any_bytes_as_attributes_or_people(place: Path, data: bytes) -> None:
    files = {name: plain(1) for name in ("a.png", "b.png", "c d.png")}
    write_folder(place / "labels", {**files, "list_attr.txt": data, "identity.txt": data})

    def read() -> str:
        dataset = open_dataset("folder", str(place / "labels"), 8, "all")
        told = [refusal(lambda read=read: read(dataset)) for read in (binary_labels, real_labels)]  # type: ignore[misc]
        open_dataset("folder", str(place / "labels"), 8, "train").groups()
        return str(told)

    check(read)


@given(
    mutations(b"2\nAnn_Lee\t2\nBo\t1\n")
    | st.lists(PIECES, max_size=9).map(lambda p: ("1\nAnn_Lee\t" + "".join(p)).encode()),
    mutations(attributes([("Ann Lee", 1), ("Bo", 1)]).encode()) | TEXTS,
)
@examples(50)
def test_any_bytes_as_lfws_lists_and_attributes(place: Path, people: bytes, rows: bytes) -> None:
    folder = place / "lfw"
    if not folder.exists():
        lfw(folder)
    (folder / "peopleDevTrain.txt").write_bytes(people)
    told = refusal(lambda: open_dataset("lfw", str(folder)))
    lfw(folder)
    (folder / "lfw_attributes.txt").write_bytes(rows)
    check(lambda: [told, real_labels(open_dataset("lfw", str(folder)))])


# Checkpoints


def saved(value: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def pickle_in(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("archive/data.pkl")


def with_pickle(data: bytes, pickled: bytes) -> bytes:
    """The checkpoint with another pickle in it, under a check sum that fits."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name == "archive/data.pkl" else old.read(name))
    return content.getvalue()


LINEAR = torch.nn.Linear(4, 3).state_dict()
FILES = [saved(LINEAR), saved(LINEAR, _use_new_zipfile_serialization=False)]


@functools.cache
def classifier_file() -> bytes:
    classifier = AttributeClassifier(
        torch.ones(3, 4), torch.zeros(3), ("A", "B", "C"), torch.ones(3), {"epochs": 1}
    )
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(Path(folder, "archive.pt"), classifier)
        return Path(folder, "archive.pt").read_bytes()


@given(
    st.sampled_from(FILES).flatmap(mutations)
    | mutations(pickle_in(FILES[0])).map(lambda pickled: with_pickle(FILES[0], pickled))
    | st.binary(max_size=100)
)
@examples(100)
def test_any_bytes_as_a_checkpoint(place: Path, data: bytes) -> None:
    (place / "a.pt").write_bytes(data)
    check(lambda: [refusal(lambda: list(read_weights(place / "a.pt"))), load_model(place / "a.pt")])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
HUGE = st.sampled_from([10**30, -1, 0, 64 * 10**9, 1e308, "ve", [32] * 5, True])


@pytest.fixture(scope="module")
def demo(place: Path) -> tuple[Path, dict[str, Any]]:
    """A released-format file without configuration, and the one that it has."""
    model = create_model("demo", latent_dim=4)
    (place / "model").mkdir()
    save_weights(place / "model" / "a.pt", model)
    state = dict(torch.load(place / "model" / "a.pt", weights_only=True))
    torch.save(state, place / "model" / "a.pt")
    return place / "model" / "a.pt", vars(model.config)


@given(data=st.data())
@examples(30)
def test_any_configuration_beside_a_checkpoint(
    demo: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    path, config = demo
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(config)), HUGE | JSON, max_size=3))
    whole = data.draw(st.sampled_from(["model", "all", "more"]))
    content: Any = {"model": {**config, **fields}}
    if whole == "all":
        content = data.draw(JSON)
    elif whole == "more":
        content = {**content, "data": data.draw(JSON), "train": data.draw(JSON)}
    (path.parent / "config.json").write_text(json.dumps(content))
    check(lambda: load_model(path).config)


@given(st.dictionaries(st.sampled_from(["attributes", "score_std", "epochs"]), JSON) | JSON)
@examples(40)
def test_any_facts_in_a_classifier(place: Path, facts: Any) -> None:
    state = OrderedDict(LINEAR)
    state._metadata = {"dbae": facts}  # type: ignore[attr-defined]
    torch.save(state, place / "best.pt")
    check(lambda: load_classifier(place / "best.pt", 4).names)


@given(
    st.deferred(lambda: mutations(pickle_in(classifier_file()))).map(
        lambda pickled: with_pickle(classifier_file(), pickled)
    )
    | st.deferred(lambda: mutations(classifier_file()))
)
@examples(40)
def test_any_bytes_as_a_classifier(place: Path, data: bytes) -> None:
    (place / "best.pt").write_bytes(data)
    check(lambda: load_classifier(place / "best.pt", 4).names)


# Command lines


class Begun(Exception):
    """The flags were accepted and the work would begin."""


def begin(*_: object, **__: object) -> None:
    raise Begun


SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("[dm]*.py"))
REQUIRED = ("--checkpoint", "--sample_path", "--celeba_dir", "--celebahq_dir", "--lfw_dir")
WORDS = st.sampled_from(
    ["", "-1", "0", "1", "7", "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "1_0", "９", "\0",
     "a\nb", "\x1b[2J", "\udcff", "--", "-", "x" * 5000, "1,2,,3", ",", "true", "None", "../..",
     "%s %(x)d {}", "demo", "celeba", "vp", "skip", "png", "heun"]
) | st.text(max_size=12)  # fmt: skip


@pytest.mark.parametrize("script", [*SCRIPTS, "../eval_reconstruction.py"])
def test_any_words_on_a_command_line(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    parser = type(command.cli.parser(""))
    flags: list[list[str]] = []

    def note(self: Any, *_: object) -> None:
        flags.extend(action.option_strings or [""] for action in self._actions)
        raise Begun

    with monkeypatch.context() as patched, pytest.raises(Begun):
        patched.setattr(parser, "parse_args", note)
        main([])
    names = [name for [name, *_] in flags if name != "-h"]
    needed = [f"{name}=x" for name in REQUIRED if name in names]
    for work in ("join", "write_lmdb", "write_report", "load_lpips"):
        if work in main.__globals__:
            monkeypatch.setitem(main.__globals__, work, begin)
    monkeypatch.setattr(command, "loaded", begin)
    monkeypatch.setattr(reproduce, "find_models", begin)
    begun: list[bool] = []

    @given(
        st.lists(st.tuples(st.sampled_from(names), WORDS), max_size=4), st.booleans(), st.booleans()
    )
    @examples(60)
    def try_words(pairs: list[tuple[str, str]], joined: bool, whole: bool) -> None:
        words = [*needed] if whole else []
        for name, value in pairs:
            words += [f"{name}={value}"] if joined and name else [name, value][not name :]
        with pytest.raises((UserError, Begun)) as caught:
            main(words)
        begun.append(caught.type is Begun)
        assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000

    try_words()
    assert not all(begun)


def test_two_dashes_are_no_value() -> None:
    """argparse, before Python 3.13, takes them away and gives the flag an empty list."""
    parser = command.cli.parser("")
    parser.add_argument("--count", type=int)
    with pytest.raises(UserError, match="--count: expected one argument"):
        parser.parse_args(["--count=--"])
