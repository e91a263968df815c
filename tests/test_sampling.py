"""Samplers: golden paths, convergence on Gaussian data with its exact denoiser, SDE marginals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from dbae import Bridge, UserError, sample
from dbae.sampling import RULES, ReverseField, karras_grid


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
        gain = b * self.s**2 / (b**2 * self.s**2 + c**2)
        return self.m + gain * (x - a * self.x_T - b * self.m)


_ENDPOINTS = torch.tensor([[0.7], [-1.2], [0.1]], dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize(("rule", "order"), [("euler", 1.0), ("heun", 2.0)])
def test_each_rule_converges_with_its_order(schedule: str, rule: str, order: float) -> None:
    """The probability-flow ODE keeps (x_t − mean_t)/std_t: its exact solution for Gaussians."""
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, _ENDPOINTS)
    quantile = torch.tensor([[0.5], [1.0], [-0.7]], dtype=torch.float64)
    errors = []
    for steps in (80, 160, 320):
        grid = torch.linspace(0.9 ** (1 / 3), 0.01 ** (1 / 3), steps + 1, dtype=torch.float64) ** 3
        times = (grid * bridge.T).tolist()
        field = ReverseField(problem.denoise, _ENDPOINTS, bridge, times, 1.0, clip=False)
        mean, std = problem.marginal(times[0])
        x = mean + std * quantile
        for t, t_next in itertools.pairwise(times):
            x = RULES[rule](field, x, t, t_next)
        mean, std = problem.marginal(times[-1])
        errors.append(float((x - mean - std * quantile).abs().max()))
        assert field.nfe == steps * (1 if rule == "euler" else 2)
    observed = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert observed == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_whole_ode_sampler_approaches_the_exact_image(schedule: str, sampler: str) -> None:
    bridge = Bridge(schedule)
    problem = Gaussian(bridge, _ENDPOINTS)
    mean, std = problem.marginal(bridge.T - 1e-4)
    exact = problem.m + problem.s * (_ENDPOINTS - mean) / std
    errors = []
    for steps in (80, 1280):
        out = sample(problem.denoise, _ENDPOINTS, bridge, sampler, steps, clip=False)
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


@pytest.mark.parametrize(
    ("sampler", "churn", "nfe"),
    [("euler", 0.0, 7), ("heun", 0.0, 13), ("euler", 0.5, 14), ("heun", 0.5, 20)],
)
def test_nfe_counts_every_denoiser_call(sampler: str, churn: float, nfe: int) -> None:
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        calls.append(t)
        return 0 * x

    seen = []
    out = sample(
        denoise, torch.zeros(2, 3, 4, 4), Bridge("vp"), sampler, 7, churn=churn,
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
        ({"sampler": "rk4"}, "'rk4' is unknown; choose one of euler, heun"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"churn": 1.0}, "churn 1.0 must lie in"),
        ({"rho": 0.0}, "rho 0.0 must be positive"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(lambda x, t: x, torch.zeros(1, 1), Bridge("vp"), **options)  # type: ignore[arg-type]
