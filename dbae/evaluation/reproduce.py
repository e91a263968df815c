"""Which runs make the paper's Tables 1 and 2, what each needs, and ours beside theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import newest_weights
from ..data.labels import LABEL_FILES, LFW_LABELS
from ..data.lfw import INNER_FOLDER, LAYOUT
from ..errors import UserError
from ..files import sha256, write_text
from . import published
from .metrics import LPIPS_MISSING, find_alexnet
from .probing import figure
from .protocol import results_folder, text_table
from .results import METRICS_FILE


@dataclass(frozen=True)
class Model:
    """A released model: the name of its folder is that of its training run."""

    trained_on: str  # as in the paper's tables
    method: str
    dataset: str
    stochastic: bool
    folder: str

    @property
    def title(self) -> str:
        return f"{self.method} trained on {self.trained_on}"


MODELS = (
    Model("CelebA", "DBAE-d", "celeba", False, "celeba64_64_512d_false_vp"),
    Model("CelebA", "DBAE", "celeba", True, "celeba64_64_512d_true_vp"),
    Model("FFHQ", "DBAE-d", "ffhq", False, "ffhq128_128_512d_false_vp"),
    Model("FFHQ", "DBAE", "ffhq", True, "ffhq128_128_512d_true_vp"),
)


@dataclass(frozen=True)
class Run:
    """One command: a launcher with its words, the data it reads, the folder that it fills.

    The folder is used by nothing else: other runs of the same checkpoint never pass for this one.
    """

    model: Model
    kind: str  # classification, regression, reconstruction, or reconstruction of the churned SDE
    words: tuple[str, ...]
    data: str
    folder: Path

    @property
    def metrics(self) -> Path:
        """Where its figures will be."""
        return self.folder / METRICS_FILE

    def done(self, command: Sequence[str]) -> dict[str, Any] | None:
        """The content of metrics.json where this command has been run on these weights."""
        try:
            if json.loads((self.folder / COMMAND_FILE).read_text(encoding="utf-8")) != [*command]:
                return None
            found = json.loads(self.metrics.read_text(encoding="utf-8"))
            same = found["protocol"]["checkpoint_sha256"] == sha256(Path(self.words[3]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if same else None

    def mark_done(self, command: Sequence[str]) -> None:
        """Remember that the folder holds the results of this command."""
        write_text(self.folder / COMMAND_FILE, json.dumps([*command]) + "\n")


COMMAND_FILE = "command.json"
CHURNED = "reconstruction, churned SDE"


def find_models(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The weights of each of `MODELS` below `folder`, by title, and a line for each absent one."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; expected the released checkpoints in folders such as "
            f"{MODELS[-1].folder}/ema_0.9999_1020000.pt"
        )
    found, missing = {}, []
    for model in MODELS:
        try:
            if not (folder / model.folder).is_dir():
                raise UserError("no such folder")
            found[model.title] = newest_weights(folder / model.folder)
        except UserError:
            missing.append(f"{model.title}: {folder / model.folder}/ema_0.9999_*.pt")
    return found, missing


def missing_data(roots: Mapping[str, Path]) -> dict[str, str]:
    """For each of celeba, celebahq and lfw that cannot be used: what must lie where."""
    missing = {}
    for name in ("celeba", "celebahq"):
        root = roots[name]
        if not root.exists():
            missing[name] = f"{root}/data.mdb (DiffAE's LMDB of {name}, or a folder or zip of it)"
    celeba = roots["celeba"]
    if "celeba" not in missing and not any(
        (place / name).exists() for place in (celeba, celeba.parent) for name in LABEL_FILES
    ):
        missing["celeba"] = f"{celeba}/{LABEL_FILES[0]} (CelebA's attributes, beside data.mdb)"
    lfw = roots["lfw"]
    places = (lfw, lfw / INNER_FOLDER)
    if not any((place / "peopleDevTrain.txt").exists() for place in places):
        missing["lfw"] = f"{lfw}: {LAYOUT}"
    elif not any((place / LFW_LABELS).exists() for place in places):
        missing["lfw"] = f"{lfw / LFW_LABELS} (the attributes of LFW's images)"
    return missing


def plan(models: Mapping[str, Path], limit: int = 0) -> Iterator[Run]:
    """The runs of Table 1 and Table 2 for the models that are there (see `find_models`).

    `limit` > 0: a trial on the first so many images of each part, whose figures compare with
    nothing.
    """
    for model in MODELS:
        if model.title not in models:
            continue
        weights = models[model.title]
        sto = "true" if model.stochastic else "false"
        folder = results_folder(weights) / trial_name("reproduction", limit)
        for kind, launcher, data in (
            ("classification", "infer_class_dbae.sh", published.CLASSIFICATION_DATA),
            ("regression", "infer_reg_dbae.sh", published.REGRESSION_DATA),
        ):
            limits = _flags({"num_train": limit, "num_test": limit})
            words = (launcher, model.dataset, "vp", str(weights), sto, *limits)
            yield Run(model, kind, words, data, folder / kind)
        if model.dataset != "ffhq":
            continue
        # Published rows mix two runs: SSIM and MSE are of Euler-100, LPIPS of the churned SDE.
        for kind, churn, steps in (("reconstruction", "0", "100"), (CHURNED, "0.33", "333")):
            words = (
                "recon_dbae.sh", "celebahq", "vp", str(weights), churn, "1", "train", "7", "euler",
                steps, sto, *_flags({"num_samples": limit}),
            )  # fmt: skip
            yield Run(model, kind, words, "celebahq", folder / f"euler_{steps}_churn_{churn}")


def trial_name(name: str, limit: int) -> str:
    """`name`, of a trial with so many images another one: it replaces no full result."""
    return f"{name}_trial_{limit}" if limit else name


def _flags(limits: Mapping[str, int]) -> Iterator[str]:
    for name, limit in limits.items():
        if limit:
            yield from (f"--{name}", str(limit))


def missing_lpips(weights_dir: str | None = None) -> str | None:
    """What LPIPS lacks, None where its file is there."""
    return None if find_alexnet(weights_dir) else LPIPS_MISSING


# (model's title, kind of run) → the content of its metrics.json, or why there is none
Results = Mapping[tuple[str, str], dict[str, Any] | str]


def tables(results: Results, limit: int = 0) -> str:
    """Tables 1 and 2, ours beside the paper's, and why a figure of ours is absent."""
    reasons: list[str] = []

    def of(model: Model, kind: str) -> dict[str, Any] | None:
        found = results.get((model.title, kind), "no checkpoint")
        if isinstance(found, str):
            reasons.append(f"{model.title}, {kind}: {found}")
            return None
        if kind == CHURNED and found.get("lpips_reason"):
            reasons.append(f"{model.title}, LPIPS: {found['lpips_reason']}")
        return found

    first = [row for model in MODELS for row in _probe_rows(model, of)]
    second = [
        row for model in MODELS if model.dataset == "ffhq"
        for row in _reconstruction_rows(model, of)
    ]  # fmt: skip
    head = ["model", "figure", "ours", "published"]
    other_probes = [
        [row.method, row.trained_on, f"{row.ap:.3f}", f"{row.pearson_r:.3f}", f"{row.mse:.3f}"]
        for row in published.PROBES
    ]
    other_reconstructions = [
        [row.method, f"{row.latent_dim:,}", f"{row.ssim:.3f}", f"{row.lpips:.3f}", f"{row.mse:.3g}"]
        for row in published.RECONSTRUCTIONS
    ]
    parts = [
        "Table 1. Linear probes: AP on CelebA's test images, Pearson's r and MSE on LFW's test "
        f"people.\n{text_table([head, *first])}",
        "All rows of the paper:\n"
        + text_table([["method", "trained on", "AP", "r", "MSE"], *other_probes]),
        "Table 2. Reconstruction of CelebA-HQ at 128 pixels by models trained on FFHQ.\n"
        + text_table([head, *second]),
        "All rows of the paper:\n"
        + text_table([["method", "numbers in z", "SSIM", "LPIPS", "MSE"], *other_reconstructions]),
    ]
    if limit:
        parts.insert(0, f"A TRIAL on the first {limit} images: ours compare with nothing.")
    if reasons:
        parts.append("Not computed:\n" + "\n".join(f"  {reason}" for reason in reasons))
    return "\n\n".join(parts)


