"""RAdam (Liu et al. 2020, arXiv 1908.03265) in one pass over the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class RAdam(torch.optim.RAdam):
    """`torch.optim.RAdam` without weight decay, with the same state and, to rounding, its numbers.

    torch has no fused kernel of it, and reads and writes all weights some twenty times a step. Once
    the variance of the adaptive rate is tractable (from the sixth step on), RAdam is Adam with the
    rate lr · r_t and, as its ε stands outside of the bias correction, with ε/√(1 − β₂ᵗ): torch's
    fused Adam then does it all at once, where all weights that have a gradient have been updated
    equally often; where they have not, torch's own update is done. They are on one device.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(params), lr=lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`."""
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        counts = {int(self.state[p]["step"]) if self.state[p] else 0 for p in params}
        if closure is not None or len(counts) != 1:
            return super().step(closure)
        beta1, beta2 = group["betas"]
        done = counts.pop() + 1
        decay = beta2**done
        length = 2 / (1 - beta2) - 1
        length_now = length - 2 * done * decay / (1 - decay)
        if length_now <= 5:
            return super().step(closure)
        rectified = math.sqrt(
            (length_now - 4) * (length_now - 2) * length
            / ((length - 4) * (length - 2) * length_now)
        )  # fmt: skip
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        torch._fused_adam_(
            params,
            [_laid_out_like(p, p.grad) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), float(done), device=params[0].device)] * len(params),
            lr=group["lr"] * rectified,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"] / math.sqrt(1 - decay),
            amsgrad=False,
            maximize=False,
        )
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the memory of the moments is put in the order of the weights' own."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _laid_out_like(p, state[name])


def _laid_out_like(p: Tensor, value: Tensor) -> Tensor:
    """`value`, in the memory order of p: the fused kernel goes by memory, not by index."""
    return value if value.stride() == p.stride() else torch.empty_like(p).copy_(value)
