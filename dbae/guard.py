"""Which gradients are applied: a step that is not finite, or far off, changes nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .errors import UserError

_MEMORY = 0.99  # decay of the mean loss that a spike is measured against, about 100 steps
_WARM_UP = 20  # steps before there is a mean to measure against


@dataclasses.dataclass
class StepGuard:
    """Counts the steps that were skipped, and stops a run that makes no others.

    All ranks hold the same guard and give it the same figures.

    Args:
        max_bad_steps: that many bad steps in a row end the run.
        max_spike: a loss this many times its recent mean makes a bad step (0: none does).
    """

    max_bad_steps: int
    max_spike: float
    bad: int = 0  # skipped steps of the whole run
    in_a_row: int = 0
    overflows: int = 0  # steps that fp16's loss scale was too large for: usual, not bad
    mean_loss: float = 0.0  # of applied steps, decaying
    weight: float = 0.0  # of the steps in it: 1 − _MEMORYⁿ

    def spikes(self, loss: float) -> bool:
        """Whether the loss, the mean over all ranks, is far above that of recent steps."""
        if not self.max_spike or self.weight < 1 - _MEMORY**_WARM_UP:
            return False
        return loss > self.max_spike * self.mean_loss / self.weight

    def applied(self, loss: float | None) -> None:
        """A step's gradient was applied; its loss where spikes are looked for."""
        self.in_a_row = 0
        if loss is not None and math.isfinite(loss):
            self.mean_loss = _MEMORY * self.mean_loss + (1 - _MEMORY) * loss
            self.weight = _MEMORY * self.weight + (1 - _MEMORY)

    def skipped(self, step: int, why: str) -> None:
        """A step was bad. UserError when it was one too many in a row."""
        self.bad += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_bad_steps:
            raise UserError(
                f"{self.in_a_row} bad steps in a row, the last at step {step} ({why}); nothing "
                "was updated by them and the checkpoints are from before. Try a lower --lr, "
                "--precision bf16 or fp32, or a larger --max_bad_steps; bad_steps.jsonl "
                "names the images"
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what was counted, not what was configured."""
        counted = dataclasses.asdict(self)
        return {k: v for k, v in counted.items() if k not in ("max_bad_steps", "max_spike")}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)
