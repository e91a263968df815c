"""Bridge mathematics: golden tables, limits at both ends, reverse dynamics, loss weights."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch

from dbae import Bridge, UserError
from dbae.bridge import SCHEDULES, WEIGHT_SCHEDULES


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_coefficients_and_scalings_equal_the_golden_tables(schedule: str) -> None:
    tables, bridge = golden.arrays("bridge"), Bridge(schedule)
    t = torch.from_numpy(tables[f"{schedule}_t"])
    ours = {**bridge.coefficients(t)._asdict(), **bridge.preconditioning(t)._asdict()}
    ours["weight"] = bridge.weight(t)
    end0 = Bridge(schedule, sigma_data_end=0.0).preconditioning(t)
    ours |= {f"end0_{name}": value for name, value in end0._asdict().items()}
    compared = 0
    for name, value in ours.items():
        np.testing.assert_allclose(value, tables[f"{schedule}_{name}"], rtol=1e-6, err_msg=name)
        compared += 1
    assert compared == 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bridge_is_pinned_at_both_ends(schedule: str) -> None:
    bridge = Bridge(schedule)
    a, b, c = bridge.coefficients(torch.tensor([0.0, bridge.T], dtype=torch.float64))
    assert a.tolist() == [0.0, 1.0]
    assert b.tolist() == [1.0, 0.0]
    assert c.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_no_digits_are_lost_close_to_the_ends(schedule: str) -> None:
    """Against the textbook formulas evaluated with 60 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    bridge = Bridge(schedule)
    end = Decimal(bridge.T)
    for t in (1e-9, bridge.t_min, bridge.T - 1e-4, bridge.T - 1e-9):
        exact = Decimal(t)

        def growth(s: Decimal) -> Decimal:
            return s * s + s / 10 if schedule == "vp" else Decimal(0)

        def rho2(s: Decimal) -> Decimal:
            return growth(s).exp() - 1 if schedule == "vp" else s * s

        # 0.1 as a double differs from 1/10 in the 17th digit, far below the tolerance.
        alpha, alpha_end = (-growth(exact) / 2).exp(), (-growth(end) / 2).exp()
        left = 1 - rho2(exact) / rho2(end)
        expected = (
            alpha / alpha_end * rho2(exact) / rho2(end),
            alpha * left,
            alpha * (rho2(exact) * left).sqrt(),
        )
        found = bridge.coefficients(torch.tensor(t, dtype=torch.float64))
        for value, true in zip(found, expected, strict=True):
            assert float(value) == pytest.approx(float(true), rel=1e-11)


def test_float32_times_are_computed_in_float64() -> None:
    coefficients = Bridge("vp").coefficients(torch.tensor([0.5], dtype=torch.float32))
    assert all(value.dtype == torch.float64 for value in coefficients)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_the_marginal_variance_follows_the_conditioned_sde(schedule: str) -> None:
    """d(c²)/dt and da/dt as the SDE with Doob's h-transform demands, by finite differences."""
    bridge = Bridge(schedule)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64) * bridge.T
    step = 1e-6 * bridge.T
    (a0, b0, c0), (a1, b1, c1) = bridge.coefficients(t - step), bridge.coefficients(t + step)
    f, g2 = bridge.drift_rate(t), bridge.diffusion_squared(t)
    pull = g2 / (bridge.alpha(t) ** 2 * bridge.rho_squared_left(t))
    ratio = bridge.alpha(t) / bridge.alpha(torch.tensor(bridge.T))
    # forward: dx = [(f − pull) x + pull · ratio · x_T] dt + g dw
    a, b, c = bridge.coefficients(t)
    torch.testing.assert_close(
        (a1 - a0) / (2 * step), (f - pull) * a + pull * ratio, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close((b1 - b0) / (2 * step), (f - pull) * b, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        (c1**2 - c0**2) / (2 * step), 2 * (f - pull) * c**2 + g2, rtol=1e-6, atol=1e-8
    )


def test_preconditioning_gives_unit_variance_inputs_and_targets() -> None:
    """Var[c_in x_t] = 1 and Var[(x_0 − c_skip x_t)/c_out] = 1 for data of the assumed moments."""
    bridge = Bridge("vp", sigma_data=0.6, sigma_data_end=0.8, cov_xy=0.2)
    t = torch.tensor([0.05, 0.4, 0.95])
    a, b, c = bridge.coefficients(t)
    c_skip, c_out, c_in = bridge.preconditioning(t)
    var_0, var_T, cov = 0.36, 0.64, 0.2
    variance = a**2 * var_T + b**2 * var_0 + 2 * a * b * cov + c**2
    residual = var_0 + c_skip**2 * variance - 2 * c_skip * (b * var_0 + a * cov)
    torch.testing.assert_close(c_in**2 * variance, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(residual / c_out**2, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["vp_simple", "ve_simple"])
def test_simple_schedules_predict_the_image_itself(schedule: str) -> None:
    bridge, t = Bridge(schedule), torch.tensor([0.1, 0.9])
    assert [k.tolist() for k in bridge.preconditioning(t)] == [[0, 0], [1, 1], [1, 1]]
    assert bridge.weight(t).tolist() == [1, 1]
    full = Bridge(schedule.removesuffix("_simple"))
    assert all(map(torch.equal, bridge.coefficients(t), full.coefficients(t)))
    assert all(map(torch.equal, bridge.reverse_drift(t), full.reverse_drift(t)))


def test_weight_schedules_are_the_named_functions_of_the_snr() -> None:
    t = torch.tensor([0.2, 3.0, 40.0], dtype=torch.float64)
    snr = 1 / t**2
    expected = {
        "bridge_karras": Bridge("ve").preconditioning(t).c_out ** -2,
        "snr": snr,
        "snr+1": snr + 1,
        "karras": snr + 4,
        "truncated-snr": snr.clamp(min=1),
        "uniform": torch.ones(3, dtype=torch.float64),
    }
    assert set(expected) == set(WEIGHT_SCHEDULES)
    for name, value in expected.items():
        torch.testing.assert_close(Bridge("ve", weight_schedule=name).weight(t), value)


def test_training_times_cover_their_range() -> None:
    bridge = Bridge("ve")
    times = bridge.sample_times(torch.tensor([0.0, 0.5, 1.0]))
    assert times.tolist() == pytest.approx([0.002, 40.001, 80.0])
    lognormal = bridge.sample_times_lognormal(torch.tensor([0.0, 100.0]))
    assert lognormal.tolist() == pytest.approx([np.exp(-1.2), 80.0])


def test_unknown_schedules_are_named() -> None:
    with pytest.raises(UserError, match="'vq' is not one of vp, ve"):
        Bridge("vq")
    with pytest.raises(UserError, match="'snr2' is not one of bridge_karras"):
        Bridge("vp", weight_schedule="snr2")


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_the_time_of_a_noise_level_is_found_again(schedule: str) -> None:
    bridge = Bridge(schedule)
    t = torch.linspace(bridge.t_min, bridge.T, 50, dtype=torch.float64)
    torch.testing.assert_close(bridge.time_of(bridge.rho_squared(t)), t, rtol=1e-9, atol=0)
