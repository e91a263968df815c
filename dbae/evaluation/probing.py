"""Linear probes of a model: classification of attributes, regression of real-valued ones.

What both share: the configuration, the three parts of the data, the features, the files written.
`classification.py` and `regression.py` hold what differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import newest_weights
from ..cli import check_choices, option
from ..data import ImageDataset, open_dataset
from ..data.labels import Labels
from ..distributed import Context
from ..errors import UserError
from ..files import make_folder, write_text
from ..model import DBAE
from ..random import fold
from . import features, published
from .classifier import AttributeClassifier, save_classifier
from .features import Features, Split
from .latents import Latents, latents_of
from .probes import LinearProbe, PaperFit
from .protocol import (
    is_ema,
    latent_used,
    model_facts,
    require_at_least,
    results_folder,
    seen_in_training,
    text_table,
    versions,
)
from .results import METRICS_FILE, write_metrics

TABLE = "test.txt"
# What a run may save: the paper's probe, and those that converged.
PROBE_FILES = BEST, LOGISTIC, RIDGE = "best.pt", "logistic.pt", "ridge.pt"
_FEWEST_RESAMPLES = 20  # below, the ends of a 95 % interval are mere guesses
_HELD_OUT = 0.1  # share of the training people that validate, and that test, where no split does


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """What is probed, how, and on which data. Each field is a command-line flag."""

    dataset: str | None = option(
        None, "data set that the model was trained on; checked against the checkpoint"
    )
    probe_data: str = option("celeba", "labelled data set that the probe is fitted and tested on")
    data_dir: str | None = option(None, "folder, zip or LMDB with the images of --probe_data")
    labels: str | None = option(
        None, "file of attributes (default: found beside the images by its usual name)"
    )
    attributes: tuple[str, ...] = option(
        (), "only these attributes, comma-separated (default: all)"
    )
    protocol: str = option(
        "both",
        "the paper's recipe, a probe fitted to convergence, or both",
        choices=("paper", "converged", "both"),
    )
    latent: str = option(
        "sample",
        "z of a stochastic encoder: drawn, as published, or its mean",
        choices=("sample", "mean"),
    )
    flip: bool = option(True, "the paper's recipe sees randomly mirrored images in training")
    epochs: int = option(15, "of the paper's recipe")
    lr: float = option(1e-3, "Adam's learning rate in the paper's recipe")
    probe_batch_size: int = option(128, "images per step of the paper's recipe")
    num_train: int = option(0, "train on the first so many images (0: all)")
    num_test: int = option(0, "validate and test on the first so many images each (0: all)")
    compare: tuple[str, ...] = option(
        (), f"also probe these features of the same images: {','.join(features.BASELINES)}"
    )
    resamples: int = option(1000, "bootstrap resamples behind the 95 % intervals (0: none)")
    seed: int = option(0, "everything random is a function of this")
    batch_size: int = option(64, "images per forward pass of the encoder")
    bad_images: str = option(
        "error", "an unreadable image stops the run or is replaced", choices=("error", "skip")
    )
    output_dir: str | None = option(
        None, "folder of the results (default: in sample_STEP beside the checkpoint)"
    )

    # The published name of the results' folder begins with this.
    folder_name: ClassVar[str] = ""
    # The data set whose results lie in the folder of that very name.
    usual_data: ClassVar[str] = ""
    usual_attributes: ClassVar[int] = 0  # how many it has
    # What the paper publishes: the figure's key → its word in a table.
    published_figures: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        require_at_least(self, epochs=1, probe_batch_size=1, batch_size=1)
        require_at_least(self, num_train=0, num_test=0, resamples=0, seed=0)
        if 0 < self.resamples < _FEWEST_RESAMPLES:
            raise UserError(
                f"--resamples {self.resamples} must be 0 or at least {_FEWEST_RESAMPLES}"
            )
        if not self.lr > 0:
            raise UserError(f"--lr {self.lr} must be positive")
        for name in self.compare:
            if name not in features.BASELINES:
                raise UserError(
                    f"--compare {name!r} is unknown; choose from {', '.join(features.BASELINES)}"
                )
        check_choices(self)

    @property
    def flips(self) -> bool:
        """Whether anything is to see mirrored images: only the paper's recipe does."""
        return self.flip and self.protocol != "converged"

    def output_folder(self, checkpoint: Path) -> Path:
        """--output_dir, else `sample_{step}/downstream_inference/multitask_ema` or its like.

        `_ema` is `_model` for live weights; another data set than the paper's appends its name.
        """
        if self.output_dir is not None:
            return Path(self.output_dir)
        average = is_ema(newest_weights(checkpoint)) is not False
        name = f"{self.folder_name}_{'ema' if average else 'model'}"
        if self.probe_data != self.usual_data:
            name += f"_{self.probe_data}"
        return results_folder(checkpoint) / "downstream_inference" / name


