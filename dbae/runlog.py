"""What a run tells: log lines, a progress bar, progress.csv, and optional services."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_text

# One row of progress.csv. The last three depend on the machine's speed, the others do not.
COLUMNS = (
    "step", "images", "loss", "xs_mse", "grad_norm", "grad_norm_encoder", "z_norm", "z_std",
    "z_dead", "replaced_images", "bad_steps", "overflows", "images_per_s", "seconds", "data_wait",
)  # fmt: skip
BAD_STEPS = "bad_steps.jsonl"
# Columns that a line of the log shows only where they are not zero.
_RARE = ("replaced_images", "bad_steps", "overflows")


class RunLog:
    """Writes a run's progress; made by the main process only.

    Args:
        folder: the run's folder; progress.csv is appended to.
        step, max_steps: where the run stands and where it ends. Rows after `step`, left by an
            interrupted run, are cut.
        logger: "none", "tensorboard" or "wandb".
        config: the run's configuration, for the service.
    """

    def __init__(
        self, folder: Path, step: int, max_steps: int, logger: str, config: Mapping[str, Any]
    ) -> None:
        from tqdm import tqdm

        self.path = folder / "progress.csv"
        self._bad_steps = folder / BAD_STEPS
        self.max_steps = max_steps
        self._cut_after(step)
        self._service = _service(logger, folder, config)
        self._bar = tqdm(
            total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty(),
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        self._mark = (time.perf_counter(), step)
        self._paused = self._mark[0]
        self._waited = 0.0

    def say(self, text: str) -> None:
        """Print a line without disturbing the progress bar."""
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def waited(self, seconds: float) -> None:
        """Training stood still for so long as there was no batch."""
        self._waited += seconds

    def pause(self) -> None:
        """Stop the clock of images/s: what follows (sampling, saving) is no training."""
        self._paused = time.perf_counter()

    def unpause(self) -> None:
        """Start the clock again."""
        start, step = self._mark
        self._mark = (start + time.perf_counter() - self._paused, step)

    def write(self, row: dict[str, Any], global_batch: int, next_checkpoint: int) -> None:
        """Add a row to progress.csv and print its line; `row` holds COLUMNS but for the speed."""
        now, step = time.perf_counter(), row["step"]
        taken = now - self._mark[0]
        seconds = taken / max(step - self._mark[1], 1)
        row = {
            **row,
            "images_per_s": global_batch / seconds,
            "seconds": seconds,
            "data_wait": self._waited / taken,
        }
        self._mark, self._waited = (now, step), 0.0
        text = io.StringIO()
        writer = csv.writer(text)
        if not self.path.exists():
            writer.writerow(COLUMNS)
        writer.writerow([_cell(row[name]) for name in COLUMNS])
        _append(self.path, text.getvalue())
        eta = seconds * (self.max_steps - step)
        self.say(
            f"step={step}/{self.max_steps} loss={row['loss']:.4f} xs_mse={row['xs_mse']:.5f} "
            f"grad={row['grad_norm']:.3g} grad_enc={row['grad_norm_encoder']:.3g} "
            f"|z|={row['z_norm']:.3g} z_dead={row['z_dead']:.0%} "
            f"img/s={row['images_per_s']:.1f} data_wait={row['data_wait']:.0%} "
            f"eta={duration(eta)} next_ckpt={next_checkpoint}"
            + "".join(f" {name}={row[name]}" for name in _RARE if row[name])
        )
        if self._service is not None:
            self._service({k: v for k, v in row.items() if k != "step"}, step)

    def bad_step(self, entry: Mapping[str, Any]) -> None:
        """Add a step that was skipped to bad_steps.jsonl, one JSON object a line."""
        _append(self._bad_steps, json.dumps(entry) + "\n")

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _cut_after(self, step: int) -> None:
        """Take out what an interrupted run wrote past `step`, and lines it wrote half."""
        if self.path.exists():
            with open(self.path, newline="", errors="replace") as file:
                rows = list(csv.DictReader(line.replace("\0", "") for line in file))
            text = io.StringIO()
            # An earlier version's file may lack columns.
            writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="0")
            writer.writeheader()
            writer.writerows(r for r in rows if _step_of_row(r) <= step)
            write_text(self.path, text.getvalue())
        if self._bad_steps.exists():
            lines = self._bad_steps.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of_entry(line) <= step]
            write_text(self._bad_steps, "".join(f"{line}\n" for line in kept))


def _step_of_row(row: Mapping[str, Any]) -> float:
    text = row.get("step") or ""
    return int(text) if text.isdigit() else float("inf")


def _step_of_entry(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _append(path: Path, text: str) -> None:
    try:
        with open(path, "a", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is written later must not outlive this
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; training stops here, and the same command "
            "goes on from the last checkpoint"
        ) from error


def duration(seconds: float) -> str:
    """Seconds as "2d03h", "3h05m", "4m10s" or "12s"."""
    s = round(seconds)
    if s >= 86_400:
        return f"{s // 86_400}d{s % 86_400 // 3600:02d}h"
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, int) else f"{value:.6g}"


def _service(logger: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """A function (values, step) that logs to TensorBoard or Weights & Biases, or None."""
    if logger == "none":
        return None
    try:
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def log(values: dict[str, float], step: int) -> None:
                for name, value in values.items():
                    writer.add_scalar(f"train/{name}", value, step)
                writer.flush()

            return log
        import wandb
    except ImportError as error:
        raise UserError(
            f"--logger {logger} needs a package that is not installed: pip install {logger}"
        ) from error
    wandb.init(project="dbae", name=folder.name, dir=str(folder), config=dict(config))
    return lambda values, step: wandb.log(values, step=step)
