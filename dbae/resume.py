"""What a run goes on from: its own checkpoints, another's, or nothing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoint
from .errors import UserError
from .store import CheckpointStore, require_same_run


class Start(NamedTuple):
    """A checkpoint (folder and step), or only weights, or neither; and what to tell of it."""

    folder: Path
    step: int | None
    weights: Path | None
    notes: list[str]


def find_start(store: CheckpointStore, describe: dict[str, Any], resume: Path | None) -> Start:
    """What to go on from in the run's folder, or from `resume`, a weight file or a folder.

    Once the run has checkpoints of its own, one from elsewhere was its start, and is left alone. An
    earlier one of its own is gone back to once: the same command again goes on from the newest.

    Args:
        store: the run's.
        describe: what config.json is to hold.
        resume: as the user gave it.

    Raises:
        UserError: the folder holds another run, `resume` is absent, or nothing there is whole.
    """
    notes = store.restore()
    own = store.steps()
    if own:
        require_same_run(_stored(store), describe, store.folder)
    if resume is not None:
        path = checkpoint.newest_weights(resume)
        if not path.is_file():
            raise UserError(f"checkpoint {path} does not exist")
        folder, step = path.parent, checkpoint.step_of(path)
        if own and folder.resolve() != store.folder.resolve():
            notes.append(f"{store.folder} has checkpoints of its own, {path} is left alone")
        elif own and _stored(store).get("start") == describe["start"]:
            notes.append(f"the run went back to {path} before, and goes on")
        elif checkpoint.state_path(folder, step).is_file():
            notes += store.go_back(step) if own else []
            return Start(folder, step, None, [*notes, f"resuming from step {step} in {folder}"])
        else:
            note = f"starting from the weights of {path} (no training state beside it)"
            return Start(folder, None, path, [*notes, note])
    newest, passed_over = store.newest_whole()
    note = "starting from new weights"
    if newest is not None:
        note = f"resuming from step {newest} in {store.folder}"
    return Start(store.folder, newest, None, [*notes, *passed_over, note])


def _stored(store: CheckpointStore) -> Any:
    """The run's configuration: config.json, or where that is damaged, what a checkpoint holds."""
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((store.folder / "config.json").read_text())
        if isinstance(stored, dict) and {"model", "train", "data"} <= stored.keys():
            return stored
    newest, _ = store.newest_whole()
    assert newest is not None  # there are checkpoints, and none whole would have raised
    state = checkpoint.load_file(checkpoint.state_path(store.folder, newest))
    return json.loads(state["config"])