@dataclasses.dataclass(frozen=True)
class Part(Split):
    """Labelled images: those on which the probe is fitted, chosen, or tested."""

    values: np.ndarray  # float32 (n, k)
    groups: list[str]  # whom each shows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shows_people(self) -> bool:
        """Whether it is known that some images show the same person."""
        return len(set(self.groups)) < len(self.groups)

    def only(self, columns: Sequence[int]) -> Part:
        """With these attributes alone."""
        return dataclasses.replace(self, values=self.values[:, list(columns)])

    @property
    def targets(self) -> Tensor:
        """The labels as a tensor (n, k)."""
        return torch.from_numpy(self.values)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The three parts of a probe's data; no person is in two of them by our own division."""

    train: Part
    valid: Part
    test: Part
    names: tuple[str, ...]
    source: str  # where the labels come from
    division: str  # how the parts came about

    def __iter__(self) -> Iterator[Part]:
        return iter((self.train, self.valid, self.test))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted probe and what its row says about the fit; `file`: saved under this name."""

    probe: LinearProbe
    about: dict[str, Any]
    file: str | None = None


class Task(Protocol):
    """What differs between classification and regression."""

    @property
    def kind(self) -> str: ...

    @property
    def head(self) -> tuple[str, ...]:
        """Titles of the figures in a row of the table."""
        ...

    def read_labels(self, dataset: ImageDataset, file: str | None) -> Labels: ...

    def reason_against(self, parts: Parts, column: int) -> str | None:
        """Why the attribute of this column cannot be probed, or None."""
        ...

    def fit(
        self, found: Features, parts: Parts, config: ProbeConfig, context: Context
    ) -> Iterator[Fitted]:
        """The probes that the protocol asks for."""
        ...

    def scores(
        self, outputs: Tensor, test: Part, names: Sequence[str], config: ProbeConfig
    ) -> dict[str, Any]:
        """The figures of a probe's outputs (n, k) on the test part."""
        ...

    def extra(self, parts: Parts, z: Tensor) -> dict[str, Any]:
        """More of metrics.json: the figures of knowing nothing, of z itself."""
        ...

    def figures(self, row: dict[str, Any]) -> list[str]:
        """The cells of a row under `head`."""
        ...

    def notes(self, metrics: dict[str, Any]) -> list[str]:
        """Lines below the table."""
        ...


@dataclasses.dataclass(frozen=True)
class Result:
    """The content of metrics.json, the table, and where both lie."""

    metrics: dict[str, Any]
    table: str
    folder: Path


