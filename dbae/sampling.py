"""From x_T back to x_0: time grids and samplers, on any denoise callable. No networks here.

A sampler is a time grid and an update rule, chosen apart and listed in two tables (`GRIDS`,
`RULES`). What they share: the reverse dynamics of `Bridge`, churn, guidance and clamping.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .bridge import Bridge
from .errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t (N, …), t (N,)) → estimate of x_0


@dataclasses.dataclass(frozen=True)
class Step:
    """What a callback is told after each step."""

    index: int  # 0 … steps − 1
    steps: int
    t: float  # the time that x has now
    x: Tensor
    nfe: int  # denoiser calls so far


@dataclasses.dataclass
class Samples:
    """The result of `sample`.

    images: (N, …) like x_T; nfe: denoiser calls; path: (steps + 1, N, …), the start and the
    state after every step, when asked for, else None.
    """

    images: Tensor
    nfe: int
    path: Tensor | None = None


def karras_grid(bridge: Bridge, steps: int, rho: float) -> list[float]:
    """`steps` times from T − 1e-4 down to t_min, evenly spaced in t^(1/ρ), then 0 (EDM eq. 5)."""
    high, low = (bridge.T - 1e-4) ** (1 / rho), bridge.t_min ** (1 / rho)
    span = max(steps - 1, 1)
    return [(high + i / span * (low - high)) ** rho for i in range(steps)] + [0.0]


class ReverseField:
    """dx/dt of the reverse dynamics at the times of one grid, calling the denoiser.

    The coefficients of all times are computed at once, in float64, before the first step.
    """

    def __init__(
        self,
        denoise: Denoise,
        x_T: Tensor,
        bridge: Bridge,
        times: list[float],
        guidance: float,
        clip: bool,
        *,
        sde: bool = False,
    ) -> None:
        self.denoise, self.x_T, self.clip = denoise, x_T, clip
        self.nfe = 0
        drift = bridge.reverse_drift(torch.tensor(times, dtype=torch.float64), guidance, sde=sde)
        self.terms = dict(zip(times, zip(*(k.tolist() for k in drift), strict=True), strict=True))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        on_x, on_endpoint, on_denoised = self.terms[t]
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        denoised = self.denoise(x, torch.full((len(x),), t, dtype=dtype, device=x.device))
        self.nfe += 1
        if self.clip:
            denoised = denoised.clamp(-1, 1)
        return on_x * x + on_endpoint * self.x_T + on_denoised * denoised


def euler(field: ReverseField, x: Tensor, t: float, t_next: float) -> Tensor:
    """One denoiser call: x + (t' − t) d(x, t)."""
    return x + (t_next - t) * field(x, t)


def heun(field: ReverseField, x: Tensor, t: float, t_next: float) -> Tensor:
    """Two denoiser calls, the trapezoidal rule; the step to t' = 0 is Euler's."""
    slope = field(x, t)
    ahead = x + (t_next - t) * slope
    if t_next == 0:
        return ahead
    return x + (t_next - t) * (slope + field(ahead, t_next)) / 2


GRIDS = {"karras": karras_grid}
RULES = {"euler": euler, "heun": heun}
SAMPLERS = tuple(RULES)


def check_options(sampler: str, steps: int, rho: float, churn: float, guidance: float) -> None:
    """Raise UserError for an unknown sampler or a number out of its range."""
    if sampler not in RULES:
        raise UserError(f"sampler {sampler!r} is unknown; choose one of {', '.join(RULES)}")
    if steps < 1:
        raise UserError(f"steps {steps} must be at least 1")
    if not 0 <= churn < 1:
        raise UserError(f"churn {churn} must lie in [0, 1)")
    if not (rho > 0 and math.isfinite(rho)):
        raise UserError(f"rho {rho} must be positive")
    if not math.isfinite(guidance):
        raise UserError(f"guidance {guidance} must be a finite number")


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    bridge: Bridge,
    sampler: str = "heun",
    steps: int = 40,
    rho: float = 7.0,
    churn: float = 0.0,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Callable[[Tensor], Tensor] | None = None,
    clip: bool = True,
    return_path: bool = False,
    callback: Callable[[Step], None] | None = None,
) -> Samples:
    """Follow the reverse bridge from x_T to an image (DDBM algorithm 1).

    Args:
        denoise: (x_t, t) → estimate of x_0; x_t like x_T, t (N,) float64.
        x_T: the start (N, …), the endpoint of the bridge.
        bridge: the bridge that the denoiser was trained on.
        sampler: "euler" (1 call a step) or "heun" (2, the last step 1).
        steps: N, grid points; a last step leads to t = 0.
        rho: exponent of the Karras grid.
        churn: r in [0, 1). r > 0 adds before each step one Euler–Maruyama step of the SDE
            over the share r of the interval (1 more call a step).
        guidance: w, the weight of the pull towards x_T.
        generator: draws the churn noise.
        noise: callable x → ε in place of the generator's draws, called once a churn step.
        clip: clamp each estimate of x_0, and the result, to [−1, 1].
        return_path: keep the state after every step.
        callback: called after each step with a `Step`.

    Returns:
        Samples(images, nfe, path). NFE: euler N, heun 2N − 1; with churn N more.

    Raises:
        UserError: an unknown sampler, or a number out of its range.
    """
    check_options(sampler, steps, rho, churn, guidance)
    rule = RULES[sampler]
    times = GRIDS["karras"](bridge, steps, rho)
    churned = [t + churn * (t_next - t) for t, t_next in itertools.pairwise(times)]
    ode = ReverseField(denoise, x_T, bridge, [*times[1:-1], *churned], guidance, clip)
    sde = ReverseField(denoise, x_T, bridge, times[:-1], guidance, clip, sde=True)
    diffusion = bridge.diffusion_squared(torch.tensor(times, dtype=torch.float64)).sqrt().tolist()

    x = x_T
    path = [x]
    for i in range(steps):
        t, t_hat, t_next = times[i], churned[i], times[i + 1]
        if churn > 0:
            drift = sde(x, t)
            if noise is not None:
                epsilon = noise(x)
            else:
                epsilon = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + (t_hat - t) * drift + abs(t_hat - t) ** 0.5 * diffusion[i] * epsilon
        x = rule(ode, x, t_hat, t_next)
        if return_path:
            path.append(x)
        if callback is not None:
            callback(Step(i, steps, t_next, x, ode.nfe + sde.nfe))
    images = x.clamp(-1, 1) if clip else x
    return Samples(images, ode.nfe + sde.nfe, torch.stack(path) if return_path else None)
