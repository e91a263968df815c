"""The diffusion bridge: drift, marginals, preconditioning and loss weights. No networks here.

A bridge is the process dx = f(t) x dt + g(t) dw, with x_t | x_0 ~ N(α_t x_0, (α_t ρ_t)² I),
conditioned to end in x_T. One formula serves VE and VP; they differ in α_t and ρ_t only:

    VE   α_t = 1                              ρ_t² = t²                             T = 80
    VP   α_t = exp(−β_d t²/4 − β_min t/2)     ρ_t² = exp(β_d t²/2 + β_min t) − 1    T = 1

All coefficients are float64: near both ends float32 loses digits to cancellation.
Source: DDBM (Zhou et al. 2023, arXiv 2309.16948) sections 3–4 and table 1.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError

SCHEDULES = ("vp", "ve", "vp_simple", "ve_simple")
WEIGHT_SCHEDULES = ("bridge_karras", "snr", "snr+1", "karras", "truncated-snr", "uniform")

# Keeps the logarithm of c_noise finite at t = 0 (DDBM's constant).
_TINY = 1e-44


class Coefficients(NamedTuple):
    """q(x_t | x_0, x_T) = N(a x_T + b x_0, c² I); float64, the shape of t."""

    a: Tensor
    b: Tensor
    c: Tensor


class Preconditioning(NamedTuple):
    """D = c_skip · x_t + c_out · F(c_in · x_t, …); float64, the shape of t."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


class DriftTerms(NamedTuple):
    """A reverse drift written as on_x · x + on_endpoint · x_T + on_denoised · D; float64."""

    on_x: Tensor
    on_endpoint: Tensor
    on_denoised: Tensor