def run(
    model: DBAE, config: ProbeConfig, task: Task, context: Context, checkpoint: Path
) -> Result | None:
    """Probe a model. Every rank must call this: all encode, then rank 0 fits, scores and writes.

    Args:
        model: in eval mode, on `context.device`.
        checkpoint: its file or run folder; latents are kept beside it.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        UserError: data, labels or images that cannot be used; no attribute that can be probed.
    """
    parts = divide(config, task, model.config.image_size, context)
    described = parts.train.dataset.describe()
    if seen_in_training(model, {**described, "split": parts.test.dataset.split}):
        context.print("note: the model was trained on the test images too (without their labels)")
    parts, left_out = _usable(parts, task, context)
    folder = config.output_folder(checkpoint)
    if context.is_main:
        make_folder(folder)  # before the long work, as it may fail
    latents = _latents(model, parts, config, context, checkpoint)
    if latents is None:
        return None
    found = [features.of_latents(latents, config.latent, config.flips, config.seed)]
    if config.compare:
        found += features.baselines(
            config.compare, model, list(parts), context, config.flips, config.seed,
            config.batch_size,
        )  # fmt: skip
    facts = model_facts(model, checkpoint)
    z = latents[2].mean
    rows: list[dict[str, Any]] = []
    probes: dict[str, LinearProbe] = {}
    for method in found:
        context.print(f"probing {method.method} ({method.test.shape[1]} numbers an image)")
        for fitted in task.fit(method, parts, config, context):
            rows.append(_row(task, method, fitted, parts, config))
            if fitted.file and method is found[0]:
                probes[fitted.file] = fitted.probe
    metrics = {
        "kind": task.kind,
        "rows": rows,
        **task.extra(parts, z),
        **_published(parts, config),
        "left_out": left_out,
        "protocol": _protocol(model, config, parts, latents, facts),
    }
    table = _table(task, metrics, config)
    # Of an earlier run nothing is left; its metrics.json is never found beside another's files.
    for name in (METRICS_FILE, *PROBE_FILES):
        (folder / name).unlink(missing_ok=True)
    for name, probe in probes.items():
        _save(folder / name, probe, parts.names, z, facts)
    write_text(folder / TABLE, table + "\n")
    write_metrics(folder, metrics)
    return Result(metrics, table, folder)


# The parts ------------------------------------------------------------------------------------


def divide(config: ProbeConfig, task: Task, size: int, context: Context) -> Parts:
    """The labelled images of the data set as training, validation and test part.

    Its own splits `train`, `valid` and `test` where it has them; what lacks is held out of
    `train`, a tenth of its people each (by a hash of the person's, else the image's name).
    """
    train = open_dataset(config.probe_data, config.data_dir, size, "train", config.bad_images)
    for note in train.notes:
        context.print(note)
    made: dict[str, Part] = {}
    for name in ("train", "valid", "test"):
        if name != "train" and name not in train.splits:
            continue
        dataset = train if name == "train" else train.in_split(name)
        labels = task.read_labels(dataset, config.labels)
        if config.attributes:
            labels = labels.choose(config.attributes)
        lacking = len(dataset) - len(labels.positions)
        if lacking:
            context.print(
                f"{lacking} of {len(dataset)} images of {name} have no row in {labels.source} and "
                "are left out"
            )
        count = (config.num_train if name == "train" else config.num_test) or len(dataset)
        rows = labels.positions[:count]
        groups = dataset.groups()
        made[name] = Part(dataset, rows, labels.values[:count], [groups[row] for row in rows])
    division = "the data set's own splits"
    held_out = [name for name in ("valid", "test") if name not in made]
    if held_out:
        made |= _hold_out(made["train"], held_out)
        whom = "people" if made["train"].shows_people or made["valid"].shows_people else "images"
        division = f"{' and '.join(held_out)} held out of train, a tenth of the {whom} each"
    for name, part in made.items():
        if len(part) == 0:
            raise UserError(f"no images are left for the part {name} of the probe's data; use more")
    return Parts(made["train"], made["valid"], made["test"], labels.names, labels.source, division)


