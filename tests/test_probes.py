"""Linear probes: their fits, their figures with intervals, and disentanglement."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from dbae import DBAE
from dbae.data import open_dataset, to_model_range
from dbae.data.labels import binary_labels
from dbae.data.order import BatchOrder
from dbae.evaluation import probes
from dbae.evaluation.disentanglement import _auroc, tad
from dbae.evaluation.features import flips, of_latents
from dbae.evaluation.latents import Latents
from dbae.evaluation.probes import (
    LinearProbe,
    average_precision,
    classification_base_rate,
    classification_scores,
    fit_logistic,
    fit_paper_classifier,
    fit_paper_regressor,
    fit_ridge,
    pearson_r,
    regression_base_rate,
    regression_scores,
)
from dbae.random import fold


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labelled(n: int, d: int = 6, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of unequal scale and offset; labels drawn from a logistic model of them."""
    x = normal(n, d, seed=seed)
    logits = x @ normal(d, k, seed=100)
    y = (
        torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < logits.sigmoid()
    ).double()
    return x * torch.arange(1, d + 1) + 5, y


def width(figure: dict[str, float]) -> float:
    return figure["high"] - figure["low"]


# The paper's probes --------------------------------------------------------------------------


def test_the_paper_classifier_learns_and_keeps_the_first_best_epoch() -> None:
    n, d = 100, 60  # few enough to overfit: the best epoch is not the last
    x, vx, direction = normal(n, d), normal(500, d, seed=1), normal(d, 3, seed=2)
    y, vy = (
        (p @ direction + 8 * normal(len(p), 3, seed=s) > 0).double() for p, s in ((x, 3), (vx, 4))
    )
    fit = fit_paper_classifier(x, y, vx, vy, epochs=12, lr=0.1)
    aps = [row["valid_ap"] for row in fit.history]
    assert [row["epoch"] for row in fit.history] == list(range(1, 13))
    assert fit.best_epoch == aps.index(max(aps)) + 1
    assert 1 < fit.best_epoch < 12
    for probe, epoch in ((fit.probe, fit.best_epoch), (fit.last, 12)):
        expected = average_precision_score(vy.numpy(), probe(vx).numpy())
        assert aps[epoch - 1] == pytest.approx(expected, abs=1e-12)
    assert fit.history[-1]["train_loss"] < 0.5 * fit.history[0]["train_loss"]


def test_the_paper_regressor_keeps_the_epoch_of_the_lowest_validation_error() -> None:
    x, vx, true = normal(100, 50), normal(200, 50, seed=1), 0.2 * normal(50, 2, seed=2)
    y, vy = x @ true + 1 + normal(100, 2, seed=3), vx @ true + 1 + normal(200, 2, seed=4)
    fit = fit_paper_regressor(x, y, vx, vy, epochs=40, lr=0.02)
    errors = [row["valid_mse"] for row in fit.history]
    assert fit.best_epoch == errors.index(min(errors)) + 1
    assert 1 < fit.best_epoch < 40
    for probe, epoch in ((fit.probe, fit.best_epoch), (fit.last, 40)):
        expected = (probe(vx) - vy).square().mean().item()
        assert errors[epoch - 1] == pytest.approx(expected, rel=1e-6)
    assert fit.history[-1]["train_loss"] < 0.6 < 2 < fit.history[0]["train_loss"]


