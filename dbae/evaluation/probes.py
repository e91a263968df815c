"""Linear probes: how much of what is known about an image can be read off z by a linear map.

Two fits for each kind of label. The paper's (`fit_paper_classifier`, `fit_paper_regressor`) is a
fixed number of epochs of Adam. The converged one (`fit_logistic`, `fit_ridge`) is the minimum of a
convex loss, so that its figures depend on neither a learning rate nor a number of epochs.
`classification_scores` and `regression_scores` turn predictions on a test part into figures with
95 % bootstrap intervals.

n is a number of images, d of features, k of attributes. Labels of a classification are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.order import BatchOrder
from ..random import fold

Array = npt.NDArray[Any]
Figure = dict[str, float | None]  # {"value", "low", "high"}: a figure, its 95 % bootstrap interval
TrainFeatures = Tensor | Callable[[int], Tensor]  # (n, d), or a function from an epoch to it

LOGISTIC_PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
RIDGE_PENALTIES = tuple(10.0 ** (power / 4) for power in range(16, -25, -1))

_SOLVER_TOLERANCE = 1e-6
_CONVERGED = 1e-5
_NEWTON_STEPS, _CONJUGATE_STEPS = 50, 200  # at most; a fit that needs more has not converged
_NEWTON_ACCURACY = 0.05  # of a step, relative
# What a processor's cache holds: features in a matrix product, 16 MiB; resampling weights, 2 MiB.
_FEATURES_AT_ONCE = 2**21
_WEIGHTS_AT_ONCE = 2**18


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """k linear functions of d raw features. weight: float32 (k, d); bias: float32 (k,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, d) of any float type → float32 (n, k): logits or predicted labels.

        Raises ValueError on another number of features.
        """
        if x.dim() != 2 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"a probe of {self.weight.shape[1]} features was given {tuple(x.shape)}"
            )
        return x.to(self.weight) @ self.weight.T + self.bias


def as_array(values: Tensor) -> Array:
    """A tensor of any device and number type as a float64 array, not to be written to."""
    return values.detach().cpu().double().numpy()


# The paper's probes --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PaperFit:
    """Two probes of one training: of the epoch that validation prefers, and of the last one.

    best_epoch counts from 1. history has a row {"epoch", "train_loss", "valid_ap" or "valid_mse"}
    for each epoch; train_loss is the mean over its rows, each as its step met it.
    """

    probe: LinearProbe
    last: LinearProbe
    best_epoch: int
    history: list[dict[str, Any]]


def fit_paper_classifier(
    features: TrainFeatures,
    targets: Tensor,
    valid_features: Tensor,
    valid_targets: Tensor,
    *,
    epochs: int = 15,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PaperFit:
    """The paper's classifier (Table 1): a linear layer, binary cross-entropy, Adam.

    The best epoch is the first with the highest validation AP (mean over the attributes that have
    a positive there).

    features: (n, d), or a function from the epoch (0, 1, …) to it, since each epoch may see other
    flips of the images and other draws of z. targets: (n, k) of 0 and 1. Probes are on the
    CPU. The same seed gives the same result on the same device; the global random state is left
    alone. Raises ValueError on shapes that do not fit, numbers that are not finite, other labels,
    a validation part without any positive.
    """
    _check_binary(targets, valid_targets)
    _check_pairs(valid_features, valid_targets)
    _check_columns(targets, valid_targets)
    if not bool((valid_targets > 0).any()):
        raise ValueError("the validation part has no positive of any attribute: it has no AP")
    truth = as_array(valid_targets)

    def mean_ap(probe: LinearProbe) -> float:
        scores = as_array(probe(valid_features))
        return float(_nanmean(average_precision(scores, truth, np.ones((1, len(truth)))))[0])

    loss = F.binary_cross_entropy_with_logits
    training = _train_linear(features, targets, loss, epochs, lr, batch_size, seed, device)
    return _choose_epoch(training, "valid_ap", mean_ap, max)


def fit_paper_regressor(
    features: TrainFeatures,
    targets: Tensor,
    valid_features: Tensor,
    valid_targets: Tensor,
    *,
    epochs: int = 15,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PaperFit:
    """The paper's regressor (Table 1): a linear layer, mean squared error, Adam, raw labels.

    The best epoch is the first with the lowest validation MSE. Arguments and errors as in
    `fit_paper_classifier`, but targets are any finite numbers (n, k).
    """
    _check_pairs(valid_features, valid_targets)
    _check_columns(targets, valid_targets)
    truth = as_array(valid_targets)

    def mse(probe: LinearProbe) -> float:
        return float(np.square(as_array(probe(valid_features)) - truth).mean())

    training = _train_linear(features, targets, F.mse_loss, epochs, lr, batch_size, seed, device)
    return _choose_epoch(training, "valid_mse", mse, min)


def _train_linear(
    features: TrainFeatures,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> Iterator[tuple[float, LinearProbe]]:
    """(mean training loss, a copy of the probe on the CPU) after each epoch."""
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"cannot train {epochs} epochs with batches of {batch_size}")
    order = BatchOrder(len(targets), fold(seed, "probe order"))
    targets = targets.to(device, torch.float32)
    layer: nn.Linear | None = None
    for epoch in range(epochs):
        x = features if isinstance(features, Tensor) else features(epoch)
        _check_pairs(x, targets)
        x = x.to(device, torch.float32)
        if layer is None:
            layer = _linear(x.shape[1], targets.shape[1], seed).to(device)
            optimizer = torch.optim.Adam(layer.parameters(), lr)
        total = torch.zeros((), device=device)
        # One epoch's own order, so that a batch never spans two epochs: the last one is smaller.
        rows = torch.tensor(order.indices(epoch * len(x), len(x)), device=device)
        for batch in rows.split(batch_size):
            batch_loss = loss(layer(x[batch]), targets[batch])
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            total += batch_loss.detach() * len(batch)
        weight, bias = (parameter.detach().cpu().clone() for parameter in layer.parameters())
        yield total.item() / len(x), LinearProbe(weight, bias)


def _linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the GPUs too, which this fork does not restore.
        torch.default_generator.manual_seed(fold(seed, "probe weights"))
        return nn.Linear(inputs, outputs)


def _choose_epoch(
    training: Iterator[tuple[float, LinearProbe]],
    figure: str,
    validate: Callable[[LinearProbe], float],
    choose: Callable[..., int],
) -> PaperFit:
    history: list[dict[str, Any]] = []
    probes: list[LinearProbe] = []
    for epoch, (train_loss, probe) in enumerate(training, start=1):
        history.append({"epoch": epoch, "train_loss": train_loss, figure: validate(probe)})
        probes.append(probe)
    best = choose(range(len(history)), key=lambda index: history[index][figure])
    return PaperFit(probes[best], probes[-1], best + 1, history)


# Probes that converge ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A probe on raw features; for each attribute its penalty λ, and whether its fit converged."""

    probe: LinearProbe
    penalty: list[float]
    converged: list[bool]


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A probe on raw features, and the penalty λ of each attribute."""

    probe: LinearProbe
    penalty: list[float]


def fit_logistic(
    x: Tensor,
    y: Tensor,
    valid_x: Tensor,
    valid_y: Tensor,
    penalties: Sequence[float] = LOGISTIC_PENALTIES,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> LogisticFit:
    """One L2-penalised logistic regression per attribute, run to convergence in float64.

    Minimises mean log loss + λ/2·‖w‖² over w and an unpenalised intercept, on features
    standardised by the mean and standard deviation of x: λ means the same for any n and any unit
    (scikit-learn's C is 1/(λn)). Each attribute has the λ of the lowest log loss on the validation
    part; the fit is not repeated on both parts. From the strongest penalty on, each fit starts at
    the one before; an attribute's search ends where the validation loss has risen twice in a row.
    converged: no component of the gradient exceeds 1e-5 in size. `progress(done, total)` counts
    penalties; the last may not be needed.

    x: (n, d); y: (n, k) of 0 and 1; valid_x and valid_y likewise. A feature that is constant in x
    has weight 0. Raises ValueError on an attribute that is constant in y, naming its column, on
    other labels, shapes that do not fit, numbers that are not finite and penalties not above 0.
    """
    _check_fit(x, y, valid_x, valid_y, penalties)
    _check_binary(y, valid_y)
    labels, valid_labels = ((part > 0).T.contiguous().cpu().numpy() for part in (y, valid_y))
    constant = np.flatnonzero(labels.all(1) | ~labels.any(1))
    if len(constant):
        raise ValueError(f"attribute in column {constant[0]} of y is constant: nothing to fit")
    scaling = _Standardisation.of(x)
    losses, valid = _LogLosses(scaling.apply(x), labels), scaling.apply(valid_x)
    k, d = len(labels), x.shape[1]
    share = labels.mean(1)
    weights = np.zeros((k, d + 1))
    weights[:, -1] = np.log(share / (1 - share))  # the minimum under an endless penalty
    best, penalty, gradient = weights.copy(), np.zeros(k), np.zeros(k)
    lowest, previous, risen = np.full(k, np.inf), np.full(k, np.inf), np.zeros(k, np.int64)
    searching = np.arange(k)
    path = sorted(penalties, reverse=True)
    for step, strength in enumerate(path, start=1):
        found, slope = losses.minimise(searching, weights[searching], strength)
        valid_loss = _log_loss(_logits(valid, found), valid_labels[searching])[0].mean(1)
        better = valid_loss < lowest[searching]
        chosen = searching[better]
        best[chosen], gradient[chosen] = found[better], slope[better]
        penalty[chosen], lowest[chosen] = strength, valid_loss[better]
        risen[searching] = np.where(valid_loss > previous[searching], risen[searching] + 1, 0)
        weights[searching], previous[searching] = found, valid_loss
        searching = searching[risen[searching] < 2]
        if progress is not None:
            progress(step, len(path))
        if len(searching) == 0:
            break
    probe = scaling.probe(best[:, :-1], best[:, -1])
    return LogisticFit(probe, penalty.tolist(), (gradient <= _CONVERGED).tolist())


class _LogLosses:
    """The mean log losses of k attributes as functions of their weights on the same features.

    Arrays named weights, gradient and steps are (a, d + 1): a row for each of some of the
    attributes, its intercept last. All of them share each pass over the features, in blocks that
    a processor's cache holds.
    """

    def __init__(self, x: Array, labels: Array) -> None:
        """x: standardised features, float64 (n, d); labels: bool (k, n)."""
        self.x, self.labels = x, labels
        self.spread, self.axes = _principal_axes(x)
        rows = max(1, _FEATURES_AT_ONCE // x.shape[1])
        self.blocks = [slice(start, start + rows) for start in range(0, len(x), rows)]

    def minimise(self, which: Array, weights: Array, penalty: float) -> tuple[Array, Array]:
        """Newton's method on the losses of `which` attributes + λ/2·‖w‖², from `weights` on.

        Returns the minima and the largest component of each one's gradient.
        """
        weights = weights.copy()
        loss, gradient, curvature = self._at(which, weights, penalty)
        for _ in range(_NEWTON_STEPS):
            todo = np.flatnonzero(np.abs(gradient).max(1) > _SOLVER_TOLERANCE)
            if len(todo) == 0:
                break
            steps = self._newton_steps(gradient[todo], curvature[todo], penalty)
            enough = 1e-4 * (gradient[todo] * steps).sum(1)  # Armijo's rule
            start, before, share = weights[todo], loss[todo], 1.0
            left = np.arange(len(todo))
            while len(left):
                now = todo[left]
                weights[now] = start[left] + share * steps[left]
                loss[now], gradient[now], curvature[now] = self._at(
                    which[now], weights[now], penalty
                )
                # Close to the minimum, a step's gain is lost in the rounding of the loss.
                left = left[loss[now] > before[left] + share * enough[left] + 1e-12]
                share /= 2
        return weights, np.abs(gradient).max(1)

    def _at(self, which: Array, weights: Array, penalty: float) -> tuple[Array, Array, Array]:
        """Penalised losses (a,), their gradients, and p (1 - p) of each row, float32 (a, n)."""
        loss, gradient = np.zeros(len(which)), np.zeros_like(weights)
        curvature = np.empty((len(which), len(self.x)), np.float32)
        for rows in self.blocks:
            x, labels = self.x[rows], self.labels[which, rows]
            losses, p = _log_loss(_logits(x, weights), labels)
            loss += losses.sum(1)
            gradient += _transposed(x, p - labels)
            curvature[:, rows] = p * (1 - p)
        ridge = self._ridge(weights, penalty)
        n = len(self.x)
        return loss / n + (weights * ridge).sum(1) / 2, gradient / n + ridge, curvature

    def _newton_steps(self, gradient: Array, curvature: Array, penalty: float) -> Array:
        """-H⁻¹ g for each attribute, by conjugate gradients to 5 % of the largest component.

        The products with H are in float32, since a step need not be exact.
        """
        steps = np.zeros_like(gradient)
        mean = curvature.mean(1)[:, None]
        goal = _NEWTON_ACCURACY * np.abs(gradient).max(1)
        left = np.arange(len(gradient))
        residual = -gradient
        direction = solved = self._precondition(residual, mean, penalty)
        product = (residual * solved).sum(1)
        for _ in range(_CONJUGATE_STEPS):
            curved = self._curve(direction, curvature, left) + self._ridge(direction, penalty)
            length = (product / (direction * curved).sum(1))[:, None]
            steps[left] += length * direction
            residual = residual - length * curved
            going = np.abs(residual).max(1) > goal[left]
            left, residual = left[going], residual[going]
            if len(left) == 0:
                break
            solved = self._precondition(residual, mean[left], penalty)
            last, product = product[going], (residual * solved).sum(1)
            direction = solved + (product / last)[:, None] * direction[going]
        return steps

    def _precondition(self, residual: Array, mean: Array, penalty: float) -> Array:
        """H⁻¹ times a residual, as if p (1 - p) were `mean` (a, 1) for all rows.

        That H is diagonal in the features' principal axes, and λ in what is orthogonal to them.
        """
        inner = residual[:, :-1]
        scale = 1 / (mean * self.spread + penalty) - 1 / penalty
        solved = (inner @ self.axes * scale) @ self.axes.T + inner / penalty
        return np.concatenate([solved, residual[:, -1:] / mean], 1)

    def _curve(self, direction: Array, curvature: Array, which: Array) -> Array:
        """The loss's Hessian, without a penalty, times a direction for each attribute."""
        single, found = direction.astype(np.float32), np.zeros_like(direction)
        for rows in self.blocks:
            x = self.x[rows].astype(np.float32)
            found += _transposed(x, curvature[which, rows] * _logits(x, single))
        return found / len(self.x)

    def _ridge(self, weights: Array, penalty: float) -> Array:
        """The gradient of λ/2·‖w‖², which leaves the intercept out."""
        ridge = penalty * weights
        ridge[:, -1] = 0
        return ridge


def _logits(x: Array, weights: Array) -> Array:
    """x (n, d), weights (a, d + 1) with the intercept last → (a, n)."""
    return weights[:, :-1] @ x.T + weights[:, -1:]


def _transposed(x: Array, values: Array) -> Array:
    """The sums over rows of values (a, n) times features x (n, d) and 1: (a, d + 1)."""
    return np.concatenate([values @ x, values.sum(1, keepdims=True)], 1)


def _log_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The log loss of each logit, and its probability of 1; labels are bool."""
    tail = np.exp(-np.abs(logits))
    loss = np.log1p(tail) + np.maximum(np.where(labels, -logits, logits), 0)
    return loss, np.where(logits > 0, 1, tail) / (1 + tail)


def fit_ridge(
    x: Tensor,
    y: Tensor,
    valid_x: Tensor,
    valid_y: Tensor,
    penalties: Sequence[float] = RIDGE_PENALTIES,
) -> RidgeFit:
    """One ridge regression per attribute, in closed form in float64.

    Minimises mean squared error + λ·‖w‖² over w and an unpenalised intercept, on features
    standardised by the mean and standard deviation of x. Each attribute has the λ of the lowest
    squared error on the validation part; the fit is not repeated on both parts.

    x: (n, d); y: (n, k); valid_x and valid_y likewise. A feature that is constant in x has weight
    0. Raises ValueError on shapes that do not fit, numbers that are not finite and penalties not
    above 0.
    """
    _check_fit(x, y, valid_x, valid_y, penalties)
    scaling = _Standardisation.of(x)
    intercept = as_array(y).mean(0)
    train, targets = scaling.apply(x), as_array(y) - intercept
    # In the principal axes every penalty has its solution at once.
    eigenvalues, axes = _principal_axes(train)
    projected = axes.T @ (train.T @ targets / len(train))
    valid = scaling.apply(valid_x) @ axes

    def weights(penalty: float | Array) -> Array:
        solved: Array = projected / (eigenvalues[:, None] + penalty)
        return solved

    def valid_mse(penalty: float) -> Array:
        mse: Array = np.square(valid @ weights(penalty) + intercept - as_array(valid_y)).mean(0)
        return mse

    errors = np.stack([valid_mse(penalty) for penalty in penalties])
    chosen = np.asarray(penalties)[errors.argmin(0)]
    return RidgeFit(scaling.probe((axes @ weights(chosen)).T, intercept), chosen.tolist())


def _principal_axes(x: Array) -> tuple[Array, Array]:
    """Eigenvalues (r,) of xᵀx/n above rounding, and their orthonormal eigenvectors (d, r).

    They are those of xxᵀ/n where that is smaller.
    """
    n, d = x.shape
    if d <= n:
        eigenvalues, axes = np.linalg.eigh(x.T @ x / n)
        return eigenvalues.clip(min=0), axes
    eigenvalues, vectors = np.linalg.eigh(x @ x.T / n)
    kept = eigenvalues > 1e-12 * eigenvalues[-1]
    return eigenvalues[kept], x.T @ vectors[:, kept] / np.sqrt(n * eigenvalues[kept])


@dataclass(frozen=True, eq=False)
class _Standardisation:
    """Features to mean 0 and standard deviation 1 over the training part, and back.

    std is infinite for a constant feature: its standardised value and its raw weight are then 0.
    """

    mean: Array
    std: Array

    @classmethod
    def of(cls, x: Tensor) -> _Standardisation:
        values = as_array(x)
        mean, std = values.mean(0), values.std(0)
        # Below this, a spread is no more than the rounding of float32 features.
        return cls(mean, np.where(std > 1e-6 * np.abs(mean), std, np.inf))

    def apply(self, x: Tensor) -> Array:
        values = as_array(x) - self.mean
        values /= self.std
        return values

    def probe(self, weight: Array, bias: Array) -> LinearProbe:
        """The probe on raw features that equals weight (k, d), bias (k,) on standardised ones."""
        raw = weight / self.std
        shifted = bias - raw @ self.mean
        return LinearProbe(torch.from_numpy(raw).float(), torch.from_numpy(shifted).float())


# Figures of predictions ----------------------------------------------------------------------


def classification_scores(
    scores: Tensor,
    targets: Tensor,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """AP, and accuracy at score > 0, of each attribute and their means over attributes.

    {"ap": Figure, "accuracy": Figure, "undefined": int, "attributes": [{"name", "base_rate", "ap",
    "accuracy"}]}. An attribute without a positive has no AP (its values are None); "undefined"
    says how many were left out of the mean for that.

    Intervals are bias-corrected 95 % intervals of the bootstrap over rows or, given `groups` (for
    each row the person it shows), over whole groups: images of one person are not independent. All
    attributes see the same resamples, and the same seed gives the same ones to every probe.
    Resamples without a positive are ignored. 0 resamples: low and high are None.

    scores, targets (0 or 1): (n, k). Raises ValueError on what does not fit.
    """
    _check_binary(targets)
    p, t = _check_predictions(scores, targets, names, groups)
    correct = ((p > 0) == (t > 0)).astype(np.float64)
    rankings = _rankings(p, t)

    def ap(weights: Array) -> Array:
        return _weighted_average_precision(rankings, weights)

    def accuracy(weights: Array) -> Array:
        return weights @ correct / weights.sum(1, keepdims=True)

    about = [{"name": n, "base_rate": float(r)} for n, r in zip(names, t.mean(0), strict=True)]
    return _with_intervals({"ap": ap, "accuracy": accuracy}, about, len(p), groups, resamples, seed)


def regression_scores(
    predictions: Tensor,
    targets: Tensor,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Pearson's r and MSE of each attribute and their means over attributes.

    {"pearson_r": Figure, "mse": Figure, "undefined": int, "attributes": [{"name", "variance",
    "pearson_r", "mse"}]}. A constant label or prediction has no r (its values are None);
    "undefined" says how many were left out of the mean for that. variance is that of the label
    (over n). Intervals as in `classification_scores`.

    predictions, targets: (n, k). Raises ValueError on what does not fit.
    """
    p, t = _check_predictions(predictions, targets, names, groups)
    squared = np.square(p - t)

    def mse(weights: Array) -> Array:
        return weights @ squared / weights.sum(1, keepdims=True)

    def r(weights: Array) -> Array:
        return pearson_r(p, t, weights)

    about = [{"name": n, "variance": float(v)} for n, v in zip(names, t.var(0), strict=True)]
    return _with_intervals({"pearson_r": r, "mse": mse}, about, len(p), groups, resamples, seed)


def classification_base_rate(targets: Tensor) -> dict[str, float]:
    """{"ap", "accuracy"} of knowing nothing, as means over attributes. targets: (n, k) of 0 and 1.

    A random order has the prevalence as its AP (attributes without a positive are left out, as
    from the mean AP); always giving the commoner answer has accuracy max(p, 1 - p). ValueError
    where there is no positive at all.
    """
    _check_binary(targets)
    prevalence = as_array(targets).mean(0)
    if not prevalence.any():
        raise ValueError("there is no positive of any attribute: AP is undefined")
    return {
        "ap": float(prevalence[prevalence > 0].mean()),
        "accuracy": float(np.maximum(prevalence, 1 - prevalence).mean()),
    }


def regression_base_rate(train_targets: Tensor, targets: Tensor) -> dict[str, float]:
    """{"mse"} of always predicting the training mean. train_targets: (m, k), targets: (n, k)."""
    return {"mse": float(np.square(as_array(targets) - as_array(train_targets).mean(0)).mean())}


def average_precision(scores: Array, labels: Array, weights: Array) -> Array:
    """AP, Σ (R_i - R_{i-1}) P_i over the distinct scores as in scikit-learn, for many weightings.

    scores, labels (0 or 1): (n, k); weights: (b, n), none negative. Returns (b, k); NaN where the
    positives weigh nothing.
    """
    return _weighted_average_precision(_rankings(scores, labels), weights)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """What the AP of one attribute needs of its scores and labels, whatever the rows weigh.

    order: rows from the highest score on; positives: those of them that are positive. The sum has
    a term for each distinct score of a positive: ends and hits are its last places in the two.
    """

    order: Array
    positives: Array
    ends: Array
    hits: Array

    @classmethod
    def of(cls, scores: Array, labels: Array) -> _Ranking:
        order = np.argsort(-scores, kind="stable")
        positive = labels[order] > 0
        ends = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)
        hits = np.cumsum(positive)[ends]
        # Recall grows only at the scores of positives: the sum needs no others.
        grows = np.diff(hits, prepend=0) > 0
        return cls(order, order[positive], ends[grows], hits[grows] - 1)


