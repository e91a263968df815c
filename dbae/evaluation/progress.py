"""How far a long evaluation is, with speed and time left."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """A bar on a terminal, else a line every ten seconds at most.

    Args:
        done: what has been done to the images: "reconstructed", "encoded".
        batches: how many this rank does.
        images: how many all ranks do together.
        steps: `step_done` calls per batch (sampler steps), 0 where the batch is the step.
        active: whether anything is shown.
        unit: what is counted, where it is not images.
    """

    def __init__(
        self,
        done: str,
        batches: int,
        images: int,
        steps: int = 0,
        *,
        active: bool,
        unit: str = "images",
    ) -> None:
        self._what, self._steps, self._unit = done, steps, unit
        self._images, self._batches, self._done = images, batches, 0
        self._started = self._last = time.monotonic()
        self._active = active
        self._bar: Any = None
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            total = batches * (steps or 1)
            self._bar = tqdm(total=total, desc=done, unit="step" if steps else "batch")

    def step_done(self, _: Any) -> None:
        """A sampler step is done; to be given to a sampler as its callback."""
        if self._bar is not None:
            self._bar.update()

    def batch_done(self) -> None:
        """A batch is done."""
        self._done += 1
        now, last = time.monotonic(), self._done == self._batches
        rate = self._done / self._batches * self._images / (now - self._started)  # of all ranks
        if self._bar is not None:
            if not self._steps:
                self._bar.update()
            self._bar.set_postfix_str(f"{rate:.3g} {self._unit}/s")
        elif self._active and (last or now - self._last > 10):
            self._last = now
            left = (self._batches - self._done) / self._batches * self._images / rate
            print(
                f"{self._what} {self._done * self._images // self._batches}/{self._images} "
                f"{self._unit}, {rate:.3g} {self._unit}/s, ETA {left:.0f} s",
                flush=True,
            )

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
