"""From x_T back to x_0: time grids and samplers, on any denoise callable. No networks here.

A sampler (a row of `SOLVERS`) is a time grid and an update rule: Euler and Heun follow the slope
of the reverse dynamics, after a share of the step done by the SDE ("churn"); DBIM moves along the
bridge's own marginals, with the estimate of x_0 in its place; "exp" takes DBIM's noiseless steps
from x_T itself, on a grid of its own, and is the best known for few denoiser calls. How the times
of the others are spaced (`rho`) and DBIM's order are choices apart.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .bridge import Bridge
from .errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t (N, …), t (N,)) → estimate of x_0
Noise = Callable[[Tensor], Tensor]  # x → ε ~ N(0, I) of its shape
States = Iterator[tuple[float, Tensor]]  # (t, x_t) after each step


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


@dataclasses.dataclass(frozen=True)
class Options:
    """Which sampler, and its numbers (see `sample`). UserError for one out of its range."""

    sampler: str = "heun"
    steps: int = 40
    rho: float = 7.0
    churn: float = 0.0
    guidance: float = 1.0
    eta: float = 0.0
    order: int = 2

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise UserError(f"sampler {self.sampler!r} is unknown; choose one of {known}")
        if self.steps < 1:
            raise UserError(f"steps {self.steps} must be at least 1")
        if not 0 <= self.churn < 1:
            raise UserError(f"churn {self.churn} must lie in [0, 1)")
        if not (self.rho > 0 and math.isfinite(self.rho)):
            raise UserError(f"rho {self.rho} must be positive")
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance {self.guidance} must be a finite number")
        if self.order not in (1, 2, 3):
            raise UserError(f"order {self.order} must be 1, 2 or 3")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta {self.eta} must lie in [0, 1]")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in reads(self.sampler) and value != field.default:
                readers = " and ".join(name for name in SAMPLERS if field.name in reads(name))
                raise UserError(
                    f"{field.name} {value} has no meaning for sampler {self.sampler}; leave it out "
                    f"(it is for {readers})"
                )
        if self.eta > 0 and self.order > 1:
            raise UserError(f"eta {self.eta} above 0 needs order 1, found order {self.order}")


def spaced(high: float, low: float, points: int, rho: float) -> list[float]:
    """`points` times from `high` down to `low`, evenly spaced in t^(1/ρ); ρ = 1 is uniform."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [(first + i / max(points - 1, 1) * (last - first)) ** rho for i in range(points)]


def karras_grid(bridge: Bridge, steps: int, rho: float) -> list[float]:
    """`steps` times from T − 1e-4 down to t_min, evenly spaced in t^(1/ρ), then 0 (EDM eq. 5)."""
    return [*spaced(bridge.T - 1e-4, bridge.t_min, steps, rho), 0.0]


def dbim_grid(bridge: Bridge, steps: int, rho: float) -> list[float]:
    """`steps` + 1 times from T − 1e-3 down to t_min, evenly spaced in t^(1/ρ).

    ρ = 1 is the grid of the DBIM paper (arXiv 2405.15885).
    """
    return spaced(bridge.T - 1e-3, bridge.t_min, steps + 1, rho)


def signal_grid(bridge: Bridge, steps: int) -> list[float]:
    """`steps` + 1 times from T to 0, time i of N where b/c = 4 (i / (N − i))^1.5.

    What the estimate of x_0 still changes with is the ratio b/c of signal to noise in x_t: 0 at T,
    ∞ at 0, whatever the schedule. These times are nearly even in ln(b/c) where it matters, and
    become dense everywhere as N grows. 4 and 1.5 lie in the flat middle of what was tried, 2 … 4.5
    and 1 … 1.8, on two trained VP models (32 pixels; demo data and faces) with 3, 5 and 8 steps.
    """
    parts = torch.arange(1, steps, dtype=torch.float64)
    ratio = 4 * (parts / (steps - parts)) ** 1.5
    end = bridge.rho_squared(torch.tensor(bridge.T, dtype=torch.float64))
    rho2 = 1 / (ratio**2 + 1 / end)  # as b²/c² = 1/ρ² − 1/ρ_T²
    return [bridge.T, *bridge.time_of(rho2).tolist(), 0.0]


