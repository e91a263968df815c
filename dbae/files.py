"""Files written so that nothing is lost: whole or not at all, on the disk, with room checked."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it was written whole and is on the disk.

    A failure to write raises UserError; an earlier file of that name is kept then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
        if full and path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**20:
            reason = "the disk is full"
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder for results. UserError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError where less than `needed` bytes are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"too little disk for a checkpoint: {folder} has {free / 2**20:.0f} MiB free, "
            f"{needed / 2**20:.0f} MiB are needed; free some space or choose another --workdir"
        )


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal; computed once as long as the file stays the same."""
    status = path.stat()
    return _sha256(path, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)  # several protocols of one run name the same weights
def _sha256(path: Path, _: tuple[int, int, int]) -> str:
    return hash_file(path)


def hash_file(path: Path) -> str:
    """The SHA-256 of what is on the disk now, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
