"""How long training stands still for a checkpoint: written at once, or in the background.

    python3 benchmarks/save_stall.py [--preset celeba] [--folder /tmp]

Prints the stall of each, their ratio, and how long the background write takes; of the preset's
model with random weights and RAdam's moments.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dbae
from dbae import checkpoint
from dbae.store import CheckpointStore


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", default="celeba", help="(default: celeba)")
    parser.add_argument("--folder", help="on the disk to be measured (default: the temporary one)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    options = parser.parse_args()
    model = dbae.create_model(options.preset)
    moments = [
        {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        for p in model.parameters()
    ]
    size = 4 * sum(p.nbytes for p in model.parameters()) / 2**20
    stalls: dict[bool, list[float]] = {False: [], True: []}
    writes: list[float] = []
    for repeat in range(options.repeats):
        for background in (False, True):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                store = CheckpointStore(Path(folder), {}, 0, 0, background, lambda _: None)
                contents = {
                    "model_000001.pt": checkpoint.weights(model),
                    "ema_0.9999_000001.pt": checkpoint.weights(model),
                    "state_000001.pt": {"optimizer": moments},
                }
                started = time.perf_counter()
                store.save(1, contents)
                if repeat:  # the first finds memory and disk cold
                    stalls[background].append(time.perf_counter() - started)
                store.finish()
                if repeat and background:
                    writes.append(time.perf_counter() - started)
                store.close()
    plain, background_stall = (statistics.median(stalls[b]) for b in (False, True))
    print(f"{options.preset}, {size:.0f} MiB; {platform.machine()}, {os.cpu_count()} cores, "
          f"torch {torch.__version__}; medians of {options.repeats - 1}")  # fmt: skip
    print(f"stall, written at once:        {plain:.2f} s")
    print(f"stall, in the background:      {background_stall:.2f} s")
    print(f"ratio:                         {background_stall / plain:.2f}")
    print(f"written in the background in:  {statistics.median(writes):.2f} s")


if __name__ == "__main__":
    main()
