"""What a long evaluation has done so far, so that the same command goes on where it was killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distributed import Context
from ..errors import UserError
from ..files import atomic_file, hash_file
from ..lock import FolderLock

_RUN, _PUBLISHING, _RECORD = "run.json", "publishing.json", ".done"
_OURS = re.compile(rf"{_RUN}|.+{_RECORD}|\..+\.\d+\.tmp")  # the last are of a killed process


class Damaged(UserError):
    """A piece that is not as it was written."""


class Unfinished:
    """The finished pieces of a run, and its results until they are complete.

    A piece is named, and consists of files in `folder` and a record, written last: tensors,
    numbers and text, the files' hashes, and of which run it is. While entered, no other evaluation
    may write to the folder above (`FolderLock` of rank 0). Every rank must enter, all with the same
    folder, which they share.

    Args:
        folder: where pieces and results are until `publish` moves the results to the folder above.
        identity: JSON-able facts, of which rank 0's count. Pieces of a run with others are deleted.
        context: this process's place among the ranks.
        results: names of results, and of no other files.
        last: the result that is published last: where it is, the rest is whole.

    Raises UserError where the folder cannot be made or is in use.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        context: Context,
        results: re.Pattern[str],
        last: str,
    ) -> None:
        self.folder = folder
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._run = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()
        self._context = context
        self._results, self._last = results, last
        self._lock = FolderLock(folder.parent)

    def __enter__(self) -> Unfinished:
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            with self._context.together():
                if self._context.is_main:
                    self._open()
            self._run, *_ = self._context.gather_objects(self._run)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> None:
        """Take the lock, keep the pieces of this run, delete those of another."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror or error}") from error
        self._lock.acquire()
        published = _read_json(self.folder / _PUBLISHING)
        if published and published["identity"] == self._identity:
            self._take_back(published["files"])
        elif published:
            _publish(self.folder, published["files"], self._results, self._last)
            self.folder.mkdir(exist_ok=True)  # as it went with the last file in it
        found = _read_json(self.folder / _RUN)
        if found == self._identity:
            _delete(path for path in self.folder.iterdir() if path.suffix == ".tmp")
            return
        if any(self.folder.glob(f"*{_RECORD}")):
            whose = "of an unknown run"
            if found:
                names = found | self._identity
                other = [n for n in names if found.get(n) != self._identity.get(n)]
                whose = f"of a run with another {', '.join(other)}"
            self._context.print(f"{self.folder} holds unfinished results {whose}: starting afresh")
        _delete(
            path
            for path in self.folder.iterdir()
            if _OURS.fullmatch(path.name) or self._results.fullmatch(path.name)
        )
        _write_sealed(self.folder / _RUN, json.dumps(self._identity, indent=1).encode())

    def _take_back(self, files: Sequence[str]) -> None:
        """Undo a publication that was interrupted: the pieces need their files to be whole."""
        for name in sorted(files, key=lambda name: name != self._last):
            if not (self.folder / name).exists() and (self.folder.parent / name).exists():
                os.replace(self.folder.parent / name, self.folder / name)
        (self.folder / _PUBLISHING).unlink()

    # Pieces -------------------------------------------------------------------------------

    def keep(self, name: str, content: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        """Record a piece: tensors, numbers and text, and files that have been written before."""
        record = {
            "run": self._run,
            "files": {path.name: hash_file(path) for path in files},
            "content": dict(content),
        }
        written = io.BytesIO()
        torch.save(record, written)
        _write_sealed(self.folder / f"{name}{_RECORD}", written.getvalue())

    def read(self, name: str) -> dict[str, Any]:
        """The content of a piece, which is whole with its files.

        Raises FileNotFoundError where there is none, Damaged where anything of it is.
        """
        path = self.folder / f"{name}{_RECORD}"
        sealed = _read_sealed(path)
        if sealed is None:
            raise Damaged(f"{path} is damaged")
        record = torch.load(io.BytesIO(sealed), map_location="cpu", weights_only=True)
        if record["run"] != self._run:
            raise Damaged(f"{path} is of another run")
        for file, written in record["files"].items():
            try:
                found = hash_file(self.folder / file)
            except OSError as error:
                raise Damaged(f"{self.folder / file}: {error.strerror or error}") from error
            if found != written:
                raise Damaged(f"{self.folder / file} is damaged")
        content: dict[str, Any] = record["content"]
        return content

    def done(self, mine: Sequence[str], unit: str) -> set[str]:
        """The whole ones among the pieces of all ranks, `mine` being this rank's. A collective.

        Tells the user how many there are, as `unit`, and which are damaged.
        """
        whole: set[str] = set()
        damaged: dict[str, str] = {}
        for name in mine:
            try:
                self.read(name)
                whole.add(name)
            except FileNotFoundError:
                pass
            except Damaged as error:
                damaged[name] = str(error)
        found = self._context.gather_objects((whole, damaged, len(mine)))
        everyones = {name for of_rank, _, _ in found for name in of_rank}
        for _, of_rank, _ in found:
            for name, reason in of_rank.items():
                self._context.print(f"{name} is done again: {reason}")
        if everyones:
            total = sum(number for _, _, number in found)
            self._context.print(
                f"resuming: {len(everyones)} of {total} {unit} are done ({self.folder})"
            )
        return everyones

    # Results ------------------------------------------------------------------------------

    def publish(self) -> None:
        """Move the results to the folder above, in place of earlier ones, and delete the pieces.

        Where a kill interrupts this, `last` is not there, and the next run completes or repeats it.
        UserError where it fails.
        """
        try:
            files = [p.name for p in self.folder.iterdir() if self._results.fullmatch(p.name)]
            content = json.dumps({"identity": self._identity, "files": sorted(files)})
            _write_sealed(self.folder / _PUBLISHING, content.encode())
            _publish(self.folder, files, self._results, self._last)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot replace {self.folder.parent}: {reason}") from error


def complete(folder: Path, results: re.Pattern[str], last: str) -> None:
    """Finish a publication out of `folder` that was interrupted, if one was."""
    if not (folder / _PUBLISHING).exists():
        return
    with FolderLock(folder.parent):
        if published := _read_json(folder / _PUBLISHING):
            _publish(folder, published["files"], results, last)


def _publish(folder: Path, files: Sequence[str], results: re.Pattern[str], last: str) -> None:
    """Move these files to the folder above, delete older results there and the rest here.

    To be repeated after an interruption until it is through: then all has been moved already, or
    `last` is still here.
    """
    above = folder.parent
    if (folder / last).exists():
        old = [p for p in above.iterdir() if results.fullmatch(p.name) and p.name not in files]
        _delete([above / last, *old])
        for name in sorted(files, key=lambda name: name == last):
            if (folder / name).exists():
                os.replace(folder / name, above / name)
    rest = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    _delete(sorted(rest, key=lambda path: path.name == _RUN))  # what tells whose the others are
    (folder / _PUBLISHING).unlink()
    with contextlib.suppress(OSError):  # somebody's own file is in it
        folder.rmdir()


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


# A file's first line is the SHA-256 of the rest ---------------------------------------------


def _write_sealed(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(hashlib.sha256(content).hexdigest().encode() + b"\n")
        file.write(content)


def _read_sealed(path: Path) -> bytes | None:
    """The content, None where it is damaged. FileNotFoundError where there is none."""
    try:
        seal, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise
    except OSError:  # a bad sector
        return None
    return content if hashlib.sha256(content).hexdigest().encode() == seal else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a sealed file, None where there is none or it is damaged."""
    with contextlib.suppress(FileNotFoundError):
        if content := _read_sealed(path):
            found: dict[str, Any] = json.loads(content)
            return found
    return None
