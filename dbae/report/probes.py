"""The sections on linear probes of z: classification, regression, disentanglement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from . import plots, text
from .folder import Result
from .page import Page

_CONVERGED = ("converged", "ridge")  # names of probes that stand at the minimum of their loss
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What differs between the two kinds of probes. Figures are named by their keys."""

    figures: dict[str, str]  # titles; the first ranks methods
    lower_is_better: str | None  # one of the figures
    scale: str  # what an attribute's figures depend on
    mark: str | None  # where the scale marks a bar, what it means there; else the mark is at 0
    valid: str  # the history's figure on validation data


TASKS = {
    "classification": Task(
        {"ap": "AP", "accuracy": "Accuracy"}, None, "base_rate",
        "base rate, the AP of a random order", "valid_ap",
    ),
    "regression": Task(
        {"pearson_r": "Pearson's r", "mse": "MSE"}, "mse", "variance", None, "valid_mse"
    ),
}  # fmt: skip


def first_figure(result: Result) -> tuple[str, str]:
    """Key and title of the figure that ranks methods."""
    return next(iter(TASKS[result.kind].figures.items()))


def main_row(rows: Sequence[Row]) -> Row:
    """The row that a result is judged by: the converged probe of z, else the first of z."""
    ours = [row for row in rows if row["method"] == "DBAE"] or list(rows)
    return next((row for row in ours if row.get("probe") in _CONVERGED), ours[0])


def _name(row: Row) -> str:
    return f"{row['method']}, {row.get('probe') or 'probe not named'}"


def _titles(task: Task) -> list[str]:
    """Of the figures, with the direction that is good."""
    arrows = {key: "↓" if key == task.lower_is_better else "↑" for key in task.figures}
    return [f"{title}\N{NO-BREAK SPACE}{arrows[key]}" for key, title in task.figures.items()]


def make(page: Page, result: Result) -> Markup:
    """Tables, bars and history of a result."""
    parts = (
        ("rows", _table), ("published", _published), ("rows", _bars), ("rows", _attributes),
        ("rows", _history), ("left_out", _left_out),
    )  # fmt: skip
    return page.parts(result, parts, ("protocol", "rows", "base_rate"))


# Tables ---------------------------------------------------------------------------------------


def _table(page: Page, result: Result) -> Markup:
    """A row for each method and probe, the best of each column in bold."""
    task, rows = TASKS[result.kind], result.content["rows"]
    best = {
        key: text.best_of(
            [text.estimate(row.get(key))[0] for row in rows], key == task.lower_is_better
        )
        for key in task.figures
    }
    cells: list[list[str]] = []
    for row in rows:
        row[first_figure(result)[0]]  # may be null, not absent
        figures = [text.figure(row.get(key), best=top) for key, top in best.items()]
        sizes = [text.count(row.get(key)) for key in ("dim", "n_train", "n_valid", "n_test")]
        epoch = text.count(row.get("best_epoch") or row.get("epoch"))
        cells.append([row["method"], row.get("probe") or text.NONE, *figures, *sizes, epoch])
    if base := result.content.get("base_rate"):
        figures = [text.figure(base.get(key)) for key in best]
        cells.append(["knowing nothing", text.NONE, *figures, *[text.NONE] * 5])
    interval = result.protocol.get("interval") or "95 % bootstrap intervals"
    caption = (
        f"Linear probes, {result.kind}: means over attributes on the test part; in brackets: "
        f"{interval}. Best of each column in bold. {text.essentials(result.protocol)}"
    )
    head = ("Features", "Probe", *_titles(task), "Dim.", "n train", "n valid", "n test", "Epoch")
    notes = [note for row in rows for note in _notes(row)]
    return page.html.table(caption, head, cells, notes, words=(0, 1))


def _notes(row: Row) -> list[str]:
    """What the table cannot say of a row."""
    notes = [row["note"]] if row.get("note") else []
    if names := row.get("not_converged"):
        notes.append(f"not converged for {', '.join(names)}")
    if undefined := row.get("undefined"):
        notes.append(f"undefined for {text.count(undefined)} attributes, left out of the mean")
    return [f"{_name(row)}: {note}." for note in notes]


def _published(page: Page, result: Result) -> Markup:
    """The paper's rows, where the file has them."""
    published, task = result.content["published"], TASKS[result.kind]
    if not published:
        return Markup()
    found = {(row["method"], row["trained_on"]): row for row in published}
    columns = [
        (data, key, title)
        for data in dict.fromkeys(row["trained_on"] for row in published)
        for key, title in zip(task.figures, _titles(task), strict=True)
        if key in published[0]
    ]
    rows = [
        [method, *(text.decimal(found[method, data].get(key)) for data, key, _ in columns)]
        for method in dict.fromkeys(row["method"] for row in published)
    ]
    caption = (
        "Published, not measured here: Table 1 of the DBAE paper, linear probes by the paper's "
        "recipe on z of 512 numbers, by the data that the model was trained on."
    )
    head = ("Method", *(f"{data}: {title}" for data, _, title in columns))
    return page.html.table(caption, head, rows, tone="published")


