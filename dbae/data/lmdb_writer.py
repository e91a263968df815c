"""Write an LMDB in DiffAE's layout from any source: parallel, resumable, verified.

While it is being written the database holds its progress under one key of its own and no
`length`, so no reader takes it for complete. The same transaction that writes `length`, after
everything was read back, removes that key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
from torch.utils.data import DataLoader, Dataset

from ..cli import option
from ..errors import UserError
from .datasets import user_error_from_worker
from .images import FITS, BadImage, decode, fit_square
from .sources import IDENTITY_FILE, KeyForm, Source, identity_groups, open_source, require_sound

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_PROGRESS_KEY = b"make_lmdb"
_CHUNK = 32  # images per transaction: what a kill can cost
_FIRST_MAP = 1 << 26  # bytes of address space to begin with; doubled when full
_DECODED = 1000  # at the end every record is read, about this many are decoded


@dataclasses.dataclass(frozen=True)
class LmdbConfig:
    """How images become records of an LMDB."""

    size: int = option(0, "height and width to resize to (0: keep the encoded bytes as they are)")
    fit: str = option("center", "resize the centred square, or stretch the whole", choices=FITS)
    format: str | None = option(None, "encoding with --size; None: jpg", choices=tuple(_FORMATS))
    quality: int | None = option(None, "quality of jpg and webp, 1 to 100; None: 95")
    prefix: str | None = option(None, "word before the index in a key; None: the size, if any")
    digits: int | None = option(None, "digits of the index; None: 5 below 100000 images, else 7")
    workers: int = option(-1, "encoding processes (-1: one per core; 0: none beside this one)")
    bad_images: str = option(
        "error", "an unreadable image stops the run or is left out", choices=("error", "skip")
    )

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UserError(f"--size {self.size} must be 0 or the pixels of a side")
        if self.size == 0 and (self.format or self.quality):
            raise UserError("--format and --quality need --size: without it bytes are kept as is")
        if self.format == "png" and self.quality:
            raise UserError("--quality has no meaning for --format png")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality} must lie in 1 to 100")
        if self.prefix is not None and not re.fullmatch(r"[\w.-]{1,64}", self.prefix, re.ASCII):
            raise UserError(f"--prefix {self.prefix!r} must be letters, digits, dots or dashes")
        if self.digits is not None and not 1 <= self.digits <= 20:
            raise UserError(f"--digits {self.digits} must lie in 1 to 20")
        if self.workers < -1:
            raise UserError(f"--workers {self.workers} must be -1, 0 or a number of processes")


class Written(NamedTuple):
    """What `write_lmdb` did."""

    form: KeyForm
    records: int  # in the finished database
    resumed_at: int  # source images that an earlier run had dealt with
    skipped: list[str]  # names of unreadable images left out


def write_lmdb(
    source_path: str,
    out: str,
    config: LmdbConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write the images at `source_path` to the LMDB folder `out`; continue an interrupted run.

    `on_progress(done, total)` is called at the start and after each chunk. Where the source names
    people (`identity.txt`), the same file with keys in place of names is laid beside the
    database. Raises UserError: nothing readable at the source, a finished or foreign database at
    `out`, other settings than the interrupted run had, a full disk, a worker that was killed;
    BadImage for an unreadable image unless they are to be skipped.
    """
    if os.path.realpath(source_path) == os.path.realpath(out):
        raise UserError(f"{out} is the source itself; choose another folder for the LMDB")
    source = open_source(source_path)
    form = _key_form(config, len(source))
    with _open(out) as environment:
        writer = _Writer(out, environment, _recipe(source, config, form))
        start = writer.state["done"]
        on_progress(start, len(source))
        try:
            for records, bad in _encoded(source, config, start):
                if bad and config.bad_images == "error":
                    reason = next(iter(bad.values()))
                    raise BadImage(f"{reason} (--bad_images skip leaves such images out)")
                writer.append(form, records, list(bad))
                on_progress(writer.state["done"], len(source))
        except (RuntimeError, UserError) as error:
            # torch tells of a worker's end by a signal, so that it may be raised anywhere above.
            mistake = user_error_from_worker(error) or _worker_lost(error, out)
            if mistake is None:
                raise
            raise mistake from error
        skipped = writer.state["skipped"]
        count = len(source) - len(skipped)
        writer.verify(form, count, config.size)
        _write_identities(source, form, set(skipped), out)
        writer.finish(count)
    return Written(form, count, start, [source.name(i) for i in skipped])