def _hold_out(part: Part, names: Sequence[str]) -> dict[str, Part]:
    """Take a tenth of the people out of a part for each name; "train" is what remains."""
    share = {
        group: fold(0, "held out of a probe's training", group) / 2**63
        for group in set(part.groups)
    }
    place = np.array([share[group] for group in part.groups])
    which = np.minimum(place // _HELD_OUT, len(names)).astype(int)
    return {
        name: _rows(part, np.flatnonzero(which == i)) for i, name in enumerate([*names, "train"])
    }


def _rows(part: Part, rows: np.ndarray) -> Part:
    groups = [part.groups[row] for row in rows]
    return Part(part.dataset, part.rows[rows], part.values[rows], groups)


def _latents(
    model: DBAE, parts: Parts, config: ProbeConfig, context: Context, checkpoint: Path
) -> list[Latents] | None:
    """The latents of each part, on rank 0; every data set is encoded once."""
    of_dataset: dict[int, Latents | None] = {}
    for part in parts:
        key = id(part.dataset)
        if key not in of_dataset:
            rows = [other.rows.max() for other in parts if other.dataset is part.dataset]
            of_dataset[key] = latents_of(
                model, part.dataset, context, checkpoint,
                count=int(max(rows)) + 1,
                flip=config.flips and part.dataset is parts.train.dataset,
                batch_size=config.batch_size,
            )  # fmt: skip
    found = [of_dataset[id(part.dataset)] for part in parts]
    if any(latents is None for latents in found):
        return None
    return [latents.rows(part.rows) for latents, part in zip(found, parts, strict=True) if latents]


def _usable(parts: Parts, task: Task, context: Context) -> tuple[Parts, list[dict[str, str]]]:
    """The parts without the attributes that cannot be probed, and these with the reason."""
    reasons = [task.reason_against(parts, column) for column in range(len(parts.names))]
    left_out = [
        {"name": name, "reason": reason}
        for name, reason in zip(parts.names, reasons, strict=True)
        if reason
    ]
    for entry in left_out:
        context.print(f"attribute {entry['name']} is left out: {entry['reason']}")
    kept = [column for column, reason in enumerate(reasons) if not reason]
    if not kept:
        raise UserError(
            f"no attribute of {parts.source} can be probed: {left_out[0]['name']} "
            f"{left_out[0]['reason']}; use more images or other labels"
        )
    train, valid, test = (part.only(kept) for part in parts)
    names = tuple(parts.names[column] for column in kept)
    return dataclasses.replace(parts, train=train, valid=valid, test=test, names=names), left_out


def why_not_comparable(parts: Parts, config: ProbeConfig) -> str | None:
    """Why the published figures, of all attributes of the usual data, compare with nothing here."""
    if config.probe_data != config.usual_data:
        return f"not on {config.usual_data}"
    if config.protocol == "converged":
        return "without the paper's recipe"
    if config.num_train or config.num_test:
        return "on a part of the images only"
    if len(parts.names) != config.usual_attributes:
        return f"for {len(parts.names)} of {config.usual_attributes} attributes"
    if any(part.dataset.notes for part in parts):
        return "on a copy of another length"
    return None


def _published(parts: Parts, config: ProbeConfig) -> dict[str, Any]:
    """The paper's rows where they compare; else, on its data, why they are not there."""
    reason = why_not_comparable(parts, config)
    return {
        "published": [] if reason else published.probe_rows(*config.published_figures),
        "published_reason": reason if config.probe_data == config.usual_data else None,
    }


def _published_notes(metrics: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """The published rows below a table, or the reason why they are not there."""
    if metrics["published_reason"]:
        return [f"published figures are left out: this probe is {metrics['published_reason']}"]
    if not metrics["published"]:
        return []
    rows = "; ".join(
        f"{row['method']} ({row['trained_on']}) "
        + ", ".join(f"{row[name]:.3f}" for name in figures)
        for row in metrics["published"]
    )
    what = " and ".join(figures.values())
    return [f"published {what}, z of 512, the paper's recipe: {rows}"]


def fit_paper(
    fit: Callable[..., PaperFit],
    found: Features,
    parts: Parts,
    config: ProbeConfig,
    context: Context,
) -> PaperFit:
    """The paper's recipe (`fit` says for which labels); prints its validation figure by epoch."""
    fitted = fit(
        found.epoch,
        parts.train.targets[found.train_rows],
        found.valid,
        parts.valid.targets,
        epochs=config.epochs,
        lr=config.lr,
        batch_size=config.probe_batch_size,
        seed=config.seed,
        device=context.device,
    )
    figure = next(name for name in fitted.history[0] if name.startswith("valid"))
    values = " ".join(f"{row[figure]:.3f}" for row in fitted.history)
    context.print(f"{figure} by epoch: {values}")
    return fitted


def _save(
    path: Path, probe: LinearProbe, names: tuple[str, ...], z: Tensor, facts: dict[str, Any]
) -> None:
    """Write the probe where manipulation finds it, with the spread of its scores over test z."""
    spread = probe(z).std(0, correction=0)
    save_classifier(path, AttributeClassifier(probe.weight, probe.bias, names, spread, facts))


# Figures --------------------------------------------------------------------------------------


def _row(
    task: Task, method: Features, fitted: Fitted, parts: Parts, config: ProbeConfig
) -> dict[str, Any]:
    return {
        "method": method.method,
        **fitted.about,
        "n_train": len(method.train_rows),
        "n_valid": len(parts.valid),
        "n_test": len(parts.test),
        "dim": method.test.shape[1],
        **task.scores(fitted.probe(method.test), parts.test, parts.names, config),
    }


def _protocol(
    model: DBAE,
    config: ProbeConfig,
    parts: Parts,
    latents: Sequence[Latents],
    facts: dict[str, Any],
) -> dict[str, Any]:
    units = "people" if parts.test.shows_people else "images"
    return {
        **facts,
        "probe_data": config.probe_data,
        "num_train": config.num_train,
        "num_test": config.num_test,
        "labels": parts.source,
        "division": parts.division,
        "parts": {
            name: {
                **part.dataset.describe(),
                "n_used": len(part),
                "people": len(set(part.groups)) if part.shows_people else None,
                "replaced": latents[i].provenance["replaced"],
            }
            for i, (name, part) in enumerate(zip(("train", "valid", "test"), parts, strict=True))
        },
        "seen_in_training": latents[2].provenance["seen_in_training"],
        "latent": latent_used(model, config.latent),
        "flip": config.flips,
        "epochs": config.epochs,
        "lr": config.lr,
        "probe_batch_size": config.probe_batch_size,
        "seed": config.seed,
        "interval": (
            f"95 %, bias-corrected bootstrap, {config.resamples} resamples of the "
            f"{len(set(parts.test.groups))} test {units}"
            if config.resamples
            else "none"
        ),
        "protocol": config.protocol,
        "attributes": list(config.attributes),
        "versions": versions("scikit-learn", "scipy"),
    }


def _table(task: Task, metrics: dict[str, Any], config: ProbeConfig) -> str:
    """The result for the terminal and test.txt: rows, then what is needed to read them."""
    protocol = metrics["protocol"]
    head = ["features", "probe", *task.head, "n train/valid/test"]
    rows = [
        [
            row["method"],
            row["probe"] + (f" ({row['best_epoch']})" if "best_epoch" in row else ""),
            *task.figures(row),
            f"{row['n_train']}/{row['n_valid']}/{row['n_test']}",
        ]
        for row in metrics["rows"]
    ]
    names = [entry["name"] for entry in metrics["rows"][0]["attributes"]]
    average = "not recorded" if protocol["ema"] is None else protocol["ema"]
    test = protocol["parts"]["test"]
    lines = [
        text_table([head, *rows]),
        f"mean over {len(names)} attributes of {protocol['probe_data']} ({protocol['labels']}); "
        f"intervals: {protocol['interval']}",
        f"{protocol['checkpoint']}, EMA {average}, z of {protocol['model']['latent_dim']} "
        f"({protocol['latent']}), seed {protocol['seed']}; {protocol['division']}",
        f"images: {test['transform']}; {test['size']}×{test['size']} pixels",
        *([_recipe(protocol)] if protocol["protocol"] != "converged" else []),
        *_penalties(metrics["rows"]),
        *(f"left out: {entry['name']} {entry['reason']}" for entry in metrics["left_out"]),
        *task.notes(metrics),
        *_published_notes(metrics, config.published_figures),
        "versions: " + ", ".join(f"{k} {v}" for k, v in protocol["versions"].items()),
    ]
    return "\n".join(lines)


def _recipe(protocol: dict[str, Any]) -> str:
    return (
        f"the paper's recipe: Adam, lr {protocol['lr']}, batch {protocol['probe_batch_size']}, "
        f"{protocol['epochs']} epochs, {'random' if protocol['flip'] else 'no'} flips"
    )


def _penalties(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line on the penalties that validation chose for z."""
    chosen = next((row["penalty"] for row in rows if "penalty" in row), None)
    if chosen is None:
        return []
    return [f"penalty λ of {rows[0]['method']}, by validation: {min(chosen):g} to {max(chosen):g}"]


def figure(entry: dict[str, float | None], digits: int = 3) -> str:
    """A figure with its interval as text: 0.664 [0.660, 0.668]."""
    if entry["value"] is None:
        return "n/a"
    text = f"{entry['value']:.{digits}f}"
    if entry["low"] is None:
        return text
    return f"{text} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
