"""One writer per folder: a lock that names its holder and dies with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
from pathlib import Path
from typing import Any

from .errors import UserError

# What file systems without locks answer (Lustre without its flock option, some FUSE mounts).
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HELD = (errno.EACCES, errno.EAGAIN)
# Locks of this process, by process (a fork has none) and path. To open and close the file of one
# of them, if only to read it, would end that lock.
_ours: set[tuple[int, str]] = set()


class FolderLock:
    """Keeps other processes, also of other machines, from writing to a folder meanwhile.

    A POSIX record lock on the file `name` in it, which also says who holds it. The system lets
    such a lock go when its process ends, however it ends, and a child (a data-loading worker that
    outlives its parent) does not inherit it: a file that is not locked is stale. On a file system
    without locks the holder's word counts: it is stale if this machine has no such process.

    `stale`: after `acquire`, who left the lock without releasing it ("pid 7 on host a"), or None.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.path = folder / name
        self.stale: str | None = None
        self._handle: int | None = None
        self._key = os.getpid(), os.path.realpath(self.path)

    def acquire(self) -> None:
        """Take the lock. UserError names the holder where it is held, by this process too."""
        if self._key in _ours:
            raise UserError(self._refusal(_this_process(), certain=True))
        with contextlib.ExitStack() as undo:
            try:
                # Nothing is cut off: the content is the holder's until the lock is ours.
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                undo.callback(os.close, handle)
                holder = _parsed(os.read(handle, 4096))
                locked = _lock(handle)
                if locked is False or (locked is None and _lives(holder)):
                    raise UserError(self._refusal(holder, certain=locked is not None))
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}") from error
            undo.pop_all()
        self.stale = _words(holder) if holder else None
        self._handle = handle
        _ours.add(self._key)

    def release(self) -> None:
        """Let go; nothing if it is not held. The empty file stays: to delete it would be a race."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):  # the folder is gone: the lock goes with the process
            os.ftruncate(self._handle, 0)
        with contextlib.suppress(OSError):
            os.close(self._handle)
        self._handle = None
        _ours.discard(self._key)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _refusal(self, holder: dict[str, Any], certain: bool) -> str:
        refusal = f"{self.path.parent} is in use by {_words(holder)}; wait for it or stop it"
        return refusal if certain else f"{refusal} (if it is gone, delete {self.path})"


def _lock(handle: int) -> bool | None:
    """Whether the file could be locked; None where the file system cannot say."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content or b"{}")
    except ValueError:  # half written by one that was killed just then
        return {}
    return holder if isinstance(holder, dict) else {}


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": platform.node(), "pid": pid, "started": _started(pid)}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the holder may still be running; of another machine's we cannot know."""
    if not holder or holder.get("host") != platform.node():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:
        pass  # it lives, and is somebody else's
    return holder.get("started") == _started(int(holder["pid"]))


def _started(pid: int) -> int | None:
    """When a process of this machine began, as process numbers come again; None off Linux."""
    try:
        # The name, field 2, may hold spaces and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"pid {holder.get('pid')} on host {holder.get('host')}"
