"""What a run goes on from: its own checkpoints, another's, or nothing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoint
from .errors import UserError
from .store import CheckpointStore


class Start(NamedTuple):
    """A checkpoint (folder and step), or only weights, or neither; and what to tell of it."""

    folder: Path
    step: int | None
    weights: Path | None
    notes: list[str]


def find_start(store: CheckpointStore, describe: dict[str, Any], resume: Path | None) -> Start:
    """What to go on from in the run's folder, or from `resume`, a weight file or a folder.

    Once the run has checkpoints of its own, one from elsewhere was its start, and is left alone.

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
        _require_same_run(store, describe)
    if resume is not None:
        path = checkpoint.newest_weights(resume)
        if not path.is_file():
            raise UserError(f"checkpoint {path} does not exist")
        folder, step = path.parent, checkpoint.step_of(path)
        if own and folder.resolve() != store.folder.resolve():
            notes.append(f"{store.folder} has checkpoints of its own, {path} is left alone")
        elif checkpoint.state_path(folder, step).is_file():
            return Start(folder, step, None, [*notes, f"resuming from step {step} in {folder}"])
        else:
            note = f"starting from the weights of {path} (no training state beside it)"
            return Start(folder, None, path, [*notes, note])
    newest, passed_over = store.newest_whole()
    note = "starting from new weights"
    if newest is not None:
        note = f"resuming from step {newest} in {store.folder}"
    return Start(store.folder, newest, None, [*notes, *passed_over, note])


def _require_same_run(store: CheckpointStore, describe: dict[str, Any]) -> None:
    """Refuse to go on with a run of another model, seed or data."""
    stored = _stored(store)
    earlier = {**stored["model"], "seed": stored["train"]["seed"]}
    ours = json.loads(json.dumps({**describe["model"], "seed": describe["train"]["seed"]}))
    changed = [f"{k} {earlier.get(k)} → {v}" for k, v in ours.items() if earlier.get(k) != v]
    if stored["data"]["fingerprint"] != describe["data"]["fingerprint"]:
        changed.append(f"{stored['data']['n']} other images → {describe['data']['n']}")
    if changed:
        raise UserError(
            f"{store.folder} holds another run ({'; '.join(changed)}); "
            "use the same flags and data, or another --workdir (--resume this one to go on)"
        )


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
