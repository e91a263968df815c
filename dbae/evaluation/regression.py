"""How well real-valued attributes can be read off z by a linear map (Table 1, Pearson's r, MSE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..cli import option
from ..data import ImageDataset
from ..data.labels import Labels, real_labels
from ..distributed import Context
from . import published
from .features import Features
from .probes import (
    fit_paper_regressor,
    fit_ridge,
    regression_base_rate,
    regression_scores,
)
from .probing import (
    BEST,
    RIDGE,
    Fitted,
    Part,
    Parts,
    ProbeConfig,
    figure,
    fit_paper,
)


@dataclasses.dataclass(frozen=True)
class RegressionConfig(ProbeConfig):
    """Linear regression of real-valued attributes."""

    probe_data: str = option(
        published.REGRESSION_DATA, "labelled data set that the probe is fitted and tested on"
    )
    flip: bool = option(False, "the paper's recipe sees randomly mirrored images in training")
    probe_batch_size: int = option(64, "images per step of the paper's recipe")
    folder_name: ClassVar[str] = "regression"
    usual_data: ClassVar[str] = published.REGRESSION_DATA
    usual_attributes: ClassVar[int] = published.REGRESSION_ATTRIBUTES
    published_figures: ClassVar[dict[str, str]] = {"pearson_r": "r", "mse": "MSE"}


class Regression:
    """One `nn.Linear(latent_dim, attributes)`, and ridge regression in closed form.

    Of the paper's recipe both the last epoch and the best on validation people are given, each
    under its name; neither is chosen on the test people.
    """

    kind = "regression"
    head = ("Pearson's r", "MSE")

    def read_labels(self, dataset: ImageDataset, file: str | None) -> Labels:
        return real_labels(dataset, file)

    def reason_against(self, parts: Parts, column: int) -> str | None:
        for name, part in zip(("training", "test"), (parts.train, parts.test), strict=True):
            values = part.values[:, column]
            if np.ptp(values) == 0:
                return f"is {values[0]:g} for all {len(values)} {name} images"
        return None

    def fit(
        self, found: Features, parts: Parts, config: ProbeConfig, context: Context
    ) -> Iterator[Fitted]:
        targets = parts.train.targets[found.train_rows]
        if config.protocol != "converged":
            paper = fit_paper(fit_paper_regressor, found, parts, config, context)
            yield Fitted(
                paper.last,
                {"probe": "paper, last epoch", "epoch": config.epochs, "history": paper.history},
            )
            yield Fitted(
                paper.probe, {"probe": "paper, best epoch", "epoch": paper.best_epoch}, BEST
            )
        if config.protocol != "paper":
            fitted = fit_ridge(found.train, targets, found.valid, parts.valid.targets)
            yield Fitted(fitted.probe, {"probe": "ridge", "penalty": fitted.penalty}, RIDGE)

    def scores(
        self, outputs: Tensor, test: Part, names: Sequence[str], config: ProbeConfig
    ) -> dict[str, Any]:
        return regression_scores(
            outputs, test.targets, names, test.groups, config.resamples, config.seed
        )

    def extra(self, parts: Parts, z: Tensor) -> dict[str, Any]:
        return {
            "base_rate": regression_base_rate(parts.train.targets, parts.test.targets),
        }

    def figures(self, row: dict[str, Any]) -> list[str]:
        return [figure(row["pearson_r"]), figure(row["mse"])]

    def notes(self, metrics: dict[str, Any]) -> list[str]:
        return [f"knowing nothing (the training mean): MSE {metrics['base_rate']['mse']:.3f}"]