def _worker_lost(error: Exception, out: str) -> UserError | None:
    """The UserError that the loss of an encoding process amounts to, if `error` tells of one."""
    if not str(error).startswith("DataLoader worker"):
        return None
    return UserError(
        f"an encoding process was lost ({' '.join(str(error).split())}; out of memory?); run the "
        f"same command again, it continues in {out}, perhaps with fewer --workers"
    )


def _key_form(config: LmdbConfig, count: int) -> KeyForm:
    digits = config.digits or (5 if count < 100_000 else 7)
    if count > 10**digits:
        raise UserError(f"--digits {digits} is too few for {count} images")
    return KeyForm(config.prefix or (str(config.size) if config.size else "None"), digits)


def _recipe(source: Source, config: LmdbConfig, form: KeyForm) -> dict[str, Any]:
    """Everything that decides the bytes of the database: equal for a run that may continue."""
    names = "\0".join(source.name(i) for i in range(len(source)))
    return {
        "images": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
        "size": config.size,
        "fit": config.fit,
        "format": config.format or "jpg",
        "quality": config.quality or 95,
        "bad_images": config.bad_images,
        **form._asdict(),
    }


class _Encoder(Dataset[tuple[bytes, str]]):
    """Source image i as a record: (bytes, "") or, when it is unreadable, (b"", the reason)."""

    def __init__(self, source: Source, config: LmdbConfig) -> None:
        self.source = source
        self.config = config

    def __getitem__(self, i: int) -> tuple[bytes, str]:
        try:
            data = self.source.read(i)
            image = decode(data, self.source.name(i))
        except BadImage as error:
            return b"", str(error)
        if self.config.size:
            name = self.config.format or "jpg"
            keywords: dict[str, Any] = {}
            if name != "png":
                keywords["quality"] = self.config.quality or 95
            if name == "jpg":
                keywords["subsampling"] = 0  # small images suffer from halved colour
            encoded = io.BytesIO()
            fit_square(image, self.config.size, self.config.fit).save(
                encoded, _FORMATS[name], **keywords
            )
            data = encoded.getvalue()
        return data, ""


def _encoded(
    source: Source, config: LmdbConfig, start: int
) -> Iterator[tuple[list[bytes], dict[int, str]]]:
    """Per chunk of source images from `start` on: the records, and source index → reason of the
    unreadable ones.
    """
    workers = (os.cpu_count() or 1) if config.workers < 0 else config.workers
    loader = DataLoader(
        _Encoder(source, config),
        batch_size=_CHUNK,
        sampler=range(start, len(source)),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_end_with_parent,
    )
    for chunk in loader:
        bad = {start + k: reason for k, (_, reason) in enumerate(chunk) if reason}
        yield [data for data, reason in chunk if not reason], bad
        start += len(chunk)


def _open(out: str) -> lmdb.Environment:
    try:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(os.path.join(out, "data.mdb")):
            require_sound(os.path.join(out, "data.mdb"))
        return lmdb.open(out, map_size=_FIRST_MAP)
    except OSError as error:
        raise UserError(f"cannot make the folder {out} ({error.strerror})") from error
    except lmdb.Error as error:
        raise UserError(f"cannot write an LMDB at {out} ({error})") from error


