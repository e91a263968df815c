"""The sections on linear probes of z: classification, regression, disentanglement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from . import plots
from .blocks import (
    Bar,
    Bars,
    Block,
    Body,
    Cell,
    Facts,
    Fold,
    Plot,
    Plots,
    Section,
    Table,
    Text,
)
from .folder import Result, Run
from .parts import (
    by_checkpoint,
    checkpoint_of,
    command,
    data_of,
    each,
    essentials,
    lacking,
    protocol_fold,
    section,
    text_or,
)
from .reading import Estimate, Malformed, Node, estimate, number_of
from .text import NONE, decimal, figure_cell, name_cell, number_cell, whole

OURS = "DBAE"
_CONVERGED = ("converged", "ridge")  # names of probes that stand at the minimum of their loss


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
    title: str
    measures: tuple[Measure, Measure]
    base_key: str | None  # an attribute's member that marks its bar; None: the mark is at 0
    base_meaning: str  # of that mark
    valid: str  # the history's figure on validation data
    command: str


CLASSIFICATION = Task(
    "classification", "Classification probes",
    (Measure("ap", "AP"), Measure("accuracy", "Accuracy")),
    "base_rate", "base rate, the AP of a random order", "valid_ap",
    "bash infer_class_dbae.sh DATASET SCHEDULE CKPT STO",
)  # fmt: skip
REGRESSION = Task(
    "regression", "Regression probes",
    (Measure("pearson_r", "Pearson's r"), Measure("mse", "MSE", lower_is_better=True)),
    None, "no correlation", "valid_mse", "bash infer_reg_dbae.sh DATASET SCHEDULE CKPT STO",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One probe of one method."""

    node: Node
    method: str
    probe: str
    figures: tuple[Estimate | None, ...]  # in the order of the task's measures; None: undefined

    @property
    def name(self) -> str:
        """Method and probe."""
        return f"{self.method}, {self.probe}"

    @property
    def rank(self) -> float:
        """The first figure, −∞ where it is undefined."""
        return self.figures[0].value if self.figures[0] else -math.inf


def read_rows(task: Task, content: Node) -> list[Row]:
    """The probes of a result. Malformed where one lacks its method or first figure."""
    first, second = (measure.key for measure in task.measures)
    rows = []
    for node in content["rows"].items():
        probe = text_or(node.get("probe"), "probe not named")
        figures = estimate(node[first]), estimate(node.get(second))
        rows.append(Row(node, node["method"].text(), probe, figures))
    if not rows:
        raise Malformed("rows is empty")
    return rows


def main_row(rows: Sequence[Row]) -> Row:
    """The row that a result is judged by: the converged probe of z, else the first of z."""
    ours = [row for row in rows if row.method == OURS] or list(rows)
    return next((row for row in ours if row.probe in _CONVERGED), ours[0])


def make(run: Run, task: Task) -> Section:
    """Tables, bars and history of every result of the task."""
    found = by_checkpoint(run, task.kind, each(run, partial(_result, run, task)))
    absent = command(run, f"No {task.kind} probe", task.command)
    return section(task.kind, task.title, absent, found)


def _result(run: Run, task: Task, result: Result) -> list[Block]:
    rows = read_rows(task, result.content)
    main = main_row(rows)
    blocks = lacking(run, result, "protocol", "base_rate")
    blocks.append(_table(task, result, rows))
    for part in (_published, _bars, _attributes, _history):
        blocks += run.attempt(result.label, partial(part, task, result, rows, main))
    blocks += run.attempt(result.label, partial(_left_out, result))
    return [*blocks, protocol_fold(result)]


# Tables ---------------------------------------------------------------------------------------