def test_a_probe_training_is_a_function_of_its_seed_and_moves_no_global_randomness() -> None:
    (x, y), (vx, vy) = labelled(300), labelled(100, seed=1)
    before = torch.random.get_rng_state()
    first = fit_paper_classifier(x, y, vx, vy, epochs=2, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again = fit_paper_classifier(x, y, vx, vy, epochs=2, seed=4)
    other = fit_paper_classifier(x, y, vx, vy, epochs=2, seed=5)
    assert torch.equal(first.last.weight, again.last.weight) and first.history == again.history
    assert not torch.equal(first.last.weight, other.last.weight)


def test_a_probe_starts_as_a_linear_layer_of_torch_does() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(fold(3, "probe weights"))
        expected = torch.nn.Linear(5, 2)
    x, y = normal(10, 5), normal(10, 2)
    untrained = fit_paper_regressor(x, y, x, y, epochs=1, lr=0.0, seed=3).last
    assert torch.equal(untrained.weight, expected.weight)
    assert torch.equal(untrained.bias, expected.bias)


def test_each_epoch_sees_its_own_features_and_each_row_once() -> None:
    y = normal(10, 2)
    epochs: list[int] = []

    def features(epoch: int) -> Tensor:
        epochs.append(epoch)
        return normal(10, 3, seed=epoch)

    fit = fit_paper_regressor(features, y, normal(10, 3), y, epochs=3, lr=0.0, batch_size=4)
    assert epochs == [0, 1, 2]
    # At a learning rate of 0, the mean loss over batches of 4, 4 and 2 is the loss of all rows.
    for epoch, row in enumerate(fit.history):
        expected = (fit.last(normal(10, 3, seed=epoch)) - y).square().mean().item()
        assert row["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_order_of_rows_changes_from_epoch_to_epoch_and_with_the_seed() -> None:
    x, y = normal(10, 3), torch.arange(10.0)[:, None]

    def batches(seed: int) -> list[list[float]]:
        met: list[list[float]] = []

        def loss(predicted: Tensor, target: Tensor) -> Tensor:
            met.append(target[:, 0].tolist())
            return (predicted - target).square().mean()

        list(probes._train_linear(x, y, loss, 2, 1e-3, 4, seed, "cpu"))
        return met

    found = batches(0)
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2]
    first, second = ([row for batch in half for row in batch] for half in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert found == batches(0) != batches(1)


def test_a_probe_on_kept_latents_is_that_of_a_loop_that_encodes_every_image_as_it_comes(
    model: DBAE,
) -> None:
    """The paper's protocol, image by image: mirror, encode, one step of Adam by autograd."""
    n, epochs, batch_size, seed = 48, 3, 16, 5
    data = open_dataset("demo", None, 32, "train")
    images = torch.stack([data[i].image for i in range(n + 24)])
    targets = torch.from_numpy(binary_labels(data, None).values[: n + 24]).float()

    def encoded(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode_stats(to_model_range(batch))[0]

    kept = [
        Latents(encoded(part), None, encoded(part.flip(3)), None, torch.arange(len(part)), {})
        for part in (images[:n], images[n:], images[n:])
    ]
    found = of_latents(kept, "mean", True, seed)
    fit = fit_paper_classifier(
        found.epoch, targets[:n], found.valid, targets[n:],
        epochs=epochs, lr=0.01, batch_size=batch_size, seed=seed,
    )  # fmt: skip

    torch.manual_seed(fold(seed, "probe weights"))
    layer = torch.nn.Linear(model.config.latent_dim, targets.shape[1])
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    order = BatchOrder(n, fold(seed, "probe order"))
    for epoch in range(epochs):
        mirrored = flips(n, seed, epoch)
        assert 0 < mirrored.sum() < n
        for start in range(0, n, batch_size):
            rows = order.indices(epoch * n + start, batch_size)
            shown = torch.stack([images[i].flip(2) if mirrored[i] else images[i] for i in rows])
            logits = layer(encoded(shown))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.allclose(fit.last.weight, layer.weight, atol=1e-5)
    assert torch.allclose(fit.last.bias, layer.bias, atol=1e-5)
    start = probes._linear(*reversed(layer.weight.shape), seed)
    assert (layer.weight - start.weight).abs().max() > 0.01
    with torch.no_grad():
        scores = layer(encoded(images[n:])).numpy()
    defined = targets[n:].any(0).numpy()
    ap = average_precision_score(targets[n:].numpy()[:, defined], scores[:, defined])
    assert fit.history[-1]["valid_ap"] == pytest.approx(ap, abs=1e-6)


# Probes that converge ------------------------------------------------------------------------


def test_logistic_regression_ends_where_the_gradient_vanishes() -> None:
    (x, y), (vx, vy) = labelled(400), labelled(200, seed=1)
    done: list[tuple[int, int]] = []
    fit = fit_logistic(x, y, vx, vy, [0.02], progress=lambda *counts: done.append(counts))
    assert done == [(1, 1)]
    assert fit.penalty == [0.02] * 3 and fit.converged == [True] * 3
    mean, std = x.mean(0), x.std(0, correction=0)
    weight = (fit.probe.weight.double() * std).requires_grad_()
    bias = (fit.probe.bias.double() + fit.probe.weight.double() @ mean).requires_grad_()
    logits = (x - mean) / std @ weight.T + bias
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y) * 3  # a sum over k
    (loss + 0.01 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 2e-6 and bias.grad.abs().max() < 2e-6
    assert weight.detach().abs().max() > 0.1


def test_logistic_regression_recovers_the_weights_that_made_the_labels() -> None:
    (x, y), (vx, vy) = labelled(40_000, d=4, k=2), labelled(4000, d=4, k=2, seed=1)
    fit = fit_logistic(x, y, vx, vy)
    true = normal(4, 2, seed=100).T / torch.arange(1, 5)
    assert torch.allclose(fit.probe.weight.double(), true, atol=0.05)
    assert torch.allclose(fit.probe.bias.double(), -5 * true.sum(1), atol=0.3)


def test_each_attribute_has_the_penalty_of_its_lowest_validation_loss() -> None:
    d, k = 30, 3
    x, vx = normal(60, d), normal(2000, d, seed=1)
    direction = normal(d, k, seed=2) * torch.tensor([0.0, 0.2, 3.0])
    y, vy = ((p @ direction + normal(len(p), k, seed=s) > 0).double() for p, s in ((x, 3), (vx, 4)))
    grid = [10.0, 1.0, 0.1, 0.01, 1e-3]
    fit = fit_logistic(x, y, vx, vy, grid)
    singles = torch.stack([
        torch.nn.functional.binary_cross_entropy_with_logits(
            fit_logistic(x, y, vx, vy, [penalty]).probe(vx).double(), vy, reduction="none"
        ).mean(0)
        for penalty in grid
    ])  # fmt: skip
    assert fit.penalty == [grid[i] for i in singles.argmin(0)]
    for attribute, penalty in enumerate(fit.penalty):
        alone = fit_logistic(x, y, vx, vy, [penalty]).probe
        assert torch.allclose(fit.probe.weight[attribute], alone.weight[attribute], atol=1e-3)
    assert fit.penalty[0] > fit.penalty[2]


@pytest.mark.parametrize(("n", "d"), [(1000, 20), (40, 60)])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-5])
def test_attributes_fitted_at_once_are_those_of_scikit_learn(
    n: int, d: int, penalty: float, monkeypatch
) -> None:
    monkeypatch.setattr(probes, "_FEATURES_AT_ONCE", 300 * d)  # several blocks, the last smaller
    x = (normal(n, d) @ normal(d, d, seed=1)) ** 3  # correlated, heavy tails
    logits = x @ normal(d, 5, seed=2) / d**2 * torch.tensor([0, 0.1, 1, 10, 100])
    y = (logits + normal(n, 5, seed=3) > torch.tensor([0, 0, 0, 0, 30])).double()
    y[0], y[1] = 0, 1
    fit = fit_logistic(x, y, x, y, [penalty])
    assert fit.converged == [True] * 5
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    for column in range(5):
        theirs = LogisticRegression(C=1 / (penalty * n), solver="newton-cholesky", tol=1e-10)
        theirs.fit(standard, y[:, column].numpy())
        weight = fit.probe.weight[column].double() * x.std(0, correction=0)
        expected = torch.from_numpy(theirs.coef_[0])
        # A gradient of 1e-6 a component leaves at most this, since the Hessian is λ or more.
        assert (weight - expected).norm() < 1e-6 * d**0.5 / penalty + 1e-6
        probability = torch.from_numpy(theirs.predict_proba(standard)[:, 1])
        atol = 1e-3 if penalty < 1e-3 else 1e-5
        assert torch.allclose(fit.probe(x)[:, column].sigmoid().double(), probability, atol=atol)


def test_newton_steps_that_lead_too_far_are_shortened() -> None:
    x, y = labelled(300)
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    losses = probes._LogLosses(standard, y.T.numpy() > 0)
    everyone = np.arange(3)
    near, _ = losses.minimise(everyone, np.zeros((3, 7)), 1e-3)
    far, gradient = losses.minimise(everyone, 20 * normal(3, 7).numpy(), 1e-3)
    assert gradient.max() <= 1e-6
    assert far == pytest.approx(near, abs=1e-2)


def test_an_attribute_leaves_the_search_when_its_validation_loss_rose_twice_in_a_row(
    monkeypatch,
) -> None:
    losses = {  # of each penalty and attribute
        8.0: (1.0, 1.0, 1.0),
        7.0: (1.1, 0.9, 1.1),
        6.0: (0.9, 0.8, 1.2),
        5.0: (1.0, 0.7, 0.1),
        4.0: (1.1, 0.6, 0.1),
        3.0: (0.1, 0.5, 0.1),
    }
    asked: list[tuple[float, list[int]]] = []

    def minimise(self, which, weights, penalty):
        asked.append((penalty, which.tolist()))
        weights = np.zeros_like(weights)
        weights[:, -1] = -np.log(np.expm1(np.array(losses[penalty])[which]))  # all are positive
        return weights, np.zeros(len(which))

    monkeypatch.setattr(probes._LogLosses, "minimise", minimise)
    (x, y), (vx, vy) = labelled(50), labelled(20, seed=1)
    fit = fit_logistic(x, y, vx, torch.ones_like(vy), list(losses))
    assert fit.penalty == [6.0, 3.0, 8.0]
    everyone, after_third, after_fifth = [0, 1, 2], [0, 1], [1]
    who = [everyone, everyone, everyone, after_third, after_third, after_fifth]
    assert asked == list(zip(losses, who, strict=True))


def test_a_fit_that_did_not_converge_says_so(monkeypatch) -> None:
    (x, y), (vx, vy) = labelled(300), labelled(100, seed=1)
    monkeypatch.setattr(probes, "_SOLVER_TOLERANCE", 0.1)
    assert fit_logistic(x, y, vx, vy, [1e-4]).converged == [False] * 3


def test_a_tolerance_below_the_rounding_ends_without_a_warning(monkeypatch) -> None:
    (x, y), (vx, vy) = labelled(300), labelled(100, seed=1)
    monkeypatch.setattr(probes, "_SOLVER_TOLERANCE", 1e-30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_logistic(x, y, vx, vy, [1e-4]).converged == [True] * 3


def test_a_constant_attribute_is_refused_by_its_column() -> None:
    x, y = labelled(50)
    y[:, 1] = 1
    with pytest.raises(ValueError, match="column 1 of y is constant"):
        fit_logistic(x, y, x, y)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_ridge_is_least_squares_with_penalty_rows(n: int, d: int) -> None:
    x, y = normal(n, d) * 3 + 2, normal(n, 2, seed=1) + 4
    fit = fit_ridge(x, y, x[:5], y[:5], penalties=[0.3])
    mean, std = x.mean(0), x.std(0, correction=0)
    design = np.concatenate([((x - mean) / std).numpy(), math.sqrt(0.3 * n) * np.eye(d)])
    wanted = np.concatenate([(y - y.mean(0)).numpy(), np.zeros((d, 2))])
    weight = np.linalg.lstsq(design, wanted, rcond=None)[0]
    expected = (x - mean) / std @ torch.from_numpy(weight) + y.mean(0)
    assert torch.allclose(fit.probe(x).double(), expected, atol=1e-5)


def test_ridge_chooses_each_penalty_on_the_validation_part() -> None:
    d = 30
    x, vx = normal(60, d), normal(2000, d, seed=1)
    direction = normal(d, 3, seed=2) * torch.tensor([0.0, 0.1, 3.0])
    y, vy = (p @ direction + normal(len(p), 3, seed=s) for p, s in ((x, 3), (vx, 4)))
    fit = fit_ridge(x, y, vx, vy)
    for penalty in probes.RIDGE_PENALTIES[::4]:
        single = fit_ridge(x, y, vx, vy, [penalty]).probe
        excess = (single(vx) - vy).square().mean(0) - (fit.probe(vx) - vy).square().mean(0)
        assert (excess >= -1e-6).all()
    assert fit.penalty[0] > fit.penalty[1] > fit.penalty[2]


@pytest.mark.parametrize("fit", [fit_logistic, fit_ridge])
def test_converged_probes_do_not_depend_on_the_unit_of_a_feature(fit) -> None:
    (x, y), (vx, vy) = labelled(200), labelled(100, seed=1)
    mean, std = x.mean(0), x.std(0, correction=0)
    raw = fit(x, y, vx, vy)
    standard = fit((x - mean) / std, y, (vx - mean) / std, vy)
    assert raw.penalty == standard.penalty
    assert torch.allclose(raw.probe(vx), standard.probe((vx - mean) / std), atol=1e-5)


@pytest.mark.parametrize("fit", [fit_logistic, fit_ridge])
def test_a_constant_feature_has_no_weight_whatever_it_is_later(fit) -> None:
    (x, y), (vx, vy) = labelled(200), labelled(100, seed=1)
    dead = torch.full((200, 1), 0.1).double()
    dead[::2] += 1e-8  # what float32 arithmetic may leave of a constant
    with_dead = fit(torch.cat([x, dead], 1), y, torch.cat([vx, normal(100, 1)], 1), vy)
    without = fit(x, y, vx, vy)
    assert (with_dead.probe.weight[:, -1] == 0).all()
    assert torch.allclose(with_dead.probe.weight[:, :-1], without.probe.weight, atol=1e-6)


def test_fits_refuse_what_does_not_fit() -> None:
    x, y = labelled(20)
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[3, 2] = value
        with pytest.raises(ValueError, match="NaN"):
            fit_ridge(bad, y, x, y)
    with pytest.raises(ValueError, match="0 or 1"):
        fit_logistic(x, y * 2 - 1, x, y)
    with pytest.raises(ValueError, match="0 or 1"):
        fit_paper_classifier(x, y * 2 - 1, x, y)
    with pytest.raises(ValueError, match="columns"):
        fit_ridge(x, y, x[:, 1:], y)
    with pytest.raises(ValueError, match="columns"):
        fit_paper_regressor(x, y, x, y[:, :1])
    with pytest.raises(ValueError, match="penalties"):
        fit_ridge(x, y, x, y, penalties=[0.0])
    with pytest.raises(ValueError, match="no positive"):
        fit_paper_classifier(x, y, x, y * 0)
    with pytest.raises(ValueError, match="0 epochs"):
        fit_paper_regressor(x, y, x, y, epochs=0)
    with pytest.raises(ValueError, match="a probe of 4 features"):
        LinearProbe(torch.zeros(1, 4), torch.zeros(1))(torch.zeros(2, 3))


# Figures -------------------------------------------------------------------------------------


def test_weighted_average_precision_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for levels in (3, 20, 10_000):  # of the scores: few of them make many ties
        scores = rng.integers(levels, size=(200, 2)).astype(float)
        labels = (rng.random((200, 2)) < 0.3).astype(float)
        weights = np.stack([np.ones(200), rng.poisson(1, 200), rng.random(200)])
        expected = [
            [
                average_precision_score(t, s, sample_weight=w)
                for s, t in zip(scores.T, labels.T, strict=True)
            ]
            for w in weights
        ]
        assert average_precision(scores, labels, weights) == pytest.approx(
            np.array(expected), abs=1e-12
        )


def test_weighted_correlation_is_that_of_scipy_on_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    p = rng.normal(size=(50, 2)) + 1000
    t = p * 0.5 + rng.normal(size=(50, 2))
    counts = rng.poisson(1, (3, 50))
    expected = [
        [pearsonr(np.repeat(a, c), np.repeat(b, c))[0] for a, b in zip(p.T, t.T, strict=True)]
        for c in counts
    ]
    assert pearson_r(p, t, counts.astype(float)) == pytest.approx(np.array(expected), abs=1e-12)


def test_rows_without_weight_cannot_define_a_figure() -> None:
    rng = np.random.default_rng(0)
    equal = np.concatenate([np.tile(rng.random((1, 20)), (3, 1)), 2 + rng.random((1, 20))])
    varied = rng.random((4, 20))
    positive = np.repeat([[0.0], [0], [0], [1]], 20, axis=1)
    weights = np.array([[1.0, 1, 1, 0], [1, 1, 0, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = (
            average_precision(equal, positive, weights),
            pearson_r(equal, varied, weights),
            pearson_r(varied, equal, weights),
        )
    for found in figures:
        assert np.isnan(found[0]).all() and not np.isnan(found[1]).any()


def test_figures_are_those_of_the_libraries() -> None:
    scores, targets = normal(300, 3), (normal(300, 3, seed=1) > 0.5).double()
    found = classification_scores(scores, targets, ["a", "b", "c"], resamples=20)
    ap = average_precision_score(targets.numpy(), scores.numpy(), average=None)
    right = ((scores > 0) == (targets > 0)).double().mean(0)
    assert [row["name"] for row in found["attributes"]] == ["a", "b", "c"]
    assert [row["ap"]["value"] for row in found["attributes"]] == pytest.approx(ap, abs=1e-12)
    assert [row["accuracy"]["value"] for row in found["attributes"]] == pytest.approx(right)
    assert [row["base_rate"] for row in found["attributes"]] == pytest.approx(targets.mean(0))
    assert found["ap"]["value"] == pytest.approx(ap.mean(), abs=1e-12)
    assert found["accuracy"]["value"] == pytest.approx(right.mean())
    assert found["undefined"] == 0

    predictions, labels = normal(300, 2), normal(300, 2, seed=2) * 2
    found = regression_scores(predictions, labels, ["a", "b"], resamples=20)
    r = [pearsonr(p, t)[0] for p, t in zip(predictions.numpy().T, labels.numpy().T, strict=True)]
    assert [row["pearson_r"]["value"] for row in found["attributes"]] == pytest.approx(r, abs=1e-12)
    assert found["pearson_r"]["value"] == pytest.approx(np.mean(r), abs=1e-12)
    assert found["mse"]["value"] == pytest.approx((predictions - labels).square().mean())
    assert [row["variance"] for row in found["attributes"]] == pytest.approx(
        labels.var(0, correction=0)
    )


def test_what_has_no_figure_is_none_and_left_out_of_the_mean() -> None:
    scores, targets = normal(40, 3), (normal(40, 3, seed=1) > 0).double()
    targets[:, 1] = 0
    found = classification_scores(scores, targets, ["a", "b", "c"], resamples=20)
    values = [row["ap"]["value"] for row in found["attributes"]]
    assert found["attributes"][1]["ap"] == {"value": None, "low": None, "high": None}
    assert found["ap"]["value"] == pytest.approx((values[0] + values[2]) / 2)
    assert found["undefined"] == 1

    predictions = normal(40, 3)
    predictions[:, 0] = 0.1
    found = regression_scores(predictions, predictions.flip(1), ["a", "b", "c"], resamples=20)
    assert [row["pearson_r"]["value"] is None for row in found["attributes"]] == [True, False, True]
    assert found["pearson_r"]["value"] == pytest.approx(1) and found["undefined"] == 2
    assert found["attributes"][0]["mse"]["value"] > 0
    alone = regression_scores(predictions[:, :1], predictions[:, :1], ["a"], resamples=20)
    assert alone["pearson_r"] == {"value": None, "low": None, "high": None}


def test_a_resample_without_a_positive_is_ignored() -> None:
    targets = torch.zeros(12, 1)
    targets[3] = 1  # a third of the resamples miss it
    found = classification_scores(normal(12, 1), targets, ["a"], resamples=200)
    assert 0 < found["ap"]["low"] <= found["ap"]["value"] <= found["ap"]["high"] <= 1


def test_no_resamples_give_no_interval() -> None:
    found = classification_scores(normal(9, 1), torch.ones(9, 1), ["a"], resamples=0)
    assert found["ap"] == {"value": 1.0, "low": None, "high": None}


def test_intervals_are_as_wide_as_theory_says() -> None:
    n, rho = 2000, 0.6
    x = normal(n, 1)
    y = rho * x + math.sqrt(1 - rho**2) * normal(n, 1, seed=1)
    found = regression_scores(x, y, ["a"])
    assert width(found["pearson_r"]) == pytest.approx(3.92 * (1 - rho**2) / math.sqrt(n), rel=0.15)
    right = (x > 0) == (y > 0)
    found = classification_scores(x, (y > 0).double(), ["a"])["accuracy"]
    assert width(found) == pytest.approx(3.92 * right.double().std().item() / n**0.5, rel=0.15)
    assert found["low"] < right.double().mean() < found["high"]


def test_intervals_hold_the_truth_19_times_in_20() -> None:
    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        positive = (normal(n, 1, seed=seed) > 0.5).double()
        return normal(n, 1, seed=seed + 1) + positive, positive

    scores, targets = draw(400_000, 10_000)
    truth = average_precision_score(targets.numpy(), scores.numpy())
    hits = 0
    for trial in range(200):
        figure = classification_scores(*draw(200, 2 * trial), ["a"], resamples=200)["ap"]
        hits += figure["low"] <= truth <= figure["high"]
    assert 0.90 <= hits / 200 <= 0.99


def test_copies_of_a_person_add_nothing_to_a_cluster_bootstrap() -> None:
    scores, targets = normal(150, 2), (normal(150, 2, seed=1) > 0).double()
    people = [f"person {i:03d}" for i in range(150)]
    once = classification_scores(scores, targets, ["a", "b"], seed=1)
    copies = [values.repeat_interleave(10, 0) for values in (scores, targets)]
    named = classification_scores(
        *copies, ["a", "b"], groups=[p for p in people for _ in range(10)], seed=1
    )
    pretending = classification_scores(*copies, ["a", "b"], seed=1)
    for key in ("ap", "accuracy"):
        assert named[key]["value"] == pytest.approx(once[key]["value"])
        assert width(named[key]) == pytest.approx(width(once[key]), rel=1e-9)
        assert width(pretending[key]) < 0.5 * width(named[key])


def test_a_cluster_bootstrap_is_a_mean_over_the_rows_it_drew() -> None:
    groups = ["a", "b", "b", "b", "b", "c", "c", "d"]  # resamples differ in their number of rows
    targets = torch.tensor([[0.0], [1.0]]).repeat(4, 1)
    found = classification_scores(targets - 0.5, targets, ["x"], groups, resamples=50)
    assert found["accuracy"] == {"value": 1, "low": 1, "high": 1}
    found = regression_scores(targets + 2, targets, ["x"], groups, resamples=50)
    assert found["mse"] == {"value": 4, "low": 4, "high": 4}


def test_intervals_depend_on_the_seed_and_not_on_how_many_fit_in_memory(monkeypatch) -> None:
    arguments = normal(50, 2), normal(50, 2, seed=1), ["a", "b"]
    first = regression_scores(*arguments, resamples=30)
    monkeypatch.setattr(probes, "_WEIGHTS_AT_ONCE", 50 * 7)
    again = regression_scores(*arguments, resamples=30)
    assert again["pearson_r"] == pytest.approx(first["pearson_r"], abs=1e-12)
    assert regression_scores(*arguments, resamples=30, seed=1)["mse"] != first["mse"]


def test_the_interval_of_a_mean_knows_that_attributes_share_their_images() -> None:
    x, y = normal(500, 1), normal(500, 1, seed=1)
    one = regression_scores(x, y, ["a"])
    same = regression_scores(x.expand(-1, 4), y.expand(-1, 4), list("abcd"))
    different = regression_scores(normal(500, 4), normal(500, 4, seed=1), list("abcd"))
    assert width(same["mse"]) == pytest.approx(width(one["mse"]))
    assert width(different["mse"]) == pytest.approx(width(one["mse"]) / 2, rel=0.2)


def test_figures_refuse_what_does_not_fit() -> None:
    x, y = normal(6, 2), (normal(6, 2) > 0).double()
    with pytest.raises(ValueError, match="one shape"):
        classification_scores(x[:, :1], y, ["a", "b"])
    with pytest.raises(ValueError, match="1 names for 2 attributes"):
        regression_scores(x, y, ["a"])
    with pytest.raises(ValueError, match="5 groups for 6 rows"):
        regression_scores(x, y, ["a", "b"], groups=["p"] * 5)
    with pytest.raises(ValueError, match="0 or 1"):
        classification_scores(x, x, ["a", "b"])
    with pytest.raises(ValueError, match="NaN"):
        regression_scores(x / 0, y, ["a", "b"])


def test_base_rates_are_what_ignorance_scores() -> None:
    targets = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    rates = classification_base_rate(targets)
    assert rates == {"ap": pytest.approx(0.5), "accuracy": pytest.approx((0.75 + 0.75 + 1) / 3)}
    constant = classification_scores(torch.zeros(4, 3), targets, list("abc"), resamples=0)
    assert constant["ap"]["value"] == pytest.approx(rates["ap"])
    train, test = normal(50, 2), normal(20, 2, seed=1)
    predicted = train.mean(0).expand(20, 2)
    scored = regression_scores(predicted, test, ["a", "b"], resamples=0)
    assert regression_base_rate(train, test)["mse"] == pytest.approx(scored["mse"]["value"])


# Disentanglement -----------------------------------------------------------------------------


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=9))[0]


def test_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(8, size=(100, 3)).astype(float)
    labels = (rng.random((100, 2)) < 0.3).astype(float)
    expected = [[roc_auc_score(t, s) for t in labels.T] for s in scores.T]
    assert _auroc(scores, labels) == pytest.approx(np.array(expected), abs=1e-12)


def test_tad_rewards_a_dimension_of_its_own_for_each_attribute() -> None:
    a = (normal(4000, 2) > 0).double()
    z = normal(4000, 8, seed=1)
    z[:, 3] -= 100 * a[:, 0]  # the direction does not matter
    z[:, 5] += 100 * a[:, 1]
    found = tad(z, a, ["first", "second"])
    assert (found["considered"], found["captured"]) == (2, 2)
    assert [row["dimension"] for row in found["attributes"]] == [3, 5]
    assert [row["best"] for row in found["attributes"]] == [1, 1]
    assert found["tad"] == pytest.approx(sum(1 - row["second"] for row in found["attributes"]))
    assert found["tad"] > 0.9
    rotated = tad(z @ rotation(8), a, ["first", "second"])
    assert rotated["tad"] < 0.25 * found["tad"]


def test_tad_counts_captured_attributes_only() -> None:
    a = (normal(4000, 1) > 0).double()
    z = normal(4000, 4, seed=1)
    z[:, 0] += 0.5 * a[:, 0]  # an AUROC of 0.64
    found = tad(z, a, ["a"])
    assert 0.6 < found["attributes"][0]["best"] < 0.75
    assert (found["tad"], found["captured"], found["considered"]) == (0, 0, 1)
    assert tad(z[:, :1].repeat(1, 2) + 5 * a, a, ["a"])["tad"] == 0  # captured twice


def test_tad_leaves_out_attributes_that_another_one_tells() -> None:
    a = (normal(4000, 3) > 0).double()
    a[:, 2] = torch.where(torch.arange(4000) % 10 == 0, a[:, 2], 1 - a[:, 0])  # 95 % the opposite
    z = torch.cat([a + 0.1 * normal(4000, 3, seed=1), normal(4000, 2, seed=2)], 1)
    found = tad(z, a, ["a", "b", "c"])
    assert [row["name"] for row in found["attributes"]] == ["b"] and found["considered"] == 1
    two = tad(z, a[:, [0, 2]], ["a", "c"])
    assert (two["tad"], two["considered"], two["attributes"]) == (0, 0, [])


def test_the_entropy_rule_is_at_one_fifth() -> None:
    # b equals a except in a share e of the rows: of a's entropy 1 bit, 1 - H(e) is taken away.
    a = (torch.arange(2000) % 2).double()
    for changed, considered in ((200, 0), (240, 0), (246, 2), (300, 2)):  # 1 - H(0.243) = 0.2
        b = a.clone()
        b[: 2 * changed] = 1 - a[: 2 * changed]
        assert tad(normal(2000, 2), torch.stack([a, b], 1), ["a", "b"])["considered"] == considered


def test_tad_refuses_a_constant_attribute_by_name() -> None:
    a = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="attribute young has one value only"):
        tad(normal(2, 3), a, ["male", "young"])
    with pytest.raises(ValueError, match="d ≥ 2"):
        tad(normal(2, 1), a, ["male", "young"])
    with pytest.raises(ValueError, match="0 or 1"):
        tad(normal(2, 3), a * 2, ["male", "young"])
