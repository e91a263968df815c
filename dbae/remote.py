"""Checkpoints in a cloud's storage, through blobfile: read from there, mirrored to there.

A run's folder lies on the local disk, where writing can be atomic; what is remote is a copy of it.
Whatever may pass (a broken connection, a busy service) is tried again for some minutes; whatever
will not (no such file, no credentials) is told at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError
from .files import atomic_file, make_folder

TRIES = 6
# Of each request inside one try. blobfile waits less than a second between them, which spares a
# large file that is sent in pieces from starting again after one lost piece.
_REQUEST_RETRIES = 2
# Of HTTP; 0: no answer; 412: changed while it was read.
_PASSING_STATUS = {0, 408, 412, 429, *range(500, 600)}
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_LASTING_CODES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether a path is a URL (`gs://…`, `az://…`, `https://…`). A Path never is: it eats a `/`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def fetch(url: str, folder: Path | None = None, remote: Remote | None = None) -> Path:
    """A local copy of a remote checkpoint, with its run's config.json and its step's checksums.

    Args:
        url: the file, as blobfile writes it; a local path will do, too.
        folder: where the copies go, over what is there. Without it they go below `$DBAE_CACHE`
            (`~/.cache/dbae`), in a folder for this version of this file, and are used again.
        remote: how to reach it, for tests.

    Raises:
        UserError: no such file, no access, an unknown kind of URL, no answer after six tries, or
            nothing can be written here.
    """
    from .checkpoint import checksums_path, step_of  # it reads remote checkpoints through this

    remote = remote or Remote()
    name = url.rpartition("/")[2]
    status = remote.find(url) if name else None
    if status is None:
        raise UserError(f"cannot read {url}: there is no such file; {_PATHS}")
    keep = folder is None
    if folder is None:
        folder = _cache_folder(repr((url, status.size, status.mtime, status.version)))
    else:
        make_folder(folder)
    path = folder / name
    if not (keep and path.is_file() and path.stat().st_size == status.size):
        remote.download(url, path)
    beside = [folder / "config.json"]
    if step_of(path) >= 0:
        beside.append(checksums_path(folder, step_of(path)))
    for file in beside:
        source = url.removesuffix(name) + file.name
        if not (keep and file.is_file()) and remote.find(source):
            remote.download(source, file)
    return path


def _cache_folder(key: str) -> Path:
    cache = Path(os.environ.get("DBAE_CACHE") or Path.home() / ".cache" / "dbae")
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        make_folder(folder)
    except UserError as error:
        raise UserError(f"{error}; set DBAE_CACHE to a folder for downloads") from error
    return folder


class Mirror:
    """A remote folder that holds copies of the files of a local one; no folders within.

    Nothing here is atomic over several files: upload the file that declares the others complete
    last and delete it first. No file may change while it is copied.

    Args:
        url: the remote folder, such as `gs://bucket/runs/1`; it need not exist.
        folder: the local one.
        remote: how to reach the former, for tests.

    Raises:
        UserError: from each method; no access, no such bucket, no such file, or no answer after
            six tries, which may take minutes.
    """

    def __init__(self, url: str, folder: Path, remote: Remote | None = None) -> None:
        if not is_remote(url) and os.path.realpath(url) == os.path.realpath(folder):
            raise UserError(f"--mirror {url} is the run's own folder; choose another")
        self.url = url.rstrip("/")
        self._folder = folder
        self._remote = remote or Remote()

    def upload(self, names: Sequence[str]) -> None:
        """Copy files to the remote folder in this order, each checked before the next is begun."""
        for name in names:
            self._remote.upload(self._folder / name, self._url_of(name))

    def download(self, names: Sequence[str]) -> None:
        """Copy files to the local folder in this order, each whole or not at all."""
        for name in names:
            self._remote.download(self._url_of(name), self._folder / name)

    def read(self, name: str) -> str:
        """The text of a small file there."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text"
            self._remote.download(self._url_of(name), path)
            return path.read_text(errors="replace")

    def delete(self, names: Sequence[str]) -> None:
        """Delete remote files in this order; those that are absent already are fine."""
        for name in names:
            self._remote.delete(self._url_of(name))

    def names(self) -> list[str]:
        """The names of the remote files, sorted; none where there is no such folder or bucket."""
        return self._remote.names(self.url)

    def _url_of(self, name: str) -> str:
        if Path(name).name != name or name in ("", ".."):  # a foreign checksum file may say it
            raise UserError(f"{self.url}: {name!r} is no plain file name, so it was left alone")
        return f"{self.url}/{name}"