def _table(task: Task, result: Result, rows: Sequence[Row]) -> Table:
    """A row for each method and probe, the best of each column in bold."""
    best = [_best(measure, i, rows) for i, measure in enumerate(task.measures)]

    def cells(row: Row) -> list[Cell]:
        figures = [
            figure_cell(figure, best=figure is not None and figure.value == top)
            for figure, top in zip(row.figures, best, strict=True)
        ]
        sizes = [whole(row.node.get(key)) for key in ("dim", "n_train", "n_valid", "n_test")]
        epoch = whole(row.node.get("best_epoch") or row.node.get("epoch"))
        return [
            name_cell(row.method), name_cell(row.probe), *figures,
            *(number_cell(size) for size in [*sizes, epoch]),
        ]  # fmt: skip

    bodies = [Body([cells(row) for row in rows])]
    if base := result.content.get("base_rate"):
        figures = [figure_cell(estimate(base.get(m.key))) for m in task.measures]
        blank = [number_cell(NONE)] * 5
        bodies.append(Body([[name_cell("knowing nothing"), name_cell(NONE), *figures, *blank]]))
    interval = text_or(result.protocol.find("interval"), "95 % bootstrap intervals")
    caption = (
        f"Linear probes, {task.kind}: means over attributes on the test part; in brackets: "
        f"{interval}. Best of each column in bold. {essentials(result.protocol)}"
    )
    head = (
        "Features", "Probe", *(measure.title for measure in task.measures),
        "Dim.", "n train", "n valid", "n test", "Epoch",
    )  # fmt: skip
    return Table(caption, head, bodies, [note for row in rows for note in _notes(row)])


def _notes(row: Row) -> list[str]:
    """What the table cannot say of a row."""
    notes = [f"{row.name}: {row.node['note'].text()}."] if row.node.get("note") else []
    if (names := row.node.get("not_converged")) and names.items():
        notes.append(f"{row.name}: not converged for {', '.join(names.texts())}.")
    if undefined := number_of(row.node.get("undefined")):
        notes.append(f"{row.name}: undefined for {undefined:g} attributes, left out of the mean.")
    return notes


def _best(measure: Measure, i: int, rows: Sequence[Row]) -> float | None:
    values = [figure.value for row in rows if (figure := row.figures[i])]
    if len(values) < 2:
        return None
    return min(values) if measure.lower_is_better else max(values)


def _published(task: Task, result: Result, rows: Sequence[Row], main: Row) -> list[Block]:
    """The paper's rows, where the file has them."""
    published = result.content.get("published")
    if published is None or not published.items():
        return []
    rows_of: dict[str, dict[str, Node]] = {}  # method → trained on → row
    for row in published.items():
        trained = text_or(row.get("trained_on"), "not stated")
        rows_of.setdefault(row["method"].text(), {})[trained] = row
    sets = list(dict.fromkeys(name for found in rows_of.values() for name in found))
    columns = [
        (name, measure)
        for name in sets
        for measure in task.measures
        if any(found[name].get(measure.key) for found in rows_of.values() if name in found)
    ]
    body = [
        [
            name_cell(method),
            *(
                number_cell(decimal(number_of(found[name].get(m.key) if name in found else None)))
                for name, m in columns
            ),
        ]
        for method, found in rows_of.items()
    ]
    caption = (
        "Published, not measured here: Table 1 of the DBAE paper, linear probes by the paper's "
        "recipe on z of 512 numbers, by the data that the model was trained on."
    )
    head = ("Method", *(f"{name}: {measure.title}" for name, measure in columns))
    return [Table(caption, head, [Body(body)], tone="published")]


# Attributes -----------------------------------------------------------------------------------


def _attributes_of(row: Row) -> list[tuple[str, Node]]:
    """(name, its object) of each attribute."""
    attributes = row.node.get("attributes")
    return [(node["name"].text(), node) for node in (attributes.items() if attributes else [])]


def _bars(task: Task, result: Result, rows: Sequence[Row], main: Row) -> list[Block]:
    """One bar per attribute of the row that the result is judged by."""
    key, base = task.measures[0].key, task.base_key
    bars = [
        Bar(name, figure, (number_of(node.get(base)) or 0.0) if base else 0.0)
        for name, node in _attributes_of(main)
        if (figure := estimate(node.get(key)))
    ]
    if not bars:
        return []
    bars.sort(key=lambda bar: (-bar.figure.value, bar.name))
    lowest = min(min(bar.figure.value, bar.figure.low or 0.0) for bar in bars)
    measure = task.measures[0].name
    low = 0.0 if lowest >= 0 else -1.0 if lowest < -0.5 else -0.5
    caption = (
        f"{measure} of each of {len(bars)} attributes: {main.name}; n = "
        f"{whole(main.node.get('n_test'))} test images, {data_of(result.protocol)}, "
        f"{checkpoint_of(result.protocol)}. Axis from {low:g} to 1; whisker: 95 % interval; "
        f"upright line: {task.base_meaning}."
    )
    return [Bars(caption, measure, "base rate" if base else "", bars, low, 1.0)]


