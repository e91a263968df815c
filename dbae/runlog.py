"""What a run tells: log lines, a progress bar, progress.csv, and optional services."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_text

# One row of progress.csv. The last two depend on the machine's speed, the others do not.
COLUMNS = (
    "step", "images", "loss", "xs_mse", "grad_norm", "grad_norm_encoder", "z_norm", "z_std",
    "z_dead", "replaced_images", "images_per_s", "seconds",
)  # fmt: skip


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
        self.max_steps = max_steps
        self._cut_after(step)
        self._service = _service(logger, folder, config)
        self._bar = tqdm(
            total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty(),
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        self._mark = (time.perf_counter(), step)
        self._paused = self._mark[0]

    def say(self, text: str) -> None:
        """Print a line without disturbing the progress bar."""
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

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
        seconds = (now - self._mark[0]) / max(step - self._mark[1], 1)
        self._mark = (now, step)
        row = {**row, "images_per_s": global_batch / seconds, "seconds": seconds}
        text = io.StringIO()
        writer = csv.writer(text)
        if not self.path.exists():
            writer.writerow(COLUMNS)
        writer.writerow([_cell(row[name]) for name in COLUMNS])
        with open(self.path, "a", newline="") as file:
            file.write(text.getvalue())
        eta = seconds * (self.max_steps - step)
        self.say(
            f"step={step}/{self.max_steps} loss={row['loss']:.4f} xs_mse={row['xs_mse']:.5f} "
            f"grad={row['grad_norm']:.3g} grad_enc={row['grad_norm_encoder']:.3g} "
            f"|z|={row['z_norm']:.3g} z_dead={row['z_dead']:.0%} "
            f"img/s={row['images_per_s']:.1f} eta={duration(eta)} next_ckpt={next_checkpoint}"
            + (f" replaced_images={row['replaced_images']}" if row["replaced_images"] else "")
        )
        if self._service is not None:
            self._service({k: v for k, v in row.items() if k != "step"}, step)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _cut_after(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines[1:] if line.split(",")[0].isdigit()]
        kept = [line for line in kept if int(line.split(",")[0]) <= step]
        write_text(self.path, "\n".join([",".join(COLUMNS), *kept]) + "\n")


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
