"""What a run's folder holds, read without trusting any of it."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..checkpoint import step_of
from ..errors import UserError
from ..evaluation.results import METRICS_FILE, UNFINISHED
from .blocks import Block, Text
from .reading import LARGEST, Malformed, Node, read_object

T = TypeVar("T")
KINDS = (
    "reconstruction", "classification", "regression", "interpolation", "manipulation", "latents",
)  # fmt: skip
_RESULT_FILES = (METRICS_FILE, "latents.json")
_EXPECTED = (
    "expected a run's folder (config.json, progress.csv, sample_STEP/…) or a folder with the "
    "metrics.json of evaluations"
)


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """Which weights a result is of: their step, −1 where it is not known, and a name."""

    step: int
    name: str

    @property
    def title(self) -> str:
        """How the report calls it."""
        return f"step {self.step:,}" if self.step >= 0 else self.name


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one evaluation."""

    path: Path
    label: str  # the path within the run's folder
    kind: str
    content: Node
    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """Where the files that belong to it lie."""
        return self.path.parent

    @property
    def id(self) -> str:
        """What tells it from others: its label, fit to be hashed whatever the file's name."""
        return self.label.encode("utf-8", "surrogateescape").hex()

    @property
    def protocol(self) -> Node:
        """How it was made; an empty object where the file does not say."""
        return self.content.find("protocol") or Node({}, "protocol")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. `problems` are (file, what is wrong), added to while the report is made."""

    root: Path
    config: Node | None
    progress: dict[str, np.ndarray]  # column → (rows,), float64; empty where there is no log
    samples: Sequence[Path]  # reconstruction grids of the training, oldest first
    results: Sequence[Result]
    problems: list[tuple[str, str]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.name or str(self.root)

    def report(self, file: str, what: str) -> Text:
        """Note a problem; returns the line that stands where the part would be."""
        self.problems.append((file, what))
        return Text(f"{file}: {what}", "problem")

    def attempt(self, file: str, make: Callable[[], Sequence[Block]]) -> list[Block]:
        """The blocks that `make` returns, or a line with the reason why there are none."""
        try:
            return list(make())
        except Malformed as error:
            return [self.report(file, str(error))]

    def of_kind(self, kind: str) -> list[tuple[Checkpoint, list[Result]]]:
        """The results of one kind by checkpoint, the newest first."""
        found: dict[Checkpoint, list[Result]] = {}
        for result in self.results:
            if result.kind == kind:
                found.setdefault(result.checkpoint, []).append(result)
        return sorted(found.items(), key=lambda item: (-item[0].step, item[0].name))

    def inside(self, path: Path) -> Path:
        """`path` itself, where it is a file in this folder. Malformed where it leads elsewhere."""
        try:
            real = path.resolve()
            if not real.is_relative_to(self.root):
                raise Malformed(f"refers to {path.name}, which is outside of the run's folder")
            if not real.is_file():
                raise Malformed(f"{path.name} is not there")
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, a loop
            raise Malformed(f"refers to a file by an impossible name ({error})") from error
        return real


def read_run(run_dir: Path) -> Run:
    """Find and read what there is to report.

    Raises UserError where `run_dir` is no folder, holds nothing to report, or several runs.
    """
    if not run_dir.exists():
        raise UserError(f"{run_dir} does not exist; {_EXPECTED}")
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; {_EXPECTED}")
    root = run_dir.resolve()
    run = Run(root, None, {}, _samples(root), [], [])
    config = root / "config.json"
    with_log = (root / "progress.csv").is_file()
    if not config.is_file() and not with_log:
        _refuse_several(root, run_dir)
    run = dataclasses.replace(
        run,
        config=_or_problem(run, config.name, lambda: read_object(config), config.is_file()),
        progress=_or_problem(run, "progress.csv", lambda: _read_progress(run), with_log) or {},
        results=[result for path in _result_files(root) if (result := _read_result(run, path))],
    )
    if not (run.config or with_log or run.samples or run.results or run.problems):
        raise UserError(f"{run_dir} holds nothing to report; {_EXPECTED}")
    return run


def _samples(root: Path) -> list[Path]:
    """samples/{step}.png by step: a million comes after 990000."""
    found = {path: re.fullmatch(r"\d{1,15}", path.stem) for path in root.glob("samples/*.png")}
    return sorted(found, key=lambda path: (int(path.stem) if found[path] else -1, path.name))


def _or_problem(run: Run, file: str, read: Callable[[], T], exists: bool) -> T | None:
    """What `read` returns; None where the file is absent or malformed, which is noted."""
    try:
        return read() if exists else None
    except Malformed as error:
        run.report(file, str(error))
        return None


def _refuse_several(root: Path, run_dir: Path) -> None:
    runs = sorted(path.parent.name for path in root.glob("*/config.json"))
    if runs:
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        raise UserError(
            f"{run_dir} is no run's folder but holds the runs {', '.join(runs[:3])}{more}; "
            "give one of them"
        )


def _result_files(root: Path) -> Iterator[Path]:
    """All files that may be results, in a fixed order; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name != UNFINISHED and not name.startswith(".")
        )
        yield from (Path(folder, name) for name in _RESULT_FILES if name in files)