class Estimate:
    """The denoiser of one run: clamped to [−1, 1] if asked for, and its calls counted (`nfe`)."""

    def __init__(self, denoise: Denoise, clip: bool) -> None:
        self.denoise, self.clip = denoise, clip
        self.nfe = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        denoised = self.denoise(x, torch.full((len(x),), t, dtype=dtype, device=x.device))
        self.nfe += 1
        return denoised.clamp(-1, 1) if self.clip else denoised


# Euler and Heun: along the reverse dynamics -----------------------------------------------------


class ReverseField:
    """dx/dt of the reverse dynamics at the times of one grid, calling the denoiser.

    The coefficients of all times are computed at once, in float64, before the first step.
    """

    def __init__(
        self,
        estimate: Estimate,
        x_T: Tensor,
        bridge: Bridge,
        times: list[float],
        guidance: float,
        *,
        sde: bool = False,
    ) -> None:
        self.estimate, self.x_T = estimate, x_T
        drift = bridge.reverse_drift(torch.tensor(times, dtype=torch.float64), guidance, sde=sde)
        self.terms = dict(zip(times, zip(*(k.tolist() for k in drift), strict=True), strict=True))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        on_x, on_endpoint, on_denoised = self.terms[t]
        return on_x * x + on_endpoint * self.x_T + on_denoised * self.estimate(x, t)


Rule = Callable[[ReverseField, Tensor, float, float], Tensor]  # x at t → x at t'


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


def follow_slope(
    rule: Rule, estimate: Estimate, x_T: Tensor, bridge: Bridge, options: Options, draw: Noise
) -> States:
    """`euler` or `heun` from x_T to t = 0 (DDBM algorithm 1).

    With churn r > 0 each step begins with one Euler–Maruyama step of the reverse SDE over the
    share r of the interval, from t_i to t̂ = t_i + r (t_{i+1} − t_i), at one call more.
    """
    times, churn = karras_grid(bridge, options.steps, options.rho), options.churn
    churned = [t + churn * (t_next - t) for t, t_next in itertools.pairwise(times)]
    ode = ReverseField(estimate, x_T, bridge, [*times[1:-1], *churned], options.guidance)
    sde = ReverseField(estimate, x_T, bridge, times[:-1], options.guidance, sde=True)
    diffusion = bridge.diffusion_squared(torch.tensor(times, dtype=torch.float64)).sqrt().tolist()

    x = x_T
    for i, (t_hat, t_next) in enumerate(zip(churned, times[1:], strict=True)):
        t = times[i]
        if churn > 0:
            drift, epsilon = sde(x, t), draw(x)
            x = x + (t_hat - t) * drift + abs(t_hat - t) ** 0.5 * diffusion[i] * epsilon
        x = rule(ode, x, t_hat, t_next)
        yield t_next, x


# DBIM: through the bridge's own marginals -------------------------------------------------------


class DbimTerms(NamedTuple):
    """One step of DBIM: on_x · x + on_endpoint · x_T + on_noise · ε + Σ on_denoised[j] · D_j.

    D_0 is the estimate of x_0 at the step's start, D_1 and D_2 those of the steps before.
    """

    on_x: float
    on_endpoint: float
    on_noise: float
    on_denoised: list[float]


