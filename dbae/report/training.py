"""The section on training: curves from progress.csv, and the grids drawn on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import plots
from .blocks import Block, Figure, Fold, Plot, Plots, Section, Text
from .folder import Run
from .parts import command, section
from .pictures import Album
from .text import count, decimal

_EARLIER = 8  # grids shown of all before the newest
# Columns of progress.csv that share a drawing: (title, columns, names of series, logarithmic?).
_PANELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], bool], ...] = (
    ("Loss (weighted)", ("loss",), (), True),
    ("xs_mse: unweighted error of D", ("xs_mse",), (), True),
    ("Gradient norm", ("grad_norm", "grad_norm_encoder"), ("all", "encoder"), True),
    ("Size of z", ("z_norm", "z_std"), ("mean norm |z|", "mean std of a dimension"), True),
    ("Dead dimensions of z", ("z_dead",), (), False),
    ("Images per second", ("images_per_s",), (), False),
)


def make(run: Run, album: Album) -> Section:
    """Curves and grids, as far as they are there."""
    blocks = _curves(run) + _grids(run, album)
    absent = command(run, "No training log", "bash train_dbae.sh DATASET SCHEDULE STO")
    return section("training", "Training", absent, blocks)


def _curves(run: Run) -> list[Block]:
    if not run.progress:
        return []
    steps = run.progress["step"]
    window = 2 * max(1, len(steps) // 50) + 1
    drawn, absent = [], []
    for i, (title, columns, names, log) in enumerate(_PANELS):
        there = [column for column in columns if np.isfinite(run.progress.get(column, [])).any()]
        absent += [column for column in columns if column not in there]
        if there:
            series = [run.progress[column] for column in there]
            percent = columns == ("z_dead",)
            svg = plots.lines(
                f"training{i}", title, steps, series,
                x_label="step", log=log, percent=percent, smooth=window,
            )  # fmt: skip
            shown = [name for name, c in zip(names, columns, strict=False) if c in there]
            drawn.append(Plot(title, svg, shown))
    blocks: list[Block] = [Text(_last_row(run))]
    if absent:
        blocks.append(run.report("progress.csv", f"has no values of {', '.join(absent)}"))
    if diverged := _not_finite(run, absent):
        blocks.append(run.report("progress.csv", diverged))
    caption = (
        f"Training, from the {count(len(steps))} rows of progress.csv, each a mean over the steps "
        f"since the row before. Thin: as logged; thick: mean over {window} rows."
    )
    return [*blocks, Plots(caption, drawn)] if drawn else blocks


def _not_finite(run: Run, absent: Sequence[str]) -> str:
    """Which curves have gaps, as those of a training that diverged have."""
    gaps = {
        column: int((~np.isfinite(run.progress[column])).sum())
        for _, columns, *_ in _PANELS
        for column in columns
        if column not in absent
    }
    found = [f"{column} ({gap} rows)" for column, gap in gaps.items() if gap]
    return f"has values that are not finite: {', '.join(found)}" if found else ""


def _last_row(run: Run) -> str:
    """Where the training stands, in words."""
    last = {name: column[-1] for name, column in run.progress.items() if np.isfinite(column[-1])}
    images = f" ({count(last['images'])} images)" if "images" in last else ""
    figures = [
        f"{name} {decimal(last[column], 4)}"
        for name, column in (("loss", "loss"), ("xs_mse", "xs_mse"), ("|z|", "z_norm"))
        if column in last
    ]
    text = f"Logged up to step {count(last['step'])}{images}"
    text += f"; the last row has {', '.join(figures)}." if figures else "."
    if last.get("replaced_images"):
        text += f" {count(last['replaced_images'])} unreadable images were replaced."
    return text


def _grids(run: Run, album: Album) -> list[Block]:
    """The newest grid, and up to eight earlier ones in a fold."""
    if not run.samples:
        return []
    *earlier, newest = run.samples
    every = max(1, -(-len(earlier) // _EARLIER))
    older = [block for path in earlier[::-every] for block in _grid(run, album, path)]
    shown = len(earlier[::-every])
    fold = [Fold(f"{shown} of {len(earlier)} earlier grids", older)] if older else []
    return [*_grid(run, album, newest), *fold]


def _grid(run: Run, album: Album, path: Path) -> list[Block]:
    step = path.stem.lstrip("0") or "0"
    name = f"Originals, x_T and reconstructions by the averaged model at step {step}"

    def figure() -> list[Block]:
        return [Figure(f"{name} (samples/{path.name}).", [album.load(path, name)])]

    return run.attempt(f"samples/{path.name}", figure)
