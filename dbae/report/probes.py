"""The sections on linear probes of z: classification, regression, disentanglement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from . import plots
from .folder import Result
from .page import Page
from .text import (
    NONE,
    best_of,
    checkpoint_of,
    count,
    data_of,
    decimal,
    essentials,
    estimate,
    figure,
)

_CONVERGED = ("converged", "ridge")  # names of probes that stand at the minimum of their loss
_NOTHING = "knowing nothing"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of a probe."""

    key: str
    name: str
    lower_is_better: bool = False

    @property
    def title(self) -> str:
        """With the direction that is good."""
        return f"{self.name}\N{NO-BREAK SPACE}{'↓' if self.lower_is_better else '↑'}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What differs between the two kinds of probes. The first measure ranks methods."""

    kind: str
    measures: tuple[Measure, Measure]
    scale: tuple[str, str]  # member of an attribute that its figures depend on, and its title
    mark: str  # what the upright line at each bar means: the scale, or else 0
    valid: tuple[str, str]  # the history's figure on validation data, and its name


CLASSIFICATION = Task(
    "classification", (Measure("ap", "AP"), Measure("accuracy", "Accuracy")),
    ("base_rate", "Base rate"), "base rate, the AP of a random order", ("valid_ap", "AP"),
)  # fmt: skip
REGRESSION = Task(
    "regression",
    (Measure("pearson_r", "Pearson's r"), Measure("mse", "MSE", lower_is_better=True)),
    ("variance", "Variance"), "no correlation", ("valid_mse", "MSE"),
)  # fmt: skip


def main_row(rows: Sequence[Row]) -> Row:
    """The row that a result is judged by: the converged probe of z, else the first of z."""
    ours = [row for row in rows if row["method"] == "DBAE"] or list(rows)
    return next((row for row in ours if row.get("probe") in _CONVERGED), ours[0])


def name_of(row: Row) -> str:
    """Method and probe."""
    return f"{row['method']}, {row.get('probe') or 'probe not named'}"


def make(task: Task, page: Page) -> Markup:
    """Tables, bars and history of every result of the task."""
    return page.each(task.kind, partial(_result, task, page))


def _result(task: Task, page: Page, result: Result) -> Markup:
    keys = ("rows", _table), ("published", _published), ("rows", _bars), ("rows", _attributes)
    parts = [
        (key, partial(part, task, page, result))
        for key, part in (*keys, ("rows", _history), ("left_out", _left_out))
    ]
    return page.parts(result, parts, ("rows", "base_rate"))


# Tables ---------------------------------------------------------------------------------------


def _table(task: Task, page: Page, result: Result) -> Markup:
    """A row for each method and probe, the best of each column in bold."""
    rows, base = result.content["rows"], result.content.get("base_rate")
    best = {
        m.key: best_of([estimate(row.get(m.key))[0] for row in rows], m.lower_is_better)
        for m in task.measures
    }
    cells: list[list[str]] = []
    for row in rows:
        row[task.measures[0].key]  # may be null, not absent
        figures = [figure(row.get(key), best=top) for key, top in best.items()]
        sizes = [count(row.get(key)) for key in ("dim", "n_train", "n_valid", "n_test")]
        epoch = count(row.get("best_epoch") or row.get("epoch"))
        cells.append([row["method"], row.get("probe") or NONE, *figures, *sizes, epoch])
    if base:
        cells.append([_NOTHING, NONE, *(figure(base.get(key)) for key in best), *[NONE] * 5])
    interval = result.protocol.get("interval") or "95 % bootstrap intervals"
    caption = (
        f"Linear probes, {task.kind}: means over attributes on the test part; in brackets: "
        f"{interval}. Best of each column in bold. {essentials(result.protocol)}"
    )
    titles = [measure.title for measure in task.measures]
    head = ("Features", "Probe", *titles, "Dim.", "n train", "n valid", "n test", "Epoch")
    notes = [note for row in rows for note in _notes(row)]
    return page.html.table(caption, head, cells, notes, words=(0, 1))


def _notes(row: Row) -> list[str]:
    """What the table cannot say of a row."""
    notes = [str(row["note"])] if row.get("note") else []
    if names := row.get("not_converged"):
        notes.append(f"not converged for {', '.join(names)}")
    if undefined := row.get("undefined"):
        notes.append(f"undefined for {count(undefined)} attributes, left out of the mean")
    return [f"{name_of(row)}: {note}." for note in notes]


def _published(task: Task, page: Page, result: Result) -> Markup:
    """The paper's rows, where the file has them."""
    published = result.content["published"]
    if not published:
        return Markup()
    found = {(row["method"], row["trained_on"]): row for row in published}
    columns = [
        (data, measure)
        for data in dict.fromkeys(row["trained_on"] for row in published)
        for measure in task.measures
        if measure.key in published[0]
    ]
    rows = [
        [method, *(decimal(found.get((method, data), {}).get(m.key)) for data, m in columns)]
        for method in dict.fromkeys(row["method"] for row in published)
    ]
    caption = (
        "Published, not measured here: Table 1 of the DBAE paper, linear probes by the paper's "
        "recipe on z of 512 numbers, by the data that the model was trained on."
    )
    head = ("Method", *(f"{data}: {measure.title}" for data, measure in columns))
    return page.html.table(caption, head, rows, tone="published")


