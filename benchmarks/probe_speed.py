"""Linear probes on kept latents against the plain ways to fit and score them, in one run.

    python3 benchmarks/probe_speed.py [--quick]

The plain ways are a DataLoader, and scikit-learn on one attribute after the other; of its logistic
regressions one is run and of the resamples a few, each scaled to all. Latents are random, of
CelebA's size (`--quick`: a seventh of the rows), with attributes planted in them, all by one seed.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Figures, interleaved, machine, show
from dbae.evaluation import probes
from dbae.evaluation.features import of_latents
from dbae.evaluation.latents import Latents

_D, _K, _EPOCHS, _RESAMPLES = 512, 40, 15, 1000
_ROWS = {False: (162_770, 19_867, 19_962), True: (24_000, 3_000, 3_000)}
_TRIED, _FEW = 30, 3  # the one attribute, and the number of resamples, of the plain ways
_NAMES = [f"attribute {i}" for i in range(_K)]


class Part(NamedTuple):
    """z of images and of the mirrored ones (n, 512); attributes 0 or 1 (n, 40)."""

    z: Tensor
    mirrored: Tensor
    y: Tensor


def planted(rows: tuple[int, ...], seed: int = 0) -> list[Part]:
    """Parts with correlated features; attributes of 1 to 60 % positives, from vague to sharp."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator)
    spread = torch.logspace(0, -1.5, _D)
    rotation = torch.linalg.qr(normal(_D, _D))[0]
    direction = F.normalize(normal(_D, _K) * spread[:, None], dim=0)
    sharpness, common = torch.linspace(0.5, 6, _K), torch.linspace(-3.5, 0.5, _K)
    parts: list[Part] = []
    for n in rows:
        hidden = normal(n, _D)
        logits = hidden @ direction * sharpness + common * (1 + sharpness / 2)
        y = (torch.rand(n, _K, generator=generator) < logits.sigmoid()).float()
        parts.append(Part(z := hidden * spread @ rotation, z + 0.05 * normal(n, _D), y))
    return parts


def plain_epoch(x: Tensor, y: Tensor, valid: Part) -> float:
    """An epoch of the recipe as a DataLoader and autograd do it, and the validation AP."""
    layer = nn.Linear(_D, _K)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True):
        loss = F.binary_cross_entropy_with_logits(layer(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(average_precision_score(valid.y.numpy(), layer(valid.z).numpy()))


def plain_logistic(train: Part, valid: Part, attribute: int) -> float:
    """The penalty of one attribute, by scikit-learn on the same path to the same tolerance."""
    mean, std = train.z.double().mean(0), train.z.double().std(0, correction=0)
    x, valid_x = (((part.z - mean) / std).numpy() for part in (train, valid))
    y, valid_y = (part.y[:, attribute].numpy() for part in (train, valid))
    model = LogisticRegression(solver="newton-cholesky", tol=1e-6, warm_start=True)
    losses: list[float] = []
    for penalty in probes.LOGISTIC_PENALTIES:
        model.set_params(C=1 / (penalty * len(x))).fit(x, y)
        losses.append(log_loss(valid_y, model.predict_proba(valid_x)))
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break
    return probes.LOGISTIC_PENALTIES[int(np.argmin(losses))]


def plain_scores(scores: Tensor, y: Tensor, resamples: int) -> None:
    """AP of each resample and attribute."""
    random = np.random.default_rng(0)
    for _ in range(resamples):
        counts = np.bincount(random.integers(len(y), size=len(y)), minlength=len(y))
        average_precision_score(y.numpy(), scores.numpy(), sample_weight=counts)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """What a piece of work takes, and its result."""
    started, result = time.perf_counter(), work()
    return time.perf_counter() - started, result


def measure(quick: bool) -> Figures:
    """(name, figure) of each part. On 2 cores: quick half a minute, else three minutes."""
    train, valid, test = parts = planted(_ROWS[quick])
    n = len(train.z)
    kept = [Latents(p.z, None, p.mirrored, None, torch.arange(len(p.z)), {}) for p in parts]
    found = of_latents(kept, "mean", True, 0)
    labelled = found.epoch, train.y, valid.z, valid.y
    recipe = functools.partial(probes.fit_paper_classifier, *labelled)
    fitting, fit = seconds(lambda: recipe(epochs=_EPOCHS))
    scores = fit.probe(test.z)
    scoring, _ = seconds(lambda: probes.classification_scores(scores, test.y, _NAMES))
    plain = functools.partial(plain_epoch, found.epoch(0), train.y, valid)
    epoch = interleaved({"ours": lambda: recipe(epochs=1), "plain": plain}, 3)
    few = seconds(lambda: plain_scores(scores, test.y, _FEW))[0] / _FEW
    logistic, all_of = seconds(lambda: probes.fit_logistic(train.z, train.y, valid.z, valid.y))
    one, penalty = seconds(lambda: plain_logistic(train, valid, _TRIED))
    ridge, _ = seconds(lambda: probes.fit_ridge(train.z, train.y, valid.z, valid.y))
    regression, _ = seconds(lambda: probes.regression_scores(scores, test.y, _NAMES))
    return [
        ("rows", f"{n} × {_D}, {len(valid.z)} to validate, {len(test.z)} to test, {_K} attributes"),
        ("the paper's recipe in all", f"{fitting + scoring:.1f} s"),
        (f"  {_EPOCHS} epochs", f"{fitting:.1f} s, {n * _EPOCHS / fitting:,.0f} rows/s"),
        ("  an epoch, of a DataLoader", f"{epoch['plain'] / epoch['ours']:.2f} × as long"),
        (f"  scores, {_RESAMPLES} resamples", f"{scoring:.1f} s"),
        (f"    by scikit-learn ({_FEW}, scaled)", f"{few * _RESAMPLES / scoring:.0f} × as long"),
        ("logistic", f"{logistic:.1f} s, {sum(all_of.converged)} of {_K} converged"),
        ("  by scikit-learn (1, scaled)", f"{one * _K / logistic:.0f} × as long"),
        ("    and the penalty it chose", f"{penalty:g}, ours {all_of.penalty[_TRIED]:g}"),
        ("ridge, scores of a regression", f"{ridge:.1f} s, {regression:.1f} s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a seventh of the rows")
    figures = measure(parser.parse_args().quick)
    show(f"probes: {machine()}, numpy {np.__version__}, sklearn {sklearn.__version__}", figures)


if __name__ == "__main__":
    main()
