"""What a run's folder holds, whatever its state."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..checkpoint import step_of
from ..errors import UserError
from ..evaluation.results import METRICS_FILE, UNFINISHED

T = TypeVar("T")
KINDS = (
    "reconstruction", "classification", "regression", "interpolation", "manipulation", "latents",
)  # fmt: skip
_LARGEST = 1e100  # far beyond any figure, far below where arithmetic overflows
_EXPECTED = (
    "expected a run's folder (config.json, progress.csv, sample_STEP/…) or a folder with the "
    "metrics.json of evaluations"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one evaluation."""

    folder: Path
    label: str  # the file's path within the run's folder
    kind: str
    content: dict[str, Any]
    step: int  # of the checkpoint; −1 where it is not known
    checkpoint: str  # how the report calls it

    @property
    def protocol(self) -> dict[str, Any]:
        """How it was made; empty where the file does not say."""
        return _object(self.content.get("protocol"))


@dataclasses.dataclass
class Run:
    """A run's folder. `problems` are (file, what is wrong), added to while the report is made."""

    root: Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    # column → (rows,), float64; empty where there is no log
    progress: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    samples: Sequence[Path] = ()  # reconstruction grids of the training, oldest first
    results: Sequence[Result] = ()
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def of_kind(self, kind: str) -> dict[str, list[Result]]:
        """The results of one kind by checkpoint, the newest first."""
        found: dict[str, list[Result]] = {}
        for result in sorted(self.results, key=lambda result: (-result.step, result.checkpoint)):
            if result.kind == kind:
                found.setdefault(result.checkpoint, []).append(result)
        return found

    def setting(self, part: str, key: str) -> Any:
        """config[part][key]; None where there is none."""
        return _object(self.config.get(part)).get(key)


def read_run(run_dir: Path) -> Run:
    """Find and read what there is to report.

    Raises UserError where `run_dir` is no folder, holds nothing to report, or several runs.
    """
    if not run_dir.is_dir():
        what = "is a file" if run_dir.exists() else "does not exist"
        raise UserError(f"{run_dir} {what}; {_EXPECTED}")
    run = Run(run_dir.resolve())
    config, log = run.root / "config.json", run.root / "progress.csv"
    if not config.is_file() and not log.is_file():
        _refuse_several(run.root, run_dir)
    if config.is_file():
        run.config = _tried(run, config, partial(_read_object, config)) or {}
    if log.is_file():
        run.progress = _tried(run, log, partial(_read_progress, run, log)) or {}
    run.samples = _samples(run.root)
    found = [_tried(run, path, partial(_read_result, run, path)) for path in _results(run.root)]
    run.results = [result for result in found if result]
    if not (run.config or run.progress or run.samples or run.results or run.problems):
        raise UserError(f"{run_dir} holds nothing to report; {_EXPECTED}")
    return run


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tried(run: Run, path: Path, read: Callable[[], T]) -> T | None:
    """What `read` returns; None where it fails, which is noted."""
    try:
        return read()
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        run.problems.append((path.relative_to(run.root).as_posix(), what))
        return None


def _refuse_several(root: Path, run_dir: Path) -> None:
    runs = sorted(path.parent.name for path in root.glob("*/config.json"))
    if runs:
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        raise UserError(
            f"{run_dir} is no run's folder but holds the runs {', '.join(runs[:3])}{more}; "
            "give one of them"
        )


def _samples(root: Path) -> list[Path]:
    """samples/{step}.png by step: a million comes after 990000."""
    return sorted(root.glob("samples/*.png"), key=lambda path: (len(path.name), path.name))


def _results(root: Path) -> Iterator[Path]:
    """All files that may be results, in a fixed order; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(n for n in folders if n != UNFINISHED and not n.startswith("."))
        yield from (Path(folder, n) for n in (METRICS_FILE, "latents.json") if n in files)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. A number that is not finite, or beyond any figure, is None."""

    def number(text: str) -> int | float | None:
        value = float(text)
        if not abs(value) < _LARGEST:  # NaN too
            return None
        return int(text) if re.fullmatch(r"-?\d+", text) else value

    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text, parse_float=number, parse_int=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("does not hold a JSON object")
    return content


def _read_result(run: Run, path: Path) -> Result:
    content = _read_object(path)
    kind = content.get("kind")
    if kind is None and content.get("mse") and content.get("per_image"):
        kind = "reconstruction"  # written before there were kinds
    if kind is None:
        raise ValueError("lacks kind, so that its content is unknown")
    if kind not in KINDS:
        raise ValueError(f"is of kind {kind!r}; this report knows {', '.join(KINDS)}")
    label = path.relative_to(run.root).as_posix()
    folders = [run.root.name, *label.split("/")[:-1]]
    return Result(path.parent, label, kind, content, *_checkpoint(folders, content))


def _checkpoint(folders: Sequence[str], content: dict[str, Any]) -> tuple[int, str]:
    """By the nearest folder `sample_…`, else by the name of the weights in the protocol."""
    for folder in reversed(folders):
        if found := re.fullmatch(r"sample_(?:(\d{1,15})|(.+))", folder):
            return (int(found[1]), f"step {int(found[1]):,}") if found[1] else (-1, found[2])
    name = str(_object(content.get("protocol")).get("checkpoint") or "unnamed checkpoint")[:200]
    step = step_of(Path(name)) if re.search(r"_\d{1,15}\.pt$", name) else -1
    return step, f"step {step:,}" if step >= 0 else name.removesuffix(".pt")


def _read_progress(run: Run, path: Path) -> dict[str, np.ndarray]:
    """The columns of progress.csv, with NaN for what is not finite.

    Rows that are no rows of numbers are left out and noted.
    """
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        head, *lines = list(csv.reader(file)) or [[]]
    if "step" not in head:
        raise ValueError("has no column named step")
    found = np.array([row for line in lines if (row := _numbers(line, len(head)))])
    found = found.reshape(-1, len(head))
    found[~(np.abs(found) < _LARGEST)] = np.nan
    rows = found[np.isfinite(found[:, head.index("step")])]
    if len(rows) < len(lines):
        problem = f"{len(lines) - len(rows)} of {len(lines)} rows are not readable"
        run.problems.append((path.name, problem))
    if not len(rows):
        raise ValueError("has no rows")
    return dict(zip(head, rows.T, strict=True))


def _numbers(line: Sequence[str], length: int) -> list[float]:
    """A row's numbers, NaN included; empty where it is not a whole row."""
    try:
        return [float(cell) for cell in line] if len(line) == length else []
    except ValueError:
        return []