def _left_out(task: Task, page: Page, result: Result) -> Markup:
    parts = [f"{entry['name']} ({entry['reason']})" for entry in result.content["left_out"]]
    return page.html.text(f"Left out: {'; '.join(parts)}.", "note") if parts else Markup()


# Attributes -----------------------------------------------------------------------------------


def _bars(task: Task, page: Page, result: Result) -> Markup:
    """One bar per attribute of the row that the result is judged by."""
    main, measure = main_row(result.content["rows"]), task.measures[0]
    with_base = task is CLASSIFICATION
    bars = []
    for attribute in main.get("attributes") or []:
        value, low, high = estimate(attribute.get(measure.key))
        if value is not None:
            base = attribute.get(task.scale[0]) or 0 if with_base else 0
            bar = {"name": attribute["name"], "value": value, "low": low, "high": high}
            bars.append({**bar, "base": base})
    if not bars:
        return Markup()
    bars.sort(key=lambda bar: (-bar["value"], bar["name"]))
    lowest = min(min(bar["value"], bar["low"] or 0) for bar in bars)
    low = 0.0 if lowest >= 0 else -1.0 if lowest < -0.5 else -0.5
    caption = (
        f"{measure.name} of each of {len(bars)} attributes: {name_of(main)}; n = "
        f"{count(main.get('n_test'))} test images, {data_of(result.protocol)}, "
        f"{checkpoint_of(result.protocol)}. Axis from {low:g} to 1; whisker: 95 % interval; "
        f"upright line: {task.mark}."
    )
    return page.html.bars(caption, measure.name, bars, low, task.scale[1] if with_base else "")


def _attributes(task: Task, page: Page, result: Result) -> Markup:
    """All figures of all attributes and rows, folded."""
    tables = Markup()
    head = ("Attribute", *(measure.title for measure in task.measures), task.scale[1])
    for row in result.content["rows"]:
        cells = [
            [
                attribute["name"],
                *(figure(attribute.get(measure.key)) for measure in task.measures),
                decimal(attribute.get(task.scale[0])),
            ]
            for attribute in row.get("attributes") or []
        ]
        caption = f"{name_of(row)}; n = {count(row.get('n_test'))} test images."
        tables += page.html.table(caption, head, cells) if cells else ""
    return page.html.fold("Every attribute, every probe", tables) if tables else tables


def _history(task: Task, page: Page, result: Result) -> Markup:
    """Training loss and validation figure of the paper's probe, per method."""
    rows = {row["method"]: row for row in result.content["rows"] if row.get("history")}
    names = list(rows)[: plots.SERIES]
    drawn = []
    for key, title in (
        ("train_loss", "Training loss"), (task.valid[0], f"{task.valid[1]} on validation"),
    ):  # fmt: skip
        series = [
            np.array([epoch.get(key) for epoch in rows[name]["history"]], dtype=np.float64)
            for name in names
        ]
        if any(np.isfinite(y).any() for y in series):
            epochs = np.arange(1, max(map(len, series)) + 1)
            drawn.append((title, plots.lines(result.label, title, epochs, series, "epoch"), names))
    sizes = ", ".join(sorted({count(rows[name].get("n_valid")) for name in names}))
    caption = (
        f"The paper's probe, epoch by epoch: n valid = {sizes}; {checkpoint_of(result.protocol)}."
    )
    return page.html.plots(drawn, caption) if drawn else Markup()


# Disentanglement ------------------------------------------------------------------------------


def disentanglement(page: Page) -> Markup:
    """TAD of every classification result that has it."""

    def part(result: Result) -> Markup:
        if result.content.get("disentanglement") is None:
            return Markup()
        return page.attempt(result.label, "disentanglement", partial(_tad, page, result))

    return page.each("classification", part)


def _tad(page: Page, result: Result) -> Markup:
    found = result.content["disentanglement"]
    captured = f"{count(found.get('captured'))} of {count(found.get('considered'))}"
    facts = page.html.facts([("TAD", decimal(found["tad"])), ("Attributes captured", captured)])
    n = count((result.content.get("rows") or [{}])[0].get("n_test"))
    note = f"n = {n} test images. {essentials(result.protocol)} {found.get('definition') or ''}"
    attributes = found.get("attributes") or []
    rows = [
        [
            a["name"],
            count(a.get("dimension")),
            *map(decimal, (a["best"], a["second"], a["best"] - a["second"])),
        ]
        for a in sorted(attributes, key=lambda a: (a["second"] - a["best"], a["name"]))
    ]
    shown = facts + page.html.text(note, "note")
    if rows:
        head = ("Attribute", "Dimension of z", "Best AUROC", "Second", "Difference")
        caption = "The dimensions of z that tell most about each attribute considered."
        table = page.html.table(caption, head, rows)
        shown += page.html.fold("Every attribute considered", table)
    return shown