def _left_out(page: Page, result: Result) -> Markup:
    parts = [f"{entry['name']} ({entry['reason']})" for entry in result.content["left_out"]]
    return page.html.text(f"Left out: {'; '.join(parts)}.", "note") if parts else Markup()


# Attributes -----------------------------------------------------------------------------------


def _bars(page: Page, result: Result) -> Markup:
    """One bar per attribute of the row that the result is judged by."""
    task, main = TASKS[result.kind], main_row(result.content["rows"])
    key, title = first_figure(result)
    bars = []
    for attribute in main.get("attributes") or []:
        value, low, high = text.estimate(attribute.get(key))
        if value is not None:
            base = (task.mark and attribute.get(task.scale)) or 0
            bars.append((attribute["name"], value, low, high, base))
    if not bars:
        return Markup()
    bars.sort(key=lambda bar: (-bar[1], bar[0]))
    lowest = min(min(value, low or 0) for _, value, low, _, _ in bars)
    start = 0 if lowest >= 0 else -1 if lowest < -0.5 else -0.5
    caption = (
        f"{title} of each of {len(bars)} attributes: {_name(main)}; n = "
        f"{text.count(main.get('n_test'))} test images, {text.data_of(result.protocol)}, "
        f"{text.checkpoint_of(result.protocol)}. Axis from {start:g} to 1; whisker: 95 % interval; "
        f"upright line: {task.mark or 'no correlation'}."
    )
    return page.html.bars(caption, title, bars, start, bool(task.mark))


def _attributes(page: Page, result: Result) -> Markup:
    """All figures of all attributes and rows, folded."""
    task, tables = TASKS[result.kind], Markup()
    head = ("Attribute", *_titles(task), task.scale.capitalize().replace("_", " "))
    for row in result.content["rows"]:
        cells = [
            [
                attribute["name"], *(text.figure(attribute.get(key)) for key in task.figures),
                text.decimal(attribute.get(task.scale)),
            ]
            for attribute in row.get("attributes") or []
        ]  # fmt: skip
        caption = f"{_name(row)}; n = {text.count(row.get('n_test'))} test images."
        tables += page.html.table(caption, head, cells) if cells else Markup()
    return page.html.fold("Every attribute, every probe", tables) if tables else tables


def _history(page: Page, result: Result) -> Markup:
    """Training loss and validation figure of the paper's probe, per method."""
    rows = {row["method"]: row for row in result.content["rows"] if row.get("history")}
    names, valid, drawn = list(rows)[: plots.SERIES], TASKS[result.kind].valid, []
    figure = valid.removeprefix("valid_").upper()
    for key, title in (("train_loss", "Training loss"), (valid, f"{figure} on validation")):
        series = [
            np.array([epoch.get(key) for epoch in rows[name]["history"]], dtype=np.float64)
            for name in names
        ]
        if any(np.isfinite(y).any() for y in series):
            epochs = np.arange(1, max(map(len, series)) + 1)
            drawn.append((title, plots.lines(result.label, title, epochs, series, "epoch"), names))
    sizes = ", ".join(sorted({text.count(rows[name].get("n_valid")) for name in names}))
    weights = text.checkpoint_of(result.protocol)
    caption = f"The paper's probe, epoch by epoch: n valid = {sizes}; {weights}."
    return page.html.plots(drawn, caption) if drawn else Markup()


# Disentanglement ------------------------------------------------------------------------------


def disentanglement(page: Page, result: Result) -> Markup:
    """TAD of a classification result, if it has it."""
    if result.content.get("disentanglement") is None:
        return Markup()
    found, rows = result.content["disentanglement"], result.content.get("rows") or [{}]
    captured = f"{text.count(found.get('captured'))} of {text.count(found.get('considered'))}"
    facts = [("TAD", text.decimal(found["tad"])), ("Attributes captured", captured)]
    note = (
        f"n = {text.count(rows[0].get('n_test'))} test images. "
        f"{text.essentials(result.protocol)} {found.get('definition') or ''}"
    )
    shown = page.html.facts(facts) + page.html.text(note, "note")
    attributes = [
        (a["best"] - a["second"], a["best"], a["second"], a.get("dimension"), a["name"])
        for a in found.get("attributes") or []
    ]
    if attributes:
        cells = [
            [name, text.count(dimension), *map(text.decimal, (best, second, difference))]
            for difference, best, second, dimension, name in sorted(attributes, reverse=True)
        ]
        head = ("Attribute", "Dimension of z", "Best AUROC", "Second", "Difference")
        caption = "The dimensions of z that tell most about each attribute considered."
        table = page.html.table(caption, head, cells)
        shown += page.html.fold("Every attribute considered", table)
    return shown