@dataclasses.dataclass(frozen=True)
class Bridge:
    """A bridge of one schedule with the data statistics that its preconditioning assumes.

    Args:
        schedule: "vp", "ve", or "vp_simple", "ve_simple" (same bridge; the network's output is D
            itself: c_skip = 0, c_out = 1, c_in = 1, and the weight of "bridge_karras" is 1).
        sigma_data: σ_0, standard deviation of x_0 (images in [−1, 1]).
        sigma_data_end: σ_T, standard deviation of x_T ("end_data" in configurations).
        cov_xy: σ_0T, covariance of x_0 and x_T.
        weight_schedule: one of WEIGHT_SCHEDULES.
        beta_d, beta_min: the VP noise schedule; unused by VE.

    Times t are tensors of any float dtype and shape with values in [t_min, T]. They are converted
    to float64, and so are all results.
    """

    schedule: str = "vp"
    sigma_data: float = 0.5
    sigma_data_end: float = 0.5
    cov_xy: float = 0.0
    weight_schedule: str = "bridge_karras"
    beta_d: float = 2.0
    beta_min: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.weight_schedule not in WEIGHT_SCHEDULES:
            raise UserError(
                f"weight_schedule {self.weight_schedule!r} is not one of "
                f"{', '.join(WEIGHT_SCHEDULES)}"
            )

    # The schedule ---------------------------------------------------------------------------

    @property
    def is_vp(self) -> bool:
        """Whether α and ρ are those of the variance-preserving process."""
        return self.schedule.startswith("vp")

    @property
    def is_simple(self) -> bool:
        """Whether the network predicts D directly, without preconditioning."""
        return self.schedule.endswith("_simple")

    @property
    def T(self) -> float:
        """The time at which the bridge is pinned to x_T."""
        return 1.0 if self.is_vp else 80.0

    @property
    def t_min(self) -> float:
        """The smallest time that training and sampling grids use."""
        return 1e-4 if self.is_vp else 0.002

    def _log_growth(self, t: Tensor) -> Tensor:
        """ln(1 + ρ_t²) = −2 ln α_t of VP."""
        return t * (self.beta_d * t / 2 + self.beta_min)

    def alpha(self, t: Tensor) -> Tensor:
        """α_t, the signal's scale without the pin."""
        t = _as_float64(t)
        return torch.exp(-self._log_growth(t) / 2) if self.is_vp else torch.ones_like(t)

    def rho_squared(self, t: Tensor) -> Tensor:
        """ρ_t², the noise-to-signal ratio without the pin; SNR_t = 1/ρ_t²."""
        t = _as_float64(t)
        return torch.expm1(self._log_growth(t)) if self.is_vp else t**2

    def time_of(self, rho_squared: Tensor) -> Tensor:
        """The inverse of `rho_squared`: t where ρ_t² has these values."""
        rho2 = _as_float64(rho_squared)
        if not self.is_vp:
            return rho2.sqrt()
        growth = 2 * torch.log1p(rho2)  # β_d t² + 2 β_min t
        return growth / (self.beta_min + torch.sqrt(self.beta_min**2 + self.beta_d * growth))

    def rho_squared_left(self, t: Tensor) -> Tensor:
        """ρ_T² − ρ_t², without the cancellation of that difference near T."""
        t = _as_float64(t)
        if not self.is_vp:
            return (self.T - t) * (self.T + t)
        growth_left = (self.T - t) * (self.beta_d * (self.T + t) / 2 + self.beta_min)
        return torch.exp(self._log_growth(t)) * torch.expm1(growth_left)

    def drift_rate(self, t: Tensor) -> Tensor:
        """f(t) of the forward process."""
        t = _as_float64(t)
        return -(self.beta_min + self.beta_d * t) / 2 if self.is_vp else torch.zeros_like(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g²(t) of the forward process."""
        t = _as_float64(t)
        return self.beta_min + self.beta_d * t if self.is_vp else 2 * t

    def _end(self, t: Tensor) -> Tensor:
        return torch.full((), self.T, dtype=torch.float64, device=_as_float64(t).device)

    # The bridge -----------------------------------------------------------------------------

    def coefficients(self, t: Tensor) -> Coefficients:
        """a, b, c of q(x_t | x_0, x_T) (DDBM eq. 8)."""
        end = self._end(t)
        alpha, rho2, rho2_end = self.alpha(t), self.rho_squared(t), self.rho_squared(end)
        left = self.rho_squared_left(t) / rho2_end  # 1 − ρ_t²/ρ_T²
        return Coefficients(
            a=alpha / self.alpha(end) * rho2 / rho2_end,
            b=alpha * left,
            c=alpha * torch.sqrt(rho2 * left),
        )

    def preconditioning(self, t: Tensor) -> Preconditioning:
        """c_skip, c_out, c_in (DDBM appendix A.3, after EDM)."""
        a, b, c = self.coefficients(t)
        if self.is_simple:
            return Preconditioning(torch.zeros_like(a), torch.ones_like(a), torch.ones_like(a))
        var_0, var_T, cov = self.sigma_data**2, self.sigma_data_end**2, self.cov_xy
        variance = a**2 * var_T + b**2 * var_0 + 2 * a * b * cov + c**2
        c_in = variance**-0.5
        c_skip = (b * var_0 + a * cov) / variance
        c_out = torch.sqrt(a**2 * (var_0 * var_T - cov**2) + var_0 * c**2) * c_in
        return Preconditioning(c_skip, c_out, c_in)

    def weight(self, t: Tensor) -> Tensor:
        """The weight of (D − x_0)² in the loss."""
        if self.weight_schedule == "bridge_karras":
            return self.preconditioning(t).c_out ** -2
        snr = 1 / self.rho_squared(t)
        if self.weight_schedule == "snr":
            return snr
        if self.weight_schedule == "snr+1":
            return snr + 1
        if self.weight_schedule == "karras":
            return snr + 1 / self.sigma_data**2
        if self.weight_schedule == "truncated-snr":
            return snr.clamp(min=1)
        return torch.ones_like(snr)

    @staticmethod
    def noise_label(t: Tensor) -> Tensor:
        """c_noise = 250 ln t, what the UNet's time embedding receives."""
        return 250 * torch.log(_as_float64(t) + _TINY)

    # Reverse dynamics -----------------------------------------------------------------------

    def reverse_drift(self, t: Tensor, guidance: float = 1.0, *, sde: bool = False) -> DriftTerms:
        """The drift of the reverse ODE, or of the reverse SDE, at times t < T.

        With s = −(x − a x_T − b D)/c² and h = −(x − (α_t/α_T) x_T)/(α_t² (ρ_T² − ρ_t²)):

            ODE   dx/dt = f x − g² (s/2 − w h)        SDE   dx = [f x − g² (s − w h)] dt + g dW

        (DDBM eqs. 9–10; w is the guidance.) Both are linear in x, x_T and D; the three factors
        are returned, so that a whole time grid costs one call.
        """
        a, b, c = self.coefficients(t)
        alpha, g2 = self.alpha(t), self.diffusion_squared(t)
        score = g2 * (1.0 if sde else 0.5) / c**2
        pull = g2 * guidance / (alpha**2 * self.rho_squared_left(t))
        return DriftTerms(
            on_x=self.drift_rate(t) + score - pull,
            on_endpoint=pull * alpha / self.alpha(self._end(t)) - score * a,
            on_denoised=-score * b,
        )

    def sample_times(self, uniform: Tensor) -> Tensor:
        """Training times "real-uniform": U(t_min, T) from U(0, 1); float64, shape of `uniform`."""
        return self.t_min + (self.T - self.t_min) * _as_float64(uniform)

    def sample_times_lognormal(self, normal: Tensor) -> Tensor:
        """Training times "lognormal": exp(−1.2 + 1.2 n), n ~ N(0, 1), clamped to T; float64."""
        return torch.exp(-1.2 + 1.2 * _as_float64(normal)).clamp(max=self.T)


def _as_float64(t: Tensor) -> Tensor:
    """t in float64; on the CPU where the device (MPS) has no float64."""
    return t.cpu().double() if t.device.type == "mps" else t.double()