_ABSENT = "-"
_Find = Callable[[Model, str], dict[str, Any] | None]


def _probe_rows(model: Model, of: _Find) -> list[list[str]]:
    theirs = next(
        row
        for row in published.PROBES
        if (row.trained_on, row.method) == (model.trained_on, model.method)
    )
    figures = (
        ("AP", "classification", "ap", theirs.ap, ("paper", "converged")),
        ("r", "regression", "pearson_r", theirs.pearson_r, _REGRESSION_PROBES),
        ("MSE", "regression", "mse", theirs.mse, _REGRESSION_PROBES),
    )
    metrics = {kind: of(model, kind) for kind in ("classification", "regression")}
    return [
        [
            model.title,
            f"{word}, {probe}",
            _cell(metrics[kind], probe, name),
            f"{value:.3f}" if probe.startswith("paper") else _ABSENT,
        ]
        for word, kind, name, value, probes in figures
        for probe in probes
    ]


_REGRESSION_PROBES = ("paper, last epoch", "paper, best epoch", "ridge")


def _cell(metrics: dict[str, Any] | None, probe: str, name: str) -> str:
    rows = [row for row in (metrics or {}).get("rows", []) if row["probe"] == probe]
    return figure(rows[0][name]) if rows else _ABSENT


def _reconstruction_rows(model: Model, of: _Find) -> list[list[str]]:
    theirs = published.reconstruction_of(model.method)
    exact, churned = of(model, "reconstruction"), of(model, CHURNED)
    rows = []
    for word, metrics, name, value in (
        ("MSE, Euler-100", exact, "mse", f"{theirs.mse:.5f}"),
        ("SSIM, Euler-100", exact, "ssim", f"{theirs.ssim:.3f}"),
        ("LPIPS, churned SDE", churned, "lpips", f"{theirs.lpips:.3f}"),
    ):
        ours = (metrics or {}).get(name)
        text = _ABSENT
        if ours:
            text = f"{ours['mean']:.5f} (n {ours['n']})"
        rows.append([model.title, word, text, value])
    return rows


def summary_json(runs: Sequence[Run], results: Results) -> dict[str, Any]:
    """What was run and where its figures lie, JSON-able."""
    return {
        "kind": "reproduction",
        "runs": [
            {
                "model": run.model.title,
                "kind": run.kind,
                "command": ["bash", *run.words],
                "metrics": str(run.metrics),
                "reason": reason if isinstance(reason, str) else None,
            }
            for run in runs
            for reason in [results.get((run.model.title, run.kind))]
        ],
        "published": {
            "table_1": [row._asdict() for row in published.PROBES],
            "table_2": [row._asdict() for row in published.RECONSTRUCTIONS],
        },
    }