def dbim_terms(bridge: Bridge, times: list[float], order: int, eta: float) -> list[DbimTerms]:
    """The coefficients of all steps between `times`, in float64 (DBIM, arXiv 2405.15885).

    Order 1, from s to t:

        ω = η α_t ρ_t √(1 − ρ_t²/ρ_s²)  (0 in the last step),   k = √(c_t² − ω²) / c_s
        x_t = a_t x_T + b_t D_s + k (x_s − a_s x_T − b_s D_s) + ω ε

    With η = 1 this is the bridge's own transition given x_0 = D_s; with η = 0 it is exact for the
    ODE if D does not change within the step. Higher orders (η = 0) start from the ODE's
    solution with λ = ln(b/c):

        x_t = (c_t/c_s) x_s + (a_t − a_s c_t/c_s) x_T + c_t ∫ e^λ D dλ  over [λ_s, λ_t]

    and put for D the polynomial in λ through its values at s and the grid points before: one for
    order 2, two for order 3. With h = λ_t − λ_s the integrals of its terms are

        m_n = c_t ∫ e^λ (λ − λ_s)^n / n! dλ,   m_0 = b_t − b_s c_t/c_s,   m_n = b_t h^n/n! − m_{n−1}

    and the weights of the values are those that give Σ_j w_j (λ_j − λ_s)^n / n! = m_n. The paper's
    finite differences of D are the derivatives of the same polynomial. The first step has no point
    before it and is of order 1, so is the last; the second is of order 2 at most.

    At T, where x is x_T, c is 0 and k stands for 0: `follow_exp` says why.
    """
    t = torch.tensor(times, dtype=torch.float64)
    a, b, c = (k.tolist() for k in bridge.coefficients(t))
    rho2 = bridge.rho_squared(t)
    spread = bridge.alpha(t)[1:] * torch.sqrt(rho2[1:] * (1 - rho2[1:] / rho2[:-1]))
    omegas = [*(eta * spread[:-1]).tolist(), 0.0]
    steps = []
    for s, omega in enumerate(omegas):
        known = 1 if s + 2 == len(times) else min(order, s + 1)
        k = math.sqrt(c[s + 1] ** 2 - omega**2) / c[s] if c[s] > 0 else 0.0
        weights = [b[s + 1] - k * b[s]]
        if known > 1:
            before = [math.log(b[s - j] / c[s - j]) for j in range(known)]
            h = math.log(b[s + 1] / c[s + 1]) - before[0]
            moments = weights
            for n in range(1, known):
                moments.append(b[s + 1] * h**n / math.factorial(n) - moments[-1])
            offsets = [known_at - before[0] for known_at in before]
            powers = [[offset**n / math.factorial(n) for offset in offsets] for n in range(known)]
            weights = torch.linalg.solve(t.new_tensor(powers), t.new_tensor(moments)).tolist()
        steps.append(DbimTerms(k, a[s + 1] - k * a[s], omega, weights))
    return steps


def dbim(
    estimate: Estimate,
    x: Tensor,
    x_T: Tensor,
    bridge: Bridge,
    times: list[float],
    order: int,
    eta: float,
    draw: Noise,
) -> States:
    """The steps of `dbim_terms` from x at times[0]: one denoiser call each."""
    before: list[Tensor] = []  # the latest estimates of x_0, newest first
    steps = dbim_terms(bridge, times, order, eta)
    for (t, t_next), terms in zip(itertools.pairwise(times), steps, strict=True):
        before = [estimate(x, t), *before[: order - 1]]
        state = terms.on_x * x + terms.on_endpoint * x_T
        for weight, denoised in zip(terms.on_denoised, before, strict=False):
            state = state + weight * denoised
        if terms.on_noise > 0:
            state = state + terms.on_noise * draw(x)
        x = state
        yield t_next, x


def follow_dbim(
    estimate: Estimate, x_T: Tensor, bridge: Bridge, options: Options, draw: Noise
) -> States:
    """DBIM from x_T to t_min.

    At T the bridge has no width and λ no value, so that the first point of the grid is reached by
    a draw from its marginal, a x_T + b D(x_T, T) + c ε (the "boot": one call, noise for any η).
    """
    _require_scale_at_T(bridge, options.sampler)
    times = dbim_grid(bridge, options.steps, options.rho)
    a, b, c = (float(k) for k in bridge.coefficients(torch.tensor(times[0], dtype=torch.float64)))
    x = a * x_T + b * estimate(x_T, bridge.T) + c * draw(x_T)
    yield from dbim(estimate, x, x_T, bridge, times, options.order, options.eta, draw)


def follow_exp(
    estimate: Estimate, x_T: Tensor, bridge: Bridge, options: Options, draw: Noise
) -> States:
    """The noiseless ODE from x_T to t = 0 by its exponential integrator, DBIM's steps with η = 0.

    In u = (x − a x_T)/c and q = b/c the reverse ODE reads du = D dq, without a singular end: x is
    x_T at T whatever u is there, and each u is one solution, one quantile of what may lie above
    x_T. DBIM draws u; here it is 0, the middle, with the least error. So the first step gives
    x = a x_T + b D(x_T, T), and the last, to t = 0 where c = 0 and b = 1, gives D itself.

    Euler and Heun, from x_T at T − 1e-4, look for the same solution and lose it at both ends: at
    x_T itself their slope is half that of the solution, so that the first step stays half behind;
    and near 0, where x − D must shrink like √t, a step from t to t' of Heun's multiplies it by
    1 − (1 − t'/t)(3 + t/t')/8, which grows with t/t' and is beyond −1 where t/t' > 14.
    """
    _require_scale_at_T(bridge, options.sampler)
    return dbim(estimate, x_T, x_T, bridge, signal_grid(bridge, options.steps), 1, 0.0, draw)


