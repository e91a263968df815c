"""Samplers: golden paths, convergence on Gaussian data with its exact denoiser, SDE marginals."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

import dbae
from dbae import Bridge, UserError, sample
from dbae.evaluation import results
from dbae.evaluation.protocol import sampler_text
from dbae.evaluation.reconstruction import ReconstructionConfig, reconstruct_images
from dbae.sampling import (
    Estimate,
    ReverseField,
    Rule,
    dbim,
    dbim_grid,
    euler,
    heun,
    karras_grid,
    signal_grid,
    spaced,
)


def _numpy_noise(seed: int, dtype: type = np.float64) -> Callable[[Tensor], Tensor]:
    generator = np.random.Generator(np.random.PCG64(seed))
    return lambda x: torch.from_numpy(generator.standard_normal(x.shape).astype(dtype))


def test_time_grids_equal_the_golden_tables() -> None:
    tables = golden.arrays("bridge")
    grids = [name for name in tables if "_grid_" in name]
    assert len(grids) >= 6
    for name in grids:
        schedule, _, steps, rho = name.split("_")
        found = karras_grid(Bridge(schedule), int(steps), float(rho))
        np.testing.assert_allclose(found, tables[name], rtol=1e-12, err_msg=name)


def test_toy_samplers_equal_the_golden_paths() -> None:
    figures = golden.arrays("sample_toy")
    x_T = torch.from_numpy(figures["x_T"])
    runs = 0
    for name in figures:
        match = re.fullmatch(r"(vp|ve)_(\w+)_(\d+)_churn([\d.]+)_w([\d.]+)", name)
        if match is None:
            continue
        schedule, sampler, steps, churn, guidance = match.groups()
        out = sample(
            lambda x, t: (0.3 * x + 0.5 * x_T).clamp(-1, 1),
            x_T, Bridge(schedule), sampler, int(steps), churn=float(churn),
            guidance=float(guidance), noise=_numpy_noise(12), clip=False, return_path=True,
        )  # fmt: skip
        np.testing.assert_allclose(out.images, figures[name], rtol=0, atol=1e-8, err_msg=name)
        assert out.nfe == figures[f"{name}_nfe"]
        if float(churn) == 0:
            assert out.path is not None
            np.testing.assert_allclose(out.path, figures[f"{name}_path"], rtol=0, atol=1e-8)
        runs += 1
    assert runs == 9


class Gaussian:
    """x_0 | x_T ~ N(m, s²) with m = 0.3 x_T − 0.1: the exact denoiser and the exact marginals."""

    s = 0.4

    def __init__(self, bridge: Bridge, x_T: Tensor) -> None:
        self.bridge, self.x_T, self.m = bridge, x_T, 0.3 * x_T - 0.1

    def marginal(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t given x_T."""
        a, b, c = self.bridge.coefficients(torch.tensor(t, dtype=torch.float64))
        return a * self.x_T + b * self.m, torch.sqrt(b**2 * self.s**2 + c**2)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t, x_T]."""
        a, b, c = (k[:, None] for k in self.bridge.coefficients(t))
        variance = (b**2 * self.s**2 + c**2).clamp(min=1e-300)  # 0 at T, where x is x_T
        gain = b * self.s**2 / variance
        return self.m + gain * (x - a * self.x_T - b * self.m)


_ENDPOINTS = torch.tensor([[0.7], [-1.2], [0.1]], dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize(("rule", "order"), [(euler, 1), (heun, 2)])
def test_each_rule_converges_with_its_order(schedule: str, rule: Rule, order: int) -> None:
    """The probability-flow ODE keeps (x_t − mean_t)/std_t: its exact solution for Gaussians."""
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, _ENDPOINTS)
    quantile = torch.tensor([[0.5], [1.0], [-0.7]], dtype=torch.float64)
    errors = []
    for steps in (80, 160, 320):
        grid = torch.linspace(0.9 ** (1 / 3), 0.01 ** (1 / 3), steps + 1, dtype=torch.float64) ** 3
        times = (grid * bridge.T).tolist()
        estimate = Estimate(problem.denoise, clip=False)
        field = ReverseField(estimate, _ENDPOINTS, bridge, times, 1.0)
        mean, std = problem.marginal(times[0])
        x = mean + std * quantile
        for t, t_next in itertools.pairwise(times):
            x = rule(field, x, t, t_next)
        mean, std = problem.marginal(times[-1])
        errors.append(float((x - mean - std * quantile).abs().max()))
        assert estimate.nfe == steps * order
    observed = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert observed == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_the_whole_ode_sampler_approaches_the_exact_image(
    schedule: str, sampler: str, rho: float
) -> None:
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, _ENDPOINTS)
    mean, std = problem.marginal(bridge.T - 1e-4)
    exact = problem.m + problem.s * (_ENDPOINTS - mean) / std
    errors = []
    for steps in (40, 640):
        out = sample(problem.denoise, _ENDPOINTS, bridge, sampler, steps, rho, clip=False)
        errors.append(float((out.images - exact).abs().max()))
    # The last Euler step, from t_min to 0, does not shrink with the grid; it is of order t_min.
    assert errors[1] < max(0.4 * errors[0], 2 * bridge.t_min)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("churn", [0.33, 0.9])
def test_stochastic_samples_have_the_data_distribution(schedule: str, churn: float) -> None:
    repeats = 5_000
    x_T = _ENDPOINTS.repeat(repeats, 1)
    problem = Gaussian(Bridge(schedule), x_T)
    out = sample(
        problem.denoise, x_T, problem.bridge, "heun", 200, churn=churn, clip=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    images = out.images.view(repeats, 3)
    # Standard error of the mean 0.006; the rest is the discretisation at 200 steps.
    torch.testing.assert_close(images.mean(0), problem.m[:3, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(images.std(0), torch.full((3,), 0.4).double(), rtol=0, atol=0.02)


def _never(x: Tensor) -> Tensor:
    raise AssertionError("noise was drawn")


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(("order", "expected"), [(1, 1), (2, 2), (3, 2)])
def test_each_order_of_dbim_converges_as_theory_says(
    schedule: str, rho: float, order: int, expected: int
) -> None:
    """The first and the last step are of order 1: each adds O(h²), and so order 3 converges with 2.

    Inner steps are of order 3: `test_inner_steps_of_dbim_are_exact_…`.
    """
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, _ENDPOINTS)
    quantile = torch.tensor([[0.5], [1.0], [-0.7]], dtype=torch.float64)
    errors = []
    for steps in (200, 400):
        times = [bridge.T * t for t in spaced(0.9, 0.1, steps + 1, rho)]
        estimate = Estimate(problem.denoise, clip=False)
        mean, std = problem.marginal(times[0])
        start = mean + std * quantile
        *_, (_, x) = dbim(estimate, start, _ENDPOINTS, bridge, times, order, 0.0, _never)
        mean, std = problem.marginal(times[-1])
        errors.append(float((x - mean - std * quantile).norm()))
        assert estimate.nfe == steps
    observed = math.log2(errors[0] / errors[1])
    assert observed == pytest.approx(expected, abs=0.1)


def _paper_step(
    bridge: Bridge,
    times: list[float],
    i: int,
    x: Tensor,
    x_T: Tensor,
    D: list[Tensor],
    order: int,
    eta: float,
    epsilon: Tensor | None,
) -> Tensor:
    """The step from times[i] as the paper writes it, from α and ρ of their definitions."""

    def of(t: float) -> tuple[float, ...]:
        if bridge.is_vp:
            growth = t * t + 0.1 * t
            alpha, rho2, alpha_T, rho2_T = (
                math.exp(-growth / 2), math.expm1(growth), math.exp(-0.55), math.expm1(1.1)
            )  # fmt: skip
        else:
            alpha, rho2, alpha_T, rho2_T = 1.0, t * t, 1.0, 6400.0
        share = 1 - rho2 / rho2_T
        a, b = alpha / alpha_T * rho2 / rho2_T, alpha * share
        c = alpha * math.sqrt(rho2 * share)
        return alpha, rho2, a, b, c, math.log(b / c)

    _, rho2_s, a_s, b_s, c_s, lambda_s = of(times[i])
    alpha_t, rho2_t, a_t, b_t, c_t, lambda_t = of(times[i + 1])
    last = i + 2 == len(times)
    known = 1 if last else min(order, i + 1)
    if known == 1:
        omega = 0 if last else eta * alpha_t * math.sqrt(rho2_t * (1 - rho2_t / rho2_s))
        hat = (x - a_s * x_T - b_s * D[i]) / c_s
        x_t = a_t * x_T + b_t * D[i] + math.sqrt(c_t**2 - omega**2) * hat
        return x_t if epsilon is None else x_t + omega * epsilon
    h, h_1 = lambda_t - lambda_s, lambda_s - of(times[i - 1])[5]
    slope = (D[i] - D[i - 1]) / h_1
    if known == 3:
        h_2 = of(times[i - 1])[5] - of(times[i - 2])[5]
        slope_1 = (D[i - 1] - D[i - 2]) / h_2
        first = (slope * (2 * h_1 + h_2) - slope_1 * h_1) / (h_1 + h_2)
        second = 2 * (slope - slope_1) / (h_1 + h_2)
    else:
        first, second = slope, torch.zeros_like(slope)
    integral = math.exp(lambda_t) * (
        (1 - math.exp(-h)) * D[i]
        + (h - 1 + math.exp(-h)) * first
        + (h**2 / 2 - h + 1 - math.exp(-h)) * second
    )
    return c_t / c_s * x + (a_t - c_t / c_s * a_s) * x_T + c_t * integral


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(("order", "eta"), [(1, 0.0), (1, 0.4), (1, 1.0), (2, 0.0), (3, 0.0)])
def test_dbim_equals_the_papers_formulas(schedule: str, rho: float, order: int, eta: float) -> None:
    bridge, x_T, steps = Bridge(schedule), _ENDPOINTS, 6
    calls: list[tuple[float, Tensor]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append((float(t[0]), torch.sin(3 * x + 5 * t[:, None]) + 0.3 * x_T))
        return calls[-1][1]

    drawn: list[Tensor] = []

    source = _numpy_noise(3)

    def noise(x: Tensor) -> Tensor:
        drawn.append(source(x))
        return drawn[-1]

    out = sample(
        denoise, x_T, bridge, "dbim", steps, rho=rho, order=order, eta=eta, noise=noise,
        clip=False, return_path=True,
    )  # fmt: skip
    assert out.path is not None and len(out.path) == steps + 1 and out.nfe == len(calls) == 7
    assert len(drawn) == (steps if eta else 1)  # the start, and each step but the last
    high, low = bridge.T - 1e-3, 1e-4 if schedule == "vp" else 0.002
    times = [
        (high ** (1 / rho) * (1 - i / steps) + low ** (1 / rho) * i / steps) ** rho
        for i in range(steps + 1)
    ]
    assert [t for t, _ in calls] == pytest.approx([bridge.T, *times[:-1]], rel=1e-12)
    (a, b, c), D = bridge.coefficients(x_T.new_tensor(times[0])), [D for _, D in calls]
    x = a * x_T + b * D[0] + c * drawn[0]
    for i in range(steps):
        epsilon = drawn[i + 1] if eta and i + 1 < steps else None
        x = _paper_step(bridge, times, i, x, x_T, D[1:], order, eta, epsilon)
        torch.testing.assert_close(out.path[i + 1], x, rtol=1e-9, atol=1e-9)
    assert torch.equal(out.images, out.path[-1])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_inner_steps_of_dbim_are_exact_where_the_estimate_is_a_polynomial(order: int) -> None:
    """∫ e^λ λ^n dλ is known: an inner step of order k integrates degree k − 1 without error."""
    bridge, times = Bridge("vp"), dbim_grid(Bridge("vp"), 6, 3.0)
    a, b, c = (k.tolist() for k in bridge.coefficients(torch.tensor(times, dtype=torch.float64)))
    lam = [math.log(b_t / c_t) for b_t, c_t in zip(b, c, strict=True)]
    power = order - 1

    def primitive(at: float) -> float:
        return math.exp(at) * (1.0, at - 1, at**2 - 2 * at + 2)[power]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        at = lam[min(range(len(times)), key=lambda i: abs(times[i] - float(t[0])))]
        return torch.full_like(x, at**power)

    states = [_ENDPOINTS]
    estimate = Estimate(denoise, clip=False)
    run = dbim(estimate, _ENDPOINTS, _ENDPOINTS, bridge, times, order, 0.0, _never)
    states += [x for _, x in run]
    for i in range(power, len(times) - 2):
        k = c[i + 1] / c[i]
        integral = c[i + 1] * (primitive(lam[i + 1]) - primitive(lam[i]))
        exact = k * states[i] + (a[i + 1] - k * a[i]) * _ENDPOINTS + integral
        torch.testing.assert_close(states[i + 1], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dbim_with_the_true_image_has_the_bridges_marginals_at_every_time(
    schedule: str, eta: float
) -> None:
    """Whatever the grid and η: x_t ~ N(a x_T + b x_0, c²) where the estimate is x_0 itself."""
    repeats, steps, x_0 = 20_000, 5, 0.3
    bridge, x_T = Bridge(schedule), torch.full((repeats, 1), -0.8, dtype=torch.float64)
    out = sample(
        lambda x, t: torch.full_like(x, x_0), x_T, bridge, "dbim", steps, order=1, eta=eta,
        clip=False, return_path=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out.path is not None
    times = torch.tensor(dbim_grid(bridge, steps, 7.0), dtype=torch.float64)
    a, b, c = bridge.coefficients(times)
    for i in range(1, steps + 1):
        z = (out.path[i] + 0.8 * a[i] - b[i] * x_0) / c[i]
        assert abs(float(z.mean())) < 0.03 and float(z.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_dbim_with_eta_1_has_the_marginals_of_gaussian_data(schedule: str) -> None:
    repeats, steps = 5_000, 200
    x_T = _ENDPOINTS.repeat(repeats, 1)
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, x_T)
    out = sample(
        problem.denoise, x_T, bridge, "dbim", steps, order=1, eta=1.0, clip=False,
        return_path=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out.path is not None
    times = dbim_grid(bridge, steps, 7.0)
    for i in (steps // 4, steps // 2, 3 * steps // 4, steps):
        mean, std = problem.marginal(times[i])
        z = ((out.path[i] - mean) / std).view(repeats, 3)
        # Standard errors 0.014 and 0.010; the rest is the discretisation at 200 steps.
        assert float(z.mean(0).abs().max()) < 0.05
        torch.testing.assert_close(z.std(0), torch.ones(3).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_whole_of_dbim_approaches_the_exact_image(
    schedule: str, rho: float, order: int
) -> None:
    """The start x_T + c ε is one quantile of the marginal, which the ODE keeps down to t_min."""
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, _ENDPOINTS)
    errors = []
    for steps in (160, 640):
        out = sample(
            problem.denoise, _ENDPOINTS, bridge, "dbim", steps, rho=rho, order=order,
            clip=False, noise=torch.ones_like,
        )  # fmt: skip
        start = bridge.T - 1e-3
        c = bridge.coefficients(_ENDPOINTS.new_tensor(start)).c
        mean, std = problem.marginal(bridge.t_min)
        exact = mean + std * c / problem.marginal(start)[1]
        errors.append(float((out.images - exact).abs().max()))
    assert errors[1] < 0.4 * errors[0] < 0.1


@pytest.mark.parametrize(
    ("sampler", "options", "nfe"),
    [
        ("euler", {}, 7),
        ("heun", {}, 13),
        ("euler", {"churn": 0.5}, 14),
        ("heun", {"churn": 0.5}, 20),
        ("dbim", {"order": 1}, 8),
        ("dbim", {"order": 1, "eta": 1.0}, 8),
        ("dbim", {"order": 3}, 8),
        ("exp", {}, 7),
    ],
)
def test_nfe_counts_every_denoiser_call(sampler: str, options: dict[str, Any], nfe: int) -> None:
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        calls.append(t)
        return 0 * x

    seen = []
    out = sample(
        denoise, torch.zeros(2, 3, 4, 4), Bridge("vp"), sampler, 7, **options,
        callback=lambda step: seen.append((step.index, step.steps, step.nfe)),
    )  # fmt: skip
    assert out.nfe == len(calls) == nfe == seen[-1][2]
    assert [(i, n) for i, n, _ in seen] == [(i, 7) for i in range(7)]


def test_clipping_bounds_estimates_and_result() -> None:
    x_T = torch.full((1, 3, 4, 4), 3.0)
    images = sample(lambda x, t: 5 + 0 * x, x_T, Bridge("vp"), "euler", 5).images
    assert images.max() <= 1 and images.min() > 0.9


def test_the_same_generator_gives_the_same_images_and_noise_replaces_it() -> None:
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))

    def run(**options: object) -> Tensor:
        return sample(
            lambda x, t: 0.5 * x, x_T, Bridge("vp"), "heun", 5, churn=0.3, **options
        ).images  # type: ignore[arg-type]

    seeded = [run(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    replay = torch.Generator().manual_seed(1)
    assert torch.equal(run(noise=lambda x: torch.randn(x.shape, generator=replay)), seeded[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "rk4"}, "sampler 'rk4' is unknown; choose one of euler, heun, dbim, exp"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"churn": 1.0}, "churn 1.0 must lie in"),
        ({"rho": 0.0}, "rho 0.0 must be positive"),
        ({"sampler": "dbim", "order": 4}, "order 4 must be 1, 2 or 3"),
        ({"sampler": "dbim", "order": 1, "eta": 1.5}, "eta 1.5 must lie in"),
        ({"sampler": "dbim", "eta": 0.5}, "eta 0.5 above 0 needs order 1, found order 2"),
        ({"sampler": "dbim", "churn": 0.3}, "churn 0.3 has no meaning for sampler dbim"),
        ({"sampler": "dbim", "guidance": 2.0}, "guidance 2.0 has no meaning for sampler dbim"),
        ({"sampler": "euler", "order": 3}, "order 3 has no meaning for sampler euler"),
        ({"sampler": "heun", "eta": 1.0}, "eta 1.0 has no meaning for sampler heun"),
        ({"sampler": "exp", "order": 3}, "order 3 has no meaning for sampler exp"),
        (
            {"sampler": "exp", "rho": 1.0},
            "rho 1.0 has no meaning for sampler exp; leave it out .it is for euler and heun and",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(lambda x, t: x, torch.zeros(1, 1), Bridge("vp"), **options)
    with pytest.raises(UserError, match=f"^--{message}"):
        ReconstructionConfig(**options)


@pytest.mark.parametrize("sampler", ["dbim", "exp"])
def test_a_model_without_end_data_which_has_no_scale_at_T_is_refused(sampler: str) -> None:
    def run(schedule: str) -> Tensor:
        bridge = Bridge(schedule, sigma_data_end=0.0)
        return sample(lambda x, t: 0 * x, torch.zeros(1, 1), bridge, sampler, 2).images

    with pytest.raises(UserError, match="end_data 0"):
        run("vp")
    assert run("vp_simple").isfinite().all()  # it is not scaled at all


class TwoHills:
    """x_0 ~ 0.7 N(0.6, 0.3²) + 0.3 N(−0.6, 0.3²), whatever x_T: its exact denoiser."""

    def __init__(self, bridge: Bridge, x_T: Tensor) -> None:
        self.bridge, self.x_T = bridge, x_T

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c = (k[:, None] for k in self.bridge.coefficients(t))
        variance = (0.3 * b) ** 2 + c**2
        rest = x - a * self.x_T
        at_T = variance == 0  # where x is x_T and tells nothing
        slope = torch.where(at_T, 0.0, rest * b / variance.clamp(min=1e-300))
        share = torch.sigmoid(math.log(7 / 3) + 2 * 0.6 * slope)
        centre = 0.6 * (2 * share - 1)
        gain = torch.where(at_T, 0.0, b * 0.3**2 / variance.clamp(min=1e-300))
        return centre + gain * (rest - b * centre)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_exp_is_exact_for_gaussian_data_with_a_single_call(schedule: str) -> None:
    """The middle of what lies above x_T is its mean, and D is that mean all along the path."""
    problem = Gaussian(Bridge(schedule), _ENDPOINTS)
    for steps in (1, 2, 5, 40):
        out = sample(
            problem.denoise, _ENDPOINTS, problem.bridge, "exp", steps, clip=False, noise=_never
        )
        torch.testing.assert_close(out.images, problem.m, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_exp_converges_on_its_own_grid_to_the_middle_quantile(schedule: str) -> None:
    """The ODE keeps quantiles: u = 0 at T is the median of x_0, where its distribution is 1/2."""
    bridge = Bridge(schedule)
    problem = TwoHills(bridge, _ENDPOINTS)

    def below(x: float) -> float:
        return sum(
            p * (1 + math.erf((x - m) / (0.3 * math.sqrt(2)))) / 2
            for p, m in ((0.7, 0.6), (0.3, -0.6))
        )

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.5 else (low, middle)
    errors = []
    for steps in (5, 100, 200):
        out = sample(problem.denoise, _ENDPOINTS, bridge, "exp", steps, clip=False)
        errors.append(float((out.images - low).abs().max()))
    assert errors[0] < 0.1
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_the_grid_of_exp_is_even_in_the_signal_to_noise_ratio(schedule: str) -> None:
    bridge, steps = Bridge(schedule), 9
    times = signal_grid(bridge, steps)
    assert times[0] == bridge.T and times[-1] == 0 and len(times) == steps + 1
    _, b, c = bridge.coefficients(torch.tensor(times[1:-1], dtype=torch.float64))
    expected = [4 * (i / (steps - i)) ** 1.5 for i in range(1, steps)]
    np.testing.assert_allclose(b / c, expected, rtol=1e-10)
    assert signal_grid(bridge, 1) == [bridge.T, 0.0]


def test_the_slope_from_x_T_is_half_that_of_the_ode() -> None:
    """Why Euler's first step stays behind: x_T lies beside the solution, however close to T."""
    bridge = Bridge("vp")
    problem, t = Gaussian(bridge, _ENDPOINTS), bridge.T - 1e-4
    field = ReverseField(Estimate(problem.denoise, clip=False), _ENDPOINTS, bridge, [t], 1.0)
    at_x_T, on_path = field(_ENDPOINTS, t), field(problem.marginal(t)[0], t)
    torch.testing.assert_close(at_x_T / on_path, torch.full_like(at_x_T, 0.5), rtol=0, atol=0.01)


