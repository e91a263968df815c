"""The checkpoints in a run's folder: written whole, checked, counted, kept or deleted.

The checkpoint of a step is `model_…pt`, `ema_…pt`, `state_…pt` and, written last,
`checkpoint_….sha256` with the hashes of the three.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .errors import UserError, in_words
from .files import hash_file, require_space, write_text
from .remote import Mirror
from .runlog import BAD_STEPS

SET_ASIDE = "set_aside"
# What a run needs besides its checkpoints to go on elsewhere.
RUN_FILES = ("config.json", "progress.csv", BAD_STEPS)


def require_same_run(config: str | Any, describe: Mapping[str, Any], where: object) -> None:
    """Refuse to go on with a run of another model, seed or data.

    Args:
        config: the content of that run's config.json, or what was read of it.
        describe: what ours is to hold.
        where: that run's place, for the message.
    """
    try:
        stored = json.loads(config) if isinstance(config, str) else config
        earlier = {**stored["model"], "seed": stored["train"]["seed"]}
        data, n = stored["data"]["fingerprint"], stored["data"]["n"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"config.json in {where} is not a run's ({error!r})") from error
    ours = json.loads(json.dumps({**describe["model"], "seed": describe["train"]["seed"]}))
    changed = [f"{k} {earlier.get(k)} → {v}" for k, v in ours.items() if earlier.get(k) != v]
    if data != describe["data"]["fingerprint"]:
        changed.append(f"{n} images → {describe['data']['n']} others")
    if changed:
        raise UserError(
            f"{where} holds another run ({'; '.join(changed)}); use the same flags and data, or "
            "another --workdir and --mirror (--resume goes on from another run's checkpoint)"
        )


class CheckpointStore:
    """Saves, checks and deletes checkpoints; on the main process only.

    Args:
        folder: the run's.
        describe: what config.json holds: whose checkpoints these are.
        keep_last: how many of the newest are kept (0: all).
        keep_every: those of steps that are multiples of it are kept too (0: none).
        background: write in a thread, from a copy in memory.
        say: tells the user a line.
        mirror: a folder elsewhere that gets a copy of each checkpoint, in another thread.
    """

    def __init__(
        self,
        folder: Path,
        describe: Mapping[str, Any],
        keep_last: int,
        keep_every: int,
        background: bool,
        say: Callable[[str], None],
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self._describe = folder, describe
        self._keep_last, self._keep_every = keep_last, keep_every
        self._say = say
        self._pool = ThreadPoolExecutor(1) if background else None
        self._pending: Future[None] | None = None
        self._mirror = mirror
        self._uploads = ThreadPoolExecutor(1) if mirror else None
        self._uploading: Future[None] | None = None
        self._mirrored: dict[int, str] = {}  # step → its checksums, as they are there
        self._deleted: list[str] = []  # files, since the last upload

    # Reading ------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to the end, newest first.

        The state is written after the weights, so that where it was, these were whole.
        """
        files = [*self.folder.glob("state_*.pt"), *self.folder.glob("checkpoint_*.sha256")]
        found = set(map(checkpoint.step_of, files))
        return sorted((step for step in found if step >= 0), reverse=True)

    def problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files on the disk, in words; None if they are whole."""
        for kind in ("model_", "ema_", "state_"):
            if not any(path.name.startswith(kind) for path in self._files(step)):
                return f"{self.folder / kind}…{step:06d}.pt is missing"
        recorded = checkpoint.read_checksums(checkpoint.checksums_path(self.folder, step))
        for path in self._files(step):
            try:
                if path.name in recorded:
                    if damage := checkpoint.damaged(path, hash_file):
                        return damage
                elif path.suffix == ".pt":  # killed before the hashes were written, or theirs went
                    checkpoint.load_file(path)
            except (OSError, UserError) as error:
                return str(error)
        return None

    def newest_whole(self) -> tuple[int | None, list[str]]:
        """The newest checkpoint without a problem, and lines on newer ones, moved to SET_ASIDE.

        None where there is no checkpoint at all. UserError where there are some and none is
        whole: then they stay where they are.
        """
        problems: dict[int, str] = {}
        for step in self.steps():
            problem = self.problem(step)
            if problem is None:
                for bad in problems:
                    self.set_aside(bad)
                aside = self.folder / SET_ASIDE
                return step, [
                    f"passing over the checkpoint of step {bad}, now in {aside}: {problem}"
                    for bad, problem in problems.items()
                ]
            problems[step] = problem
        if problems:
            raise UserError(
                f"no checkpoint in {self.folder} can be resumed ({'; '.join(problems.values())}); "
                "bring one back from a copy, or start anew in another --workdir"
            )
        return None, []

    def set_aside(self, step: int) -> None:
        """Move a checkpoint's files to the folder SET_ASIDE, where they no longer count."""
        target = self.folder / SET_ASIDE
        try:
            target.mkdir(exist_ok=True)
            for path in self._files(step):
                os.replace(path, target / path.name)
        except OSError as error:
            raise UserError(f"cannot move {path} to {target}: {error.strerror}") from error

    def go_back(self, step: int) -> list[str]:
        """Set aside the checkpoints after a step, here, and forget them in the mirror; lines."""
        later = [other for other in self.steps() if other > step]
        for other in later:
            self.set_aside(other)
        if self._mirror is not None:
            self._mirror.delete([checkpoint.checksums_path(self.folder, s).name for s in later])
        return [f"the checkpoint of step {other} is now in {SET_ASIDE}/" for other in later]

    def _files(self, step: int) -> list[Path]:
        """A checkpoint's files. Without the first two, the rest does not count as one."""
        names = ("checkpoint_{}.sha256", "state_{}.pt", "model_{}.pt", "ema_*_{}.pt")
        return [p for name in names for p in self.folder.glob(name.format(f"{step:06d}"))]

    # Writing ------------------------------------------------------------------------------

    def save(self, step: int, contents: Mapping[str, Any]) -> None:
        """Write a checkpoint, file name → content, then delete those that are not to be kept.

        In the background, this returns when the content is copied; what fails there is raised by
        the next `save` or `finish`. UserError: too little room, or a file cannot be written.
        """
        self.finish()
        require_space(self.folder, 2**20 + sum(map(_bytes, contents.values())))
        if self._pool is None:
            self._write(step, contents)
        else:
            self._pending = self._pool.submit(
                self._write, step, checkpoint.to_cpu(dict(contents), copy=True)
            )

    @property
    def failed(self) -> bool:
        """Whether writing in the background has failed: `finish` will say how."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def finish(self) -> None:
        """Wait until all is written. Raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is being written in the background, and end the threads."""
        for pool in (self._pool, self._uploads):
            if pool is not None:
                pool.shutdown()

    def _write(self, step: int, contents: Mapping[str, Any]) -> None:
        checksums = checkpoint.checksums_path(self.folder, step)
        for path in (checksums, checkpoint.state_path(self.folder, step)):
            path.unlink(missing_ok=True)  # half old and half new would be no checkpoint
        hashes = {
            name: checkpoint.write(self.folder / name, content)
            for name, content in contents.items()
        }
        write_text(checksums, "".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
        self._say(f"saved the checkpoint of step {step}")
        self._delete_old()
        self._start_upload()

    def _delete_old(self) -> None:
        steps = self.steps()
        every = self._keep_every
        kept = steps[: self._keep_last] + [s for s in steps if every and s % every == 0]
        old = [step for step in steps if step not in kept]
        if not self._keep_last or not old:
            return
        if all(self.problem(step) for step in kept):
            self._say("no older checkpoint is deleted, as the newer ones are damaged")
            return
        for step in old:
            for path in self._files(step):
                path.unlink(missing_ok=True)
                self._deleted.append(path.name)

    # The mirror ---------------------------------------------------------------------------

    def restore(self) -> list[str]:
        """Where the mirror has a newer checkpoint, bring the newest whole one from there; lines.

        UserError where the mirror is another run's, or has newer checkpoints and none is whole.
        """
        if self._mirror is None:
            return []
        there = self._same_mirror()
        here = max(self.steps(), default=-1)
        notes, damaged = [], []
        for step in sorted({checkpoint.step_of(Path(name)) for name in there}, reverse=True):
            checksums = checkpoint.checksums_path(self.folder, step)
            if step <= here or checksums.name not in there:
                continue
            self._mirror.download([checksums.name])
            # The state, which makes it a checkpoint, is the last of its files.
            self._mirror.download(list(checkpoint.read_checksums(checksums)))
            if problem := self.problem(step):
                notes.append(f"the copy of step {step} in the mirror is not used: {problem}")
                damaged.append(checksums.name)
                self.set_aside(step)
                continue
            self._mirror.download([name for name in RUN_FILES if name in there])
            self._mirror.delete(damaged)  # so that they are copied again
            return [*notes, f"the checkpoint of step {step} was brought from the mirror"]
        if notes and here < 0:
            raise UserError(f"no copy in the mirror is whole: {'; '.join(notes)}")
        return notes

    def check_mirror(self) -> None:
        """Copy config.json there. UserError where that is impossible: better now than later."""
        if self._mirror is not None:
            self._same_mirror()
            self._mirror.upload(["config.json"])

    def _same_mirror(self) -> list[str]:
        """The mirror's files. UserError where they are another run's."""
        assert self._mirror is not None
        there = self._mirror.names()
        if "config.json" in there:
            require_same_run(self._mirror.read("config.json"), self._describe, self._mirror.url)
        return there

    def settle(self) -> None:
        """Wait until the mirror has all checkpoints. UserError where it cannot have them."""
        if self._mirror is None:
            return
        if self._uploading is not None:
            self._uploading.result()
        self._upload()  # what was saved meanwhile, or could not be copied

    def _start_upload(self) -> None:
        # One that is still running leaves what it does not see to the next.
        if self._uploads is not None and (self._uploading is None or self._uploading.done()):
            self._uploading = self._uploads.submit(self._try_upload)

    def _try_upload(self) -> None:
        try:
            self._upload()
        except (OSError, UserError) as error:  # OSError: deleted meanwhile, as an old one
            self._say(
                f"not mirrored: {in_words(error)}; it is tried again with the next checkpoint"
            )

    def _upload(self) -> None:
        assert self._mirror is not None
        there = self._same_mirror()
        for step in self.steps():
            path = checkpoint.checksums_path(self.folder, step)
            if not path.exists():
                continue
            content, checksums = path.read_text(errors="replace"), path.name
            if self._mirrored.get(step) == content:
                continue
            rest = [file.name for file in self._files(step) if file != path]
            if checksums not in there or self._mirror.read(checksums) != content:
                beside = [name for name in RUN_FILES if (self.folder / name).exists()]
                self._mirror.delete([checksums])
                self._mirror.upload([*rest, *beside, checksums])
                self._say(f"mirrored the checkpoint of step {step}")
            self._mirrored[step] = content
        gone, self._deleted = self._deleted, []
        self._mirror.delete(gone)


def _bytes(content: Any) -> int:
    """The size of the tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(_bytes, content.values()))
    return sum(map(_bytes, content)) if isinstance(content, (list, tuple)) else 0