def _attributes(task: Task, result: Result, rows: Sequence[Row], main: Row) -> list[Block]:
    """All figures of all attributes and rows, folded."""
    tables = []
    for row in rows:
        body = [
            [
                name_cell(name), *(figure_cell(estimate(node.get(m.key))) for m in task.measures),
                number_cell(decimal(number_of(node.get(task.base_key or "variance")))),
            ]
            for name, node in _attributes_of(row)
        ]  # fmt: skip
        last = "Base rate" if task.base_key else "Variance"
        if body:
            caption = f"{row.name}; n = {whole(row.node.get('n_test'))} test images."
            titles = [measure.title for measure in task.measures]
            tables.append(Table(caption, ("Attribute", *titles, last), [Body(body)]))
    return [Fold("Every attribute, every probe", tables)] if tables else []


def _history(task: Task, result: Result, rows: Sequence[Row], main: Row) -> list[Block]:
    """Training loss and validation figure of the paper's probe, per method."""
    histories: dict[str, list[Node]] = {}
    for row in rows:
        if (history := row.node.get("history")) and history.items():
            histories.setdefault(row.method, history.items())
    if not histories:
        return []
    names = list(histories)[: plots.SERIES]
    lengths = max(len(histories[name]) for name in names)
    epochs = np.arange(1, lengths + 1)
    valid = task.valid.replace("valid_", "").upper()
    drawn = []
    for key, title in (("train_loss", "Training loss"), (task.valid, f"{valid} on validation")):
        series = [_padded([number_of(e.get(key)) for e in histories[n]], lengths) for n in names]
        if any(np.isfinite(y).any() for y in series):
            id = f"history{key}{result.id}"
            svg = plots.lines(id, title, epochs, series, x_label="epoch", markers=True)
            drawn.append(Plot(title, svg, names))
    sizes = {whole(row.node.get("n_valid")) for row in rows if row.method in names}
    caption = (
        f"The paper's probe, epoch by epoch: n valid = {', '.join(sorted(sizes))}; "
        f"{checkpoint_of(result.protocol)}."
    )
    return [Plots(caption, drawn)] if drawn else []


def _padded(values: Sequence[float | None], length: int) -> np.ndarray:
    filled = [np.nan if value is None else value for value in values]
    return np.asarray(filled + [np.nan] * (length - len(filled)), dtype=np.float64)


def _left_out(result: Result) -> list[Block]:
    left_out = result.content.get("left_out")
    if left_out is None or not left_out.items():
        return []
    parts = [
        f"{item['name'].text()} ({text_or(item.get('reason'), 'no reason given')})"
        for item in left_out.items()
    ]
    return [Text(f"Left out: {'; '.join(parts)}.", "note")]


# Disentanglement ------------------------------------------------------------------------------


def disentanglement(run: Run) -> Section:
    """TAD of every classification result that has it."""
    found = by_checkpoint(run, "classification", each(run, _tad))
    absent = command(run, "No disentanglement (TAD) computed", CLASSIFICATION.command)
    return section("disentanglement", "Disentanglement", absent, found)


def _tad(result: Result) -> list[Block]:
    node = result.content.get("disentanglement")
    if node is None:
        return []
    captured = f"{whole(node.get('captured'))} of {whole(node.get('considered'))}"
    facts = Facts([("TAD", decimal(node["tad"].number())), ("Attributes captured", captured)])
    rows = result.content.find("rows")
    n = whole(rows.items()[0].get("n_test")) if rows and rows.items() else NONE
    definition = text_or(node.get("definition"), "")
    note = f"n = {n} test images. {essentials(result.protocol)} {definition}"
    return [facts, Text(note, "note"), *_dimensions(node)]


def _dimensions(node: Node) -> list[Block]:
    """The best dimension of each attribute, where the file has it."""
    attributes = node.get("attributes")
    if attributes is None or not attributes.items():
        return []
    found = [
        (entry["best"].number(), entry["second"].number(), entry["name"].text(), entry)
        for entry in attributes.items()
    ]
    found.sort(key=lambda item: (item[1] - item[0], item[2]))
    rows = [
        [
            name_cell(name), number_cell(whole(entry.get("dimension"))),
            number_cell(decimal(best)), number_cell(decimal(second)),
            number_cell(decimal(best - second)),
        ]
        for best, second, name, entry in found
    ]  # fmt: skip
    head = ("Attribute", "Dimension of z", "Best AUROC", "Second", "Difference")
    caption = "The dimensions of z that tell most about each attribute considered."
    return [Fold("Every attribute considered", [Table(caption, head, [Body(rows)])])]