class Remote:
    """Single remote files by URL, with retry.

    Args:
        context: what stands for blobfile, for tests: its `copy`, `stat`, `remove`, `scandir`.
        sleep: waits between two tries, in seconds.
    """

    def __init__(self, context: Any = None, sleep: Callable[[float], None] = time.sleep) -> None:
        self._context = context or blobfile_context()
        self._sleep = sleep

    def find(self, url: str) -> Any:
        """blobfile's Stat of a file (size in bytes, mtime, version, md5); None if it is absent."""

        def stat() -> Any:
            try:
                return self._context.stat(url)
            except FileNotFoundError:
                return None

        return self._retry(f"read {url}", url, stat)

    def upload(self, path: Path, url: str) -> None:
        """Copy a local file there; what arrived is compared with what was sent."""

        def copy() -> None:
            md5 = self._context.copy(str(path.absolute()), url, overwrite=True, return_md5=True)
            _compare(self._context.stat(url), path.stat().st_size, md5)

        self._retry(f"upload {path} to {url}", url, copy)

    def download(self, url: str, path: Path) -> None:
        """Copy a remote file here, atomically; what arrived is compared with what is there."""

        def copy() -> None:
            status = self._context.stat(url)
            with atomic_file(path) as file:
                temporary = os.path.abspath(file.name)
                md5 = self._context.copy(url, temporary, overwrite=True, return_md5=True)
                _compare(status, os.path.getsize(temporary), md5)

        self._retry(f"download {url} to {path}", url, copy)

    def delete(self, url: str) -> None:
        """Delete a remote file if it is there."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._context.remove(url)

        self._retry(f"delete {url}", url, remove)

    def names(self, url: str) -> list[str]:
        """Names of the files in a remote folder, sorted; none if it is absent."""

        def scan() -> list[str]:
            try:
                return sorted(entry.name for entry in self._context.scandir(url) if entry.is_file)
            except FileNotFoundError:
                return []

        return self._retry(f"list {url}", url, scan)

    def _retry(self, what: str, url: str, operation: Callable[[], T]) -> T:
        import blobfile  # slow, and not needed by who has no remote files

        waits = [2.5**i * _RANDOM.uniform(1, 1.5) for i in range(TRIES - 1)]  # 1 s … 59 s
        while True:
            try:
                return operation()
            except (OSError, UserError, _Differs, blobfile.Error) as error:
                # atomic_file makes a UserError of any OSError, also of the connection's.
                cause = error.__cause__ if isinstance(error, UserError) else error
                passing = _may_pass(cause)
                if isinstance(error, UserError) and not passing:
                    raise
                if not passing or not waits:
                    raise UserError(f"cannot {what}: {_explain(cause, url, passing)}") from error
            self._sleep(waits.pop(0))


def blobfile_context(**settings: Any) -> Any:
    """A blobfile context of our own: silent, with few retries of its own, no tokens on the disk."""
    import blobfile

    return blobfile.create_context(
        log_callback=lambda line: None,
        retry_limit=_REQUEST_RETRIES,
        save_access_token_to_disk=False,
        **settings,
    )


class _Differs(Exception):
    """What arrived is not what was sent."""


# Not the global one: that is seeded alike on all ranks, and a run's numbers may hang on its state.
_RANDOM = random.SystemRandom()

_PATHS = (
    "check the path (gs://BUCKET/…, az://ACCOUNT/CONTAINER/…, "
    "https://ACCOUNT.blob.core.windows.net/CONTAINER/…) and that its bucket or container exists"
)


def _compare(status: Any, size: int, md5: str) -> None:
    if status.size != size:
        raise _Differs(f"{size} bytes here, {status.size} there")
    if status.md5 not in (None, md5):
        raise _Differs(f"the same {size} bytes by number, but with another MD5")


def _may_pass(error: BaseException | None) -> bool:
    import blobfile

    restartable = (
        _Differs,
        blobfile.ConcurrentWriteFailure,
        blobfile.DeadlineExceeded,
        blobfile.RestartableStreamingWriteFailure,
    )
    if isinstance(error, restartable):
        return True
    if isinstance(error, blobfile.RequestFailure):
        return error.response_status in _PASSING_STATUS
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING) and error.errno not in _LASTING_CODES
    return False


def _explain(error: BaseException | None, url: str, passing: bool) -> str:
    """What happened and what to do, in one line."""
    import blobfile

    reason = (getattr(error, "message", "") or str(error) or repr(error)).splitlines()[0]
    if passing:
        return f"{reason}; {TRIES} tries failed, run the same command again later"
    if isinstance(error, blobfile.RequestFailure):
        denied = error.response_status in (401, 403)
    else:  # blobfile's other errors are about paths or about credentials
        about_path = reason.startswith(("Unrecognized path", "Invalid path"))
        denied = isinstance(error, blobfile.Error) and not about_path
    if not denied:
        return f"{reason}; {_PATHS}"
    if url.startswith("gs://"):
        login = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=KEYFILE"
    else:
        login = "`az login`, or AZURE_STORAGE_KEY=KEY or AZURE_APPLICATION_CREDENTIALS=FILE"
    return f"{reason}; log in to an account with access ({login})"