@pytest.mark.parametrize("ratio", [6, 20, 1000])
def test_the_slope_of_a_long_step_near_0_throws_heun_off(ratio: float) -> None:
    """x − D must shrink by √(t'/t); Heun multiplies it by 1 − (1 − t'/t)(3 + t/t')/8."""
    bridge, zero = Bridge("vp"), torch.zeros(1, 1, dtype=torch.float64)
    t_next = 1e-7
    times = [t_next * ratio, t_next]
    field = ReverseField(Estimate(lambda x, t: 0 * x, False), zero, bridge, times, 1.0)
    found = float(heun(field, zero + 1, *times))
    assert found == pytest.approx(1 - (1 - 1 / ratio) * (3 + ratio) / 8, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler"},
        {"sampler": "heun"},
        {"sampler": "heun", "churn": 0.3},
        {"sampler": "dbim", "order": 1, "eta": 1.0},
        {"sampler": "dbim", "order": 3},
        {"sampler": "exp"},
    ],
)
def test_no_step_waits_for_a_value_from_the_device(options: dict[str, Any]) -> None:
    """The meta device has no values: reading one (`item`, `if`, a copy to the host) raises."""
    model = dbae.create_model("demo", stochastic=False).eval().to("meta")
    z, x_T = (torch.empty(2, *shape, device="meta") for shape in ((24,), (3, 32, 32)))
    out = model.sample(z, x_T, steps=4, noise=torch.empty_like, **options)
    assert out.images.device.type == "meta" and out.images.shape == x_T.shape