def _read_result(run: Run, path: Path) -> Result | None:
    label = path.relative_to(run.root).as_posix()
    try:
        content = read_object(run.inside(path))
        kind = _kind(content)
    except Malformed as error:
        run.report(label, str(error))
        return None
    return Result(path, label, kind, content, _checkpoint(run.root, path, content))


def _kind(content: Node) -> str:
    stated = content.get("kind")
    if stated is None:
        if content.get("mse") and content.get("per_image"):  # written before there were kinds
            return "reconstruction"
        raise Malformed("lacks kind, so that its content is unknown")
    if stated.text() not in KINDS:
        raise Malformed(f"is of kind {stated.text()!r}; this report knows {', '.join(KINDS)}")
    return stated.text()


def _checkpoint(root: Path, path: Path, content: Node) -> Checkpoint:
    """By the nearest folder `sample_…`, else by the name of the weights in the protocol."""
    for folder in path.parents:
        if found := re.fullmatch(r"sample_(?:(\d{1,15})|(.+))", folder.name):
            return Checkpoint(int(found[1]), "") if found[1] else Checkpoint(-1, found[2])
        if folder == root:
            break
    stated = content.find("protocol", "checkpoint")
    if stated is None or not isinstance(stated.value, str):
        return Checkpoint(-1, "unnamed checkpoint")
    name = stated.value[:200]
    step = step_of(Path(name)) if re.search(r"_\d{1,15}\.pt$", name) else -1
    return Checkpoint(step, "" if step >= 0 else name.removesuffix(".pt"))


def _read_progress(run: Run) -> dict[str, np.ndarray]:
    """The columns of progress.csv, with NaN for what is not finite.

    Rows that are no rows of numbers are left out and noted.
    """
    path = run.root / "progress.csv"
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            head, *lines = list(csv.reader(file)) or [[]]
    except (OSError, csv.Error) as error:
        raise Malformed(f"cannot be read ({error})") from error
    if "step" not in head:
        raise Malformed("has no column named step")
    step = head.index("step")
    rows = [
        row for line in lines if (row := _numbers(line, len(head))) and abs(row[step]) < LARGEST
    ]
    if len(rows) < len(lines):
        run.report(path.name, f"{len(lines) - len(rows)} of {len(lines)} rows are not readable")
    if not rows:
        raise Malformed("has no rows")
    columns = np.asarray(rows, dtype=np.float64).T
    columns[~(np.abs(columns) < LARGEST)] = np.nan
    return dict(zip(head, columns, strict=True))


def _numbers(line: Sequence[str], length: int) -> list[float]:
    """A row's numbers, NaN included; empty where it is not a whole row."""
    try:
        return [float(cell) for cell in line] if len(line) == length else []
    except ValueError:
        return []
