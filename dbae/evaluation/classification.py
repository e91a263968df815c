"""How well attributes can be read off z by a linear classifier (the paper's Table 1, AP)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..cli import option
from ..data import ImageDataset
from ..data.labels import Labels, binary_labels
from ..distributed import Context
from . import published
from .disentanglement import tad
from .features import Features
from .probes import (
    LOGISTIC_PENALTIES,
    classification_base_rate,
    classification_scores,
    fit_logistic,
    fit_paper_classifier,
)
from .probing import (
    BEST,
    LOGISTIC,
    Fitted,
    Part,
    Parts,
    ProbeConfig,
    figure,
    fit_paper,
)
from .progress import Progress


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(ProbeConfig):
    """Linear classification of yes/no attributes."""

    probe_data: str = option(
        published.CLASSIFICATION_DATA, "labelled data set that the probe is fitted and tested on"
    )
    folder_name: ClassVar[str] = "multitask"
    usual_data: ClassVar[str] = published.CLASSIFICATION_DATA
    usual_attributes: ClassVar[int] = published.CLASSIFICATION_ATTRIBUTES
    published_figures: ClassVar[dict[str, str]] = {"ap": "AP"}


class Classification:
    """One `nn.Linear(latent_dim, attributes)`, and one logistic regression per attribute."""

    kind = "classification"
    head = ("AP", "accuracy")

    def read_labels(self, dataset: ImageDataset, file: str | None) -> Labels:
        return binary_labels(dataset, file)

    def reason_against(self, parts: Parts, column: int) -> str | None:
        for name, part in zip(("training", "validation", "test"), parts, strict=True):
            values = part.values[:, column]
            if np.ptp(values) == 0:
                word = "yes" if values[0] else "no"
                return f"is {word} for all {len(values)} {name} images"
        return None

    def fit(
        self, found: Features, parts: Parts, config: ProbeConfig, context: Context
    ) -> Iterator[Fitted]:
        targets = parts.train.targets[found.train_rows]
        if config.protocol != "converged":
            paper = fit_paper(fit_paper_classifier, found, parts, config, context)
            about = {"probe": "paper", "best_epoch": paper.best_epoch, "history": paper.history}
            yield Fitted(paper.probe, about, BEST)
        if config.protocol != "paper":
            k = len(LOGISTIC_PENALTIES)
            shown = Progress("fitted", k, k, active=context.is_main, unit="penalties")
            fitted = fit_logistic(
                found.train,
                targets,
                found.valid,
                parts.valid.targets,
                progress=lambda *_: shown.batch_done(),
            )
            shown.close()
            about = {
                "probe": "converged",
                "penalty": fitted.penalty,
                "not_converged": [
                    name
                    for name, done in zip(parts.names, fitted.converged, strict=True)
                    if not done
                ],
            }
            yield Fitted(fitted.probe, about, LOGISTIC)

    def scores(
        self, outputs: Tensor, test: Part, names: Sequence[str], config: ProbeConfig
    ) -> dict[str, Any]:
        return classification_scores(
            outputs, test.targets, names, test.groups, config.resamples, config.seed
        )

    def extra(self, parts: Parts, z: Tensor) -> dict[str, Any]:
        several = z.shape[1] > 1
        return {
            "base_rate": classification_base_rate(parts.test.targets),
            "disentanglement": tad(z, parts.test.targets, parts.names) if several else None,
        }

    def figures(self, row: dict[str, Any]) -> list[str]:
        return [figure(row["ap"]), figure(row["accuracy"])]

    def notes(self, metrics: dict[str, Any]) -> list[str]:
        base, found = metrics["base_rate"], metrics["disentanglement"]
        lines = [
            f"knowing nothing: AP {base['ap']:.3f} (prevalence), accuracy {base['accuracy']:.3f} "
            "(always the commoner answer)"
        ]
        if found:
            lines.append(
                f"disentanglement of z: TAD {found['tad']:.3f}, {found['captured']} of "
                f"{found['considered']} attributes captured by one dimension"
            )
        for row in metrics["rows"]:
            if row.get("not_converged"):
                names = ", ".join(row["not_converged"])
                lines.append(f"{row['method']}: the probe did not converge for {names}")
        return lines