def _rankings(scores: Array, labels: Array) -> list[_Ranking]:
    """Of each attribute. scores, labels: (n, k)."""
    return [_Ranking.of(s, t) for s, t in zip(scores.T, labels.T, strict=True)]


def _weighted_average_precision(rankings: Sequence[_Ranking], weights: Array) -> Array:
    """weights: (b, n) → (b, k)."""

    def of_one(ranking: _Ranking) -> Array:
        if len(ranking.ends) == 0:
            return np.full(len(weights), np.nan)
        # `take` is several times as fast as an index here.
        hits = np.cumsum(weights.take(ranking.positives, 1), 1).take(ranking.hits, 1)
        chosen = np.cumsum(weights.take(ranking.order, 1), 1).take(ranking.ends, 1)
        precision = np.divide(hits, chosen, out=np.zeros_like(hits), where=chosen > 0)
        summed = (np.diff(hits, axis=1, prepend=0) * precision).sum(1)
        total = hits[:, -1]
        return np.divide(summed, total, out=np.full_like(total, np.nan), where=total > 0)

    return np.stack([of_one(ranking) for ranking in rankings], axis=1)


def pearson_r(predictions: Array, targets: Array, weights: Array) -> Array:
    """Weighted correlations. predictions, targets: (n, k); weights: (b, n), none negative.

    Returns (b, k); NaN where predictions or targets are constant on the rows that have weight.
    """
    p, t = _centred(predictions), _centred(targets)
    total = weights.sum(1, keepdims=True)

    def mean(values: Array) -> Array:
        return weights @ values / total

    mean_p, mean_t = mean(p), mean(t)
    var_p, var_t = mean(p * p) - mean_p**2, mean(t * t) - mean_t**2
    covariance = mean(p * t) - mean_p * mean_t
    # A resample of equal values leaves a variance of rounding errors.
    varies = (var_p > 1e-12 * p.var(0)) & (var_t > 1e-12 * t.var(0))
    scale = np.sqrt(np.where(varies, var_p * var_t, np.nan))
    return np.clip(covariance / scale, -1, 1)


