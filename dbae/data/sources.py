"""Where encoded images come from: a folder tree, a zip file, or an LMDB in DiffAE's layout.

A source is cheap to pickle and holds no open file of another process: handles are opened on
first use, anew in each process, so that DataLoader workers of any start method can share it.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lmdb
from lmdb.verify import VerifyError, verify

from ..errors import UserError
from .images import bad_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_IMAGE_WORDS = "jpg, jpeg, png, webp, bmp, tif, tiff"
IDENTITY_FILE = "identity.txt"
_MOST_BYTES = 1 << 29  # of one image or text: what is larger is none, and would fill the memory


class Source(Protocol):
    """Encoded images by number; `path` is what the user named, `kind` what was found there."""

    kind: str
    path: str

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The stable relative name of image i (POSIX separators; an LMDB's key), valid Unicode."""
        ...

    def read(self, i: int) -> bytes:
        """The encoded image i; BadImage when it cannot be read."""
        ...

    def sidecar(self, name: str) -> str | None:
        """The text of a file of that relative name beside the images, None if there is none.

        UserError where it cannot be read or is no text.
        """
        ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """The images at `path`: a folder, a zip file, or an LMDB (its folder or its single file).

    Raises UserError, one line each, when there is nothing at `path`, when it is of another kind,
    empty, corrupt or (an LMDB) incomplete.
    """
    text = os.fspath(path)
    if not os.path.exists(text):
        raise UserError(f"{text} does not exist; expected a folder, zip or LMDB with images")
    if os.path.isdir(text):
        if os.path.isfile(os.path.join(text, "data.mdb")):
            return LmdbSource(text)
        return FolderSource(text)
    try:
        with open(text, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{text} cannot be read ({error.strerror})") from error
    if head.startswith(b"PK") or text.lower().endswith(".zip"):
        return ZipSource(text)
    if _LMDB_MAGIC in (head[16:20], head[16:20][::-1]) or text.lower().endswith(".mdb"):
        return LmdbSource(text)
    raise UserError(f"{text} is neither a folder, nor a zip file, nor an LMDB with images")


def _is_image(name: str) -> bool:
    """Whether a relative POSIX name ends as an image does and no part of it is hidden.

    Nor may it lead elsewhere: `..` is a hidden part, and an absolute name begins with an empty one.
    """
    parts = name.split("/")
    hidden = any(part[:1] in ("", ".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(EXTENSIONS)


def _content(path: str | Path) -> bytes:
    """All of a file; OSError where it cannot be read or is too large to be an image or a text."""
    with open(path, "rb") as file:
        _check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than {_MOST_BYTES >> 20} MiB")


def _decoded(data: bytes, name: object) -> str:
    """The text of a file, U+FFFD for what is not UTF-8; UserError where it is no text at all."""
    if b"\0" in data:
        raise UserError(f"{name} holds NUL bytes, so it is no text in UTF-8 (in UTF-16, perhaps?)")
    return data.decode("utf-8", errors="replace")


def read_text(path: Path) -> str | None:
    """The text of a file, U+FFFD for what is not UTF-8; None where there is no such file.

    Raises UserError where it cannot be read, is too large, or holds NUL bytes.
    """
    if not os.path.isfile(path):
        return None
    try:
        return _decoded(_content(path), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def parse_count(text: str) -> int | None:
    """The whole number that a text is, if it is one of at most 18 digits (none counts further)."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


class _Named:
    """Images that are files with names of their own, in the order of these."""

    _names: list[str]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return _as_text(self._names[i])


def _as_text(name: str) -> str:
    """A name with bytes that are not UTF-8 spelled out, as it can be printed and written."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class FolderSource(_Named):
    """Image files below a folder: all, in the order of their relative names, or those given."""

    kind = "folder"

    def __init__(self, path: str, names: list[str] | None = None) -> None:
        self.path = path
        self._names = _walk(path) if names is None else names
        if not self._names:
            raise UserError(f"folder {path} holds no images ({_IMAGE_WORDS})")

    def read(self, i: int) -> bytes:
        try:
            return _content(os.path.join(self.path, self._names[i]))
        except OSError as error:
            raise bad_image(self.name(i), f"cannot be read ({error.strerror})") from error

    def sidecar(self, name: str) -> str | None:
        return read_text(Path(self.path, name))


def _walk(root: str) -> list[str]:
    """Relative POSIX names of all images below `root`, sorted.

    Links to folders are followed, after the real folders, and no folder is entered twice, so a
    loop of links ends. Links that lead nowhere, or to themselves, are passed over.
    """
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        folder = (folders or links).pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink() and not os.path.exists(entry.path):
                continue
            if entry.is_dir() and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(name)
            elif _is_image(name) and entry.is_file():
                names.append(name)
    return sorted(names)


class ZipSource(_Named):
    """The image files in a zip archive, in the order of their names.

    Nothing is unpacked to the disk; members with absolute names or `..` in them are passed over.
    """

    kind = "zip"

    def __init__(self, path: str) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._names = sorted({name for name in self._archive().namelist() if _is_image(name)})
        if not self._names:
            raise UserError(f"zip file {path} holds no images ({_IMAGE_WORDS})")

    def _archive(self) -> zipfile.ZipFile:
        # A handle from before a fork shares its file position with the parent: never use it.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except Exception as error:  # damaged bytes make zipfile raise anything
                raise UserError(
                    f"{self.path} is not a complete zip file ({error}); copy or download it again"
                ) from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read(self, i: int) -> bytes:
        archive = self._archive()
        try:
            return _member(archive, self._names[i])
        except Exception as error:  # damaged bytes make zipfile raise anything
            raise bad_image(
                self.name(i), f"cannot be read from the zip ({_reason(error)})"
            ) from error

    def sidecar(self, name: str) -> str | None:
        archive = self._archive()
        where = f"{name} in the zip {self.path}"
        try:
            data = _member(archive, name)
        except KeyError:
            return None
        except Exception as error:
            raise UserError(f"{where} cannot be read ({_reason(error)})") from error
        return _decoded(data, where)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A zip's member, of which no more than the promised size is ever unpacked.

    Raises KeyError where there is none, and anything where it is damaged, encrypted or too large.
    """
    member = archive.getinfo(name)
    _check_size(member.file_size)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks these without a bound.
        raise NotImplementedError(f"compression {member.compress_type}, neither stored nor deflate")
    with archive.open(member) as file:
        return file.read(member.file_size)


_MOST_CHECKED = 1 << 34  # bytes of an LMDB whose structure is looked at: seconds for 16 GiB
_LMDB_MAGIC = b"\xde\xc0\xef\xbe"  # at byte 16 of the first page, in the writer's byte order
_KEY = re.compile(rb"([^/\x00-\x1f]+)-(\d{1,20})")


class KeyForm(NamedTuple):
    """How an LMDB names its records: `{prefix}-{index zero-padded to digits}`."""

    prefix: str
    digits: int

    def key(self, i: int) -> bytes:
        """The key of record i."""
        return f"{self.prefix}-{i:0{self.digits}d}".encode("utf-8", "surrogateescape")


class LmdbSource:
    """An LMDB in DiffAE's layout: `{prefix}-{index}` → encoded image, `length` → ASCII decimal.

    Prefix and number of digits are read from the database; where it holds the same images in
    several resolutions, the largest is taken. Records past `length` are not looked at.
    """

    kind = "lmdb"

    def __init__(self, path: str) -> None:
        self.path = path
        self._opened: _Handle | None = None
        try:
            with self._environment().begin() as transaction:
                self._length = _read_length(path, transaction)
                self.form = _read_form(path, transaction)
        except lmdb.Error as error:
            raise UserError(f"LMDB {path} cannot be read ({error})") from error

    def _environment(self) -> lmdb.Environment:
        if self._opened is None or self._opened.process != os.getpid():
            self._opened = _open_readonly(self.path)
        return self._opened.environment

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._length

    def name(self, i: int) -> str:
        return self.form.key(i).decode("utf-8", "backslashreplace")

    def read(self, i: int) -> bytes:
        try:
            with self._environment().begin(buffers=True) as transaction:
                data = transaction.get(self.form.key(i))
                if data is not None:
                    _check_size(len(data))
                    return bytes(data)
        except (lmdb.Error, OSError) as error:
            raise bad_image(self.name(i), f"cannot be read from {self.path} ({error})") from error
        raise bad_image(self.name(i), f"no such key in {self.path} ({self._length} promised)")

    def sidecar(self, name: str) -> str | None:
        return read_text(Path(self.folder, name))

    @property
    def folder(self) -> str:
        """Where the database file lies."""
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path)


class _Handle:
    """An open LMDB and the process that opened it."""

    def __init__(self, environment: lmdb.Environment) -> None:
        self.process = os.getpid()
        self.environment = environment


# LMDB forbids opening one file twice in a process, so the train and test sets of a process share
# a handle, found here by device and inode. It closes when the last source that uses it is gone.
_handles: weakref.WeakValueDictionary[tuple[int, int], _Handle] = weakref.WeakValueDictionary()


def _open_readonly(path: str) -> _Handle:
    """This process's read-only handle of the LMDB at `path` (a folder or a single file).

    Raises UserError when it cannot be opened, is no LMDB, is damaged, or is shorter than it says.
    """
    file = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
    try:
        status = os.stat(file)
        key = status.st_dev, status.st_ino
        handle = _handles.get(key)
        if handle is not None and handle.process == os.getpid():
            return handle
        if handle is not None:  # inherited by a fork: it may not be used, and bars a new one
            handle.environment.close()
        else:
            require_sound(file)
        environment = lmdb.open(
            file, subdir=False, readonly=True, lock=False, readahead=False, meminit=False
        )
    except (lmdb.Error, OSError) as error:
        raise UserError(f"{path} cannot be opened as an LMDB ({error})") from error
    need = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if status.st_size < need and not _survives_reading(file):
        raise UserError(
            f"LMDB {path} is cut short: {status.st_size} bytes of {need}; copy or download it again"
        )
    _handles[key] = handle = _Handle(environment)
    return handle


def require_sound(file: str) -> None:
    """Raise UserError where the pages of an LMDB file contradict each other.

    liblmdb trusts them, so that a bit may kill the process. To look at those of larger files than
    _MOST_CHECKED would take minutes, so they are trusted here as well.
    """
    if os.path.getsize(file) > _MOST_CHECKED:
        return
    try:
        problems = verify(file, subdir=False)
    except VerifyError as error:
        raise UserError(f"{file} cannot be opened as an LMDB ({error})") from error
    if problems and not _survives_reading(file):
        raise UserError(
            f"LMDB {file} is damaged or cut short ({problems[0]}); copy or download it again"
        )


def _survives_reading(file: str) -> bool:
    """Whether every record of an LMDB can be read that is shorter than it says or looks damaged.

    LMDB may leave out pages at the end that hold nothing, or lose some in the middle; but to read
    what is not there kills the process (SIGBUS). So another process tries.
    """
    walk = (
        "import lmdb, sys\n"
        "e = lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False)\n"
        "t, left = e.begin(buffers=True), e.stat()['entries']\n"
        "for key, value in t.cursor():\n"
        "    bytes(value[-1:]), bytes(t.get(key)[-1:])\n"
        "    left -= 1\n"
        "    assert left >= 0, 'pages that lead in circles'"
    )
    done = subprocess.run([sys.executable, "-c", walk, file], capture_output=True)
    return done.returncode == 0


def _read_length(path: str, transaction: lmdb.Transaction) -> int:
    value = transaction.get(b"length")
    if value is None:
        raise UserError(
            f"LMDB {path} has no key `length`: it is incomplete or not in DiffAE's layout "
            "(if scripts/make_lmdb.py was stopped, run the same command again)"
        )
    text = bytes(value[:30]).decode("ascii", errors="replace")
    length = parse_count(text)
    if not length:
        raise UserError(f"LMDB {path}: key `length` holds {text!r}, expected a positive number")
    records = transaction.stat()["entries"] - 1
    if length > 2 * records:  # a few that are missing are for --bad_images to decide on
        raise UserError(
            f"LMDB {path}: key `length` promises {length} images, but there are {records} records; "
            "copy or download it again"
        )
    return length


def _read_form(path: str, transaction: lmdb.Transaction) -> KeyForm:
    forms: list[KeyForm] = []
    cursor = transaction.cursor()
    found = cursor.first()
    while found:
        match = _KEY.fullmatch(bytes(cursor.key()))
        if match is None:
            found = cursor.next()
            continue
        prefix = match[1]
        forms.append(KeyForm(prefix.decode("utf-8", "surrogateescape"), len(match[2])))
        found = cursor.set_range(prefix + b".")  # "." follows "-": the first key past this prefix
    if not forms:
        raise UserError(
            f"LMDB {path} holds no image keys such as 256-00000; expected DiffAE's layout"
        )
    return max(forms, key=lambda form: int(form.prefix) if form.prefix.isdecimal() else 0)


_IDENTITY_LINE = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, EXTENSIONS))})|\S+)\s+(\S.*)", re.IGNORECASE
)


def identity_groups(source: Source) -> list[str]:
    """For each image the person it shows, or its own name where nobody is named.

    People are read from `identity.txt` (lines `file name`), in the image's folder or the nearest
    one above it; for an LMDB, beside `data.mdb` with keys in place of files.
    """

    @functools.cache
    def people(folder: str) -> dict[str, str]:
        file = f"{folder}/{IDENTITY_FILE}" if folder else IDENTITY_FILE
        found = _parse_identities(source.sidecar(file) or "")
        if found or folder == "..":
            return found
        return people(folder.rpartition("/")[0] if folder else "..")

    groups = []
    for name in map(source.name, range(len(source))):
        folder, _, base = name.rpartition("/")
        groups.append(people(folder).get(base, name))
    return groups


def _parse_identities(text: str) -> dict[str, str]:
    matches = map(_IDENTITY_LINE.fullmatch, map(str.strip, text.splitlines()))
    return {match[1]: match[2] for match in matches if match}