def _end_with_parent(worker: int) -> None:
    """End this worker soon after the process that started it is gone.

    torch's own watchdog does not see a worker that waits for room in the pipe to a killed parent.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Writer:
    """The unfinished database at `out`: its state is what it holds under the progress key."""

    def __init__(self, out: str, environment: lmdb.Environment, recipe: dict[str, Any]) -> None:
        self.out = out
        self.environment = environment
        with self.environment.begin() as transaction:
            stored = transaction.get(_PROGRESS_KEY)
            finished = transaction.get(b"length") is not None
            entries = transaction.stat()["entries"]
        if finished:
            raise UserError(f"{out} holds a finished LMDB; remove it or choose another folder")
        if stored is None and entries:
            raise UserError(f"{out} holds another database; choose another folder")
        self.state: dict[str, Any] = {"recipe": recipe, "done": 0, "skipped": []}
        if stored is not None:
            try:
                self.state.update(json.loads(bytes(stored)))
                begun = dict(self.state["recipe"])
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{out} does not say how far it got; remove it to begin anew"
                ) from error
            differing = [name for name in recipe if begun.get(name) != recipe[name]]
            if differing:
                raise UserError(
                    f"{out} was begun with other {', '.join(differing)}; give the same source and "
                    "flags to continue, or remove it to begin anew"
                )
        self._stored = stored

    def append(self, form: KeyForm, records: list[bytes], bad: list[int]) -> None:
        """Add one chunk's records and its unreadable source indices in one transaction."""
        first = self.state["done"] - len(self.state["skipped"])
        state = {
            "recipe": self.state["recipe"],
            "done": self.state["done"] + len(records) + len(bad),
            "skipped": self.state["skipped"] + bad,
        }
        stored = json.dumps(state).encode()
        items = {form.key(first + k): data for k, data in enumerate(records)}
        self._put({**items, _PROGRESS_KEY: stored})
        self.state, self._stored = state, stored

    def _put(self, items: dict[bytes, bytes], remove: bytes | None = None) -> None:
        try:
            with self.environment.begin(write=True) as transaction:
                if transaction.get(_PROGRESS_KEY) != self._stored:
                    raise UserError(f"another process is writing to {self.out} at the same time")
                for key, data in items.items():
                    transaction.put(key, data)
                if remove is not None:
                    transaction.delete(remove)
        except lmdb.MapFullError:
            self.environment.set_mapsize(2 * self.environment.info()["map_size"])
            self._put(items, remove)
        except lmdb.Error as error:
            free = shutil.disk_usage(self.out).free // 2**20
            raise UserError(
                f"writing to {self.out} failed ({error}; {free} MiB of disk are free); make room "
                "there and run the same command again, it continues"
            ) from error

    def verify(self, form: KeyForm, count: int, size: int) -> None:
        """Read back every record and decode a sample; UserError where something is not right."""
        if count == 0:
            raise UserError(f"none of the images could be read, so {self.out} holds none")
        broken = f"{self.out} is not what was written to it (a failing disk?); remove it and repeat"
        step = -(-count // _DECODED)
        with self.environment.begin(buffers=True) as transaction:
            if transaction.stat()["entries"] != count + 1:  # the progress key
                raise UserError(f"{broken}: {transaction.stat()['entries'] - 1} of {count} records")
            for i in range(count):
                data = transaction.get(form.key(i))
                if not data:
                    raise UserError(f"{broken}: no record {form.key(i).decode()}")
                if i % step == 0 or i == count - 1:
                    image = decode(bytes(data), form.key(i).decode())
                    if size and image.size != (size, size):
                        raise UserError(f"{broken}: {form.key(i).decode()} is {image.size}")

    def finish(self, count: int) -> None:
        """Declare the database complete: `length` appears as the progress key goes."""
        self._put({b"length": str(count).encode()}, remove=_PROGRESS_KEY)


def _write_identities(source: Source, form: KeyForm, skipped: set[int], out: str) -> None:
    lines: list[str] = []
    record = 0
    for i, group in enumerate(identity_groups(source)):
        if i in skipped:
            continue
        if group != source.name(i):
            lines.append(f"{form.key(record).decode()} {group}\n")
        record += 1
    if lines:
        Path(out, IDENTITY_FILE).write_text("".join(lines), encoding="utf-8")