@pytest.mark.parametrize("options", [{"order": 2}, {"order": 1, "eta": 1.0}])
def test_dbims_noise_depends_on_seed_and_place_not_on_the_batch(options: dict[str, Any]) -> None:
    model = dbae.create_model("demo", stochastic=False).eval()
    x0 = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def run(part: slice, **more: Any) -> Tensor:
        config = ReconstructionConfig(sampler="dbim", steps=2, **options, **more)
        images, _, nfe = reconstruct_images(model, x0[part], config, range(3)[part])
        assert nfe == 3
        return images

    whole = run(slice(0, 3))
    parts = torch.cat([run(slice(0, 1)), run(slice(1, 3))])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert torch.equal(run(slice(0, 3)), whole)
    assert (run(slice(0, 3), seed=1) - whole).abs().mean() > 1e-3


def test_the_name_of_a_dbim_folder_tells_its_order_and_eta(tmp_path: Path) -> None:
    config = ReconstructionConfig(sampler="dbim", rho=7, steps=9, order=1, eta=0.5)
    folder = tmp_path / config.sampler_name
    assert folder.name == "dbim_7.0_9_w=1.0_churn=0.0_eta=0.5_order=1"
    folder.mkdir()
    for path in results.part_paths(folder, 0, 0):
        results.write_samples(path, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    found = results.rescore(folder, results.Scorer(None, "not wanted", False), 1)["protocol"]
    expected = {name: getattr(config, name) for name in ("sampler", "steps", "order", "eta")}
    assert {name: found[name] for name in expected} == expected
    assert sampler_text(found) == "dbim-9 order 1 eta 0.5"


def test_the_quality_curve_holds_every_sampler_at_the_number_of_calls(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "benchmarks" / "quality_nfe.py")]
    command += [str(root / "assets" / "demo_model.pt"), "--first", "5", "--num_samples", "2"]
    command += ["--nfe", "2,3", "--rho", "1,7", "--goal", "4", "--limit", "6"]
    command += ["--output", str(tmp_path / "curve.png"), "--json", str(tmp_path / "curve.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "curve.json").read_text())
    rows = content["rows"]
    expected = [("x_T", 0), ("Euler, ρ 7", 4), ("Exp", 2), ("Exp", 3)]
    for name, calls in (
        ("Euler", (2, 3)), ("Heun", (1, 3)), ("Euler, churn 0.33", (2,)),
        ("Heun, churn 0.33", (2,)), ("DBIM-1, η 0", (2, 3)), ("DBIM-1, η 1", (2, 3)),
        ("DBIM-2", (2, 3)), ("DBIM-3", (2, 3)),
    ):  # fmt: skip
        expected += [(f"{name}, ρ {rho}", nfe) for rho in (1, 7) for nfe in calls]
    assert [(row["method"], row["nfe"]) for row in rows] == expected
    table = re.findall(r"^(\S.*?)  +(\d+)  +(\S.*?)  +0\.\d+  +[+-]0", done.stdout, re.MULTILINE)
    assert [(name, int(nfe)) for name, nfe, _ in table] == expected
    assert rows[-1]["sampler"] == table[-1][2] == "dbim-2 order 3"
    assert "images 5 to 6 of demo test; seed 0" in content["protocol"]
    assert "images 5 to 6 of demo test; seed 0" in done.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    goal, exp = rows[1], rows[3]
    assert goal["to_goal"]["mse"] == {"mean": 0, "stderr": 0, "n": 2}
    first, second = (exp["per_image"]["mse"][i] - goal["per_image"]["mse"][i] for i in (0, 1))
    assert exp["to_goal"]["mse"]["mean"] == pytest.approx((first + second) / 2)
    assert exp["to_goal"]["mse"]["stderr"] == pytest.approx(abs(first - second) / 2)
    assert 0 < exp["to_limit"] < goal["to_limit"] < rows[0]["to_limit"]
    noisy = {row["method"] for row in rows if row["to_limit"] is None}
    assert len(noisy) == 6 and all("churn" in name or "η 1" in name for name in noisy)
