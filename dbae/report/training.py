"""The section on training: curves from progress.csv, and the grids drawn on the way."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup

from . import plots, text
from .folder import Run
from .page import Page

_EARLIER = 8  # grids shown of all before the newest
# Drawings: (title, {column of progress.csv: its name}, logarithmic?).
_PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss (weighted)", {"loss": ""}, True),
    ("xs_mse: unweighted error of D", {"xs_mse": ""}, True),
    ("Gradient norm", {"grad_norm": "all", "grad_norm_encoder": "encoder"}, True),
    ("Size of z", {"z_norm": "mean norm |z|", "z_std": "mean std of a dimension"}, True),
    ("Dead dimensions of z", {"z_dead": ""}, False),
    ("Images per second", {"images_per_s": ""}, False),
)


def make(page: Page) -> Markup:
    """Curves and grids, as far as they are there."""
    shown = Markup()
    if page.run.progress:
        shown += page.attempt("progress.csv", "", partial(_curves, page))
    newest, earlier = page.run.samples[-1:], page.run.samples[-2::-1]
    chosen = earlier[:: max(1, -(-len(earlier) // _EARLIER))]
    shown += _grids(page, newest)
    if chosen:
        title = f"{len(chosen)} of {len(earlier)} earlier grids"
        shown += page.html.fold(title, _grids(page, chosen))
    return shown


def _curves(page: Page) -> Markup:
    progress = page.run.progress
    steps = progress["step"]
    window = 2 * max(1, len(steps) // 50) + 1
    drawn, absent, gaps = [], [], []
    for title, columns, log in _PANELS:
        there = {c: progress[c] for c in columns if np.isfinite(progress.get(c, [])).any()}
        absent += [c for c in columns if c not in there]
        lost = {c: int((~np.isfinite(values)).sum()) for c, values in there.items()}
        gaps += [f"{c} ({rows} rows)" for c, rows in lost.items() if rows]
        if there:
            svg = plots.lines(
                "training", title, steps, list(there.values()), "step",
                log=log, percent="z_dead" in there, smooth=window,
            )  # fmt: skip
            drawn.append((title, svg, [columns[c] for c in there] if len(columns) > 1 else ()))
    shown = page.html.text(_last_row(page.run))
    if absent:
        shown += page.problem("progress.csv", f"has no values of {', '.join(absent)}")
    if gaps:  # as a training that diverged has
        shown += page.problem("progress.csv", f"has values that are not finite: {', '.join(gaps)}")
    caption = (
        f"Training, from the {text.count(len(steps))} rows of progress.csv, each a mean over the "
        f"steps since the row before. Thin: as logged; thick: mean over {window} rows."
    )
    return shown + page.html.plots(drawn, caption) if drawn else shown


def _last_row(run: Run) -> str:
    """Where the training stands, in words."""
    last = {name: column[-1] for name, column in run.progress.items() if np.isfinite(column[-1])}
    said = f"Logged up to step {text.count(last['step'])}"
    if "images" in last:
        said += f" ({text.count(last['images'])} images)"
    figures = [
        f"{name} {text.decimal(last[column], 4)}"
        for column, name in {"loss": "loss", "xs_mse": "xs_mse", "z_norm": "|z|"}.items()
        if column in last
    ]
    said += f"; the last row has {', '.join(figures)}." if figures else "."
    if replaced := last.get("replaced_images"):
        said += f" {text.count(replaced)} unreadable images were replaced."
    return said


def _grids(page: Page, paths: Iterable[Path]) -> Markup:
    shown = Markup()
    for path in paths:
        step = path.stem.lstrip("0") or "0"
        caption = (
            f"Originals, x_T and reconstructions by the averaged model at step {step} "
            f"(samples/{path.name})."
        )
        grid = partial(page.strip, path, caption)
        shown += page.attempt(f"samples/{path.name}", "", grid)
    return shown