def _has_scale_at_T(bridge: Bridge) -> bool:
    return bridge.sigma_data_end > 0 or bridge.is_simple


def _require_scale_at_T(bridge: Bridge, sampler: str) -> None:
    if not _has_scale_at_T(bridge):
        raise UserError(
            f"sampler {sampler} calls the denoiser at t = T, where a model with end_data 0 has no "
            "finite input scale; give the end_data that it was trained with (0.5), or use euler or "
            "heun"
        )


class Solver(NamedTuple):
    """A sampler: how it goes from x_T to the image, and which options beside its steps it reads."""

    follow: Callable[[Estimate, Tensor, Bridge, Options, Noise], States]
    reads: tuple[str, ...]


SOLVERS = {
    "euler": Solver(functools.partial(follow_slope, euler), ("rho", "churn", "guidance")),
    "heun": Solver(functools.partial(follow_slope, heun), ("rho", "churn", "guidance")),
    "dbim": Solver(follow_dbim, ("rho", "eta", "order")),
    "exp": Solver(follow_exp, ()),
}
SAMPLERS = tuple(SOLVERS)


def reads(sampler: str) -> tuple[str, ...]:
    """The fields of `Options` that this sampler is told by."""
    return ("sampler", "steps", *SOLVERS[sampler].reads)


FEW = 5  # steps of `best_with_few` that come as near as a hundred of Euler's


def best_with_few(bridge: Bridge) -> str:
    """The sampler for `FEW` steps: "exp"; "euler" where a model without σ_T rules that out."""
    return "exp" if _has_scale_at_T(bridge) else "euler"


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
    eta: float = 0.0,
    order: int = 2,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    clip: bool = True,
    return_path: bool = False,
    callback: Callable[[Step], None] | None = None,
) -> Samples:
    """Follow the reverse bridge from x_T to an image.

    Args:
        denoise: (x_t, t) → estimate of x_0; x_t like x_T, t (N,) float64.
        x_T: the start (N, …), the endpoint of the bridge.
        bridge: the bridge that the denoiser was trained on.
        sampler: "exp" (1 call a step; 5 steps are as good as 100 of Euler's), "euler" (1),
            "heun" (2, the last step 1), or "dbim" (1, and 1 before the first step).
        steps: N. Euler and Heun: grid points, from which a last step leads to t = 0. DBIM: steps,
            the last of which ends at t_min. Exp: steps, the last of which ends at 0.
        rho: all but exp: exponent of the time grid, evenly spaced in t^(1/ρ); 1 is uniform.
        churn: euler, heun: r in [0, 1). r > 0 adds before each step one Euler–Maruyama step of
            the SDE over the share r of the interval (1 more call a step).
        guidance: euler, heun: w, the weight of the pull towards x_T.
        eta: dbim of order 1: η in [0, 1], from no noise within the steps to the bridge's own.
        order: dbim: 1, 2 or 3.
        generator: draws the noise: churn's; DBIM's before the first step, and within each but the
            last where η > 0.
        noise: callable x → ε in place of the generator's draws, called once for each of them.
        clip: clamp each estimate of x_0, and the result, to [−1, 1].
        return_path: keep the state after every step.
        callback: called after each step with a `Step`.

    Returns:
        Samples(images, nfe, path). NFE: euler N, heun 2N − 1, with churn N more; dbim N + 1;
            exp N.

    Raises:
        UserError: an unknown sampler, a number out of its range or not for this sampler, or DBIM
            or exp with a model whose σ_T is 0.
    """
    options = Options(sampler, steps, rho, churn, guidance, eta, order)
    estimate = Estimate(denoise, clip)

    def draw(x: Tensor) -> Tensor:
        if noise is not None:
            return noise(x)
        return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    path = [x_T]
    for i, (t, x) in enumerate(SOLVERS[sampler].follow(estimate, x_T, bridge, options, draw)):
        if return_path:
            path.append(x)
        if callback is not None:
            callback(Step(i, steps, t, x, estimate.nfe))
    images = x.clamp(-1, 1) if clip else x
    return Samples(images, estimate.nfe, torch.stack(path) if return_path else None)