def _centred(values: Array) -> Array:
    """Columns of mean 0; a constant one is exactly 0."""
    return np.where(np.ptp(values, axis=0) > 0, values - values.mean(0), 0)


def _with_intervals(
    statistics: Mapping[str, Callable[[Array], Array]],
    about: Sequence[dict[str, Any]],
    n: int,
    groups: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of statistics that map weights of rows (b, n) to values (b, k).

    about: for each attribute, what its entry holds before the figures. The first statistic decides
    which attributes count as undefined.
    """
    values = {key: statistic(np.ones((1, n)))[0] for key, statistic in statistics.items()}
    drawn: dict[str, list[Array]] = {key: [np.empty((0, len(about)))] for key in statistics}
    for weights in _resampling_weights(n, groups, resamples, seed):
        for key, statistic in statistics.items():
            drawn[key].append(statistic(weights))
    samples = {key: np.concatenate(parts) for key, parts in drawn.items()}
    first = next(iter(statistics))
    return {
        **{key: _figure(_nanmean(values[key]), _nanmean(samples[key])) for key in statistics},
        "undefined": int(np.isnan(values[first]).sum()),
        "attributes": [
            {**entry, **{key: _figure(values[key][i], samples[key][:, i]) for key in statistics}}
            for i, entry in enumerate(about)
        ],
    }


def _resampling_weights(
    n: int, groups: Sequence[str] | None, resamples: int, seed: int
) -> Iterator[Array]:
    """How often each bootstrap resample holds each row: blocks of float64 (b, n).

    A resample draws as many groups as there are, with replacement, each with all of its rows;
    without `groups` each row is its own. Resample i depends on the seed, n and i only.
    """
    units = n
    if groups is not None:
        distinct, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
        units = len(distinct)

    def counts(resample: int) -> Array:
        generator = np.random.default_rng(fold(seed, "bootstrap", resample))
        drawn = np.bincount(generator.integers(units, size=units), minlength=units)
        return drawn if groups is None else drawn[group_of_row]

    block = max(1, _WEIGHTS_AT_ONCE // n)
    for start in range(0, resamples, block):
        some = range(start, min(start + block, resamples))
        yield np.stack([counts(resample) for resample in some]).astype(np.float64)


def _nanmean(values: Array) -> Array:
    """Mean over the last axis of what is not NaN; NaN where that is nothing."""
    defined = ~np.isnan(values)
    total, count = np.where(defined, values, 0).sum(-1), defined.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _figure(value: Array, samples: Array) -> Figure:
    """A value and its bias-corrected percentile interval (Efron 1981); None for the undefined.

    Plain percentiles would not do: rows drawn twice tie with themselves, which raises AP.
    """
    from scipy.stats import norm

    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    defined = samples[~np.isnan(samples)]
    if len(defined) == 0:
        return {"value": float(value), "low": None, "high": None}
    # Half of ties count as below, and never none or all: their quantile would be infinite.
    below = ((defined < value).sum() + (defined <= value).sum()) / (2 * len(defined))
    bias = norm.ppf(np.clip(below, 0.5 / len(defined), 1 - 0.5 / len(defined)))
    ends = norm.cdf(2 * bias + norm.ppf([0.025, 0.975]))
    low, high = np.percentile(defined, 100 * ends)
    return {"value": float(value), "low": float(low), "high": float(high)}


# Checks --------------------------------------------------------------------------------------


def _check_pairs(x: Tensor, y: Tensor) -> None:
    """x (n, d) and y (n, k) of one n ≥ 1, all finite."""
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not x.numel() or not y.numel():
        raise ValueError(
            f"expected features (n, d) and labels (n, k), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    for what, values in (("features", x), ("labels", y)):
        # The extremes pass a NaN on; a mask of all values would cost an epoch much of its time.
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(values)):
            raise ValueError(f"{what} hold NaN or infinite numbers")


def _check_fit(
    x: Tensor, y: Tensor, valid_x: Tensor, valid_y: Tensor, penalties: Sequence[float]
) -> None:
    _check_pairs(x, y)
    _check_pairs(valid_x, valid_y)
    _check_columns(x, valid_x)
    _check_columns(y, valid_y)
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties must be above 0, got {list(penalties)}")


def _check_columns(train: Tensor, valid: Tensor) -> None:
    if train.dim() != 2 or valid.dim() != 2 or train.shape[1] != valid.shape[1]:
        raise ValueError(
            f"training part {tuple(train.shape)} and validation part {tuple(valid.shape)} "
            "differ in columns"
        )


def _check_binary(*parts: Tensor) -> None:
    for labels in parts:
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError("labels of a classification must be 0 or 1")


def _check_predictions(
    predictions: Tensor, targets: Tensor, names: Sequence[str], groups: Sequence[str] | None
) -> tuple[Array, Array]:
    """Both as float64 (n, k)."""
    if predictions.shape != targets.shape or targets.dim() != 2 or not targets.numel():
        raise ValueError(
            "expected predictions and labels of one shape (n, k), got "
            f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        )
    if not bool(torch.isfinite(predictions).all() and torch.isfinite(targets).all()):
        raise ValueError("predictions or labels hold NaN or infinite numbers")
    if len(names) != targets.shape[1]:
        raise ValueError(f"{len(names)} names for {targets.shape[1]} attributes")
    if groups is not None and len(groups) != len(targets):
        raise ValueError(f"{len(groups)} groups for {len(targets)} rows")
    return as_array(predictions), as_array(targets)
