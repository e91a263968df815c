"""One process against two on one machine: images/s, efficiency, bytes between them.

    python3 benchmarks/scaling.py [--quick]

Real training runs of the demo model, each process with one thread, as `train_dbae.sh` launches
them; gloo over the loopback device, whose counter says how many bytes went through (Linux only; of
other programs too, so that nothing else should talk meanwhile).
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Figures, machine, show
from dbae import create_model

ROOT = Path(__file__).resolve().parents[1]
_MODEL = ("--num_channels=64", "--endpoint_channels=32")


def _run(processes: int, steps: int, folder: Path) -> tuple[float, int]:
    """(images/s over the second half of a run, bytes through the loopback device in all of it)."""
    launch = [
        str(ROOT / "scripts" / "torchrun.py"),
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    command = [
        sys.executable, *(launch if processes > 1 else []), str(ROOT / "scripts" / "dbae_train.py"),
        f"--workdir={folder}", f"--max_steps={steps}", f"--log_interval={steps // 2}",
        "--batch_size=16", "--sample_interval=0", "--device=cpu", "--precision=fp32", *_MODEL,
    ]  # fmt: skip
    before = _loopback_bytes()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    sent = _loopback_bytes() - before
    with open(next(folder.glob("*/progress.csv")), newline="") as file:
        *_, last = csv.DictReader(file)
    return float(last["images_per_s"]), sent


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "lo":
            return int(counters.split()[0])
    raise SystemExit("there is no loopback device 'lo' to count on")


def measure(quick: bool) -> Figures:
    """Both runs."""
    steps = 4 if quick else 24
    with tempfile.TemporaryDirectory() as made:
        alone, _ = _run(1, steps, Path(made, "one"))
        both, some = _run(2, steps, Path(made, "two"))
        _, more = _run(2, 2 * steps, Path(made, "longer"))  # what a start sends falls out
    model = create_model("demo", num_channels=64, endpoint_channels=32)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    a_step = (more - some) / steps
    return [
        ("images/s, 1 process", f"{alone:.1f}"),
        ("images/s, 2 processes, the same batch each", f"{both:.1f}"),
        ("efficiency", f"{both / (2 * alone):.1%}"),
        ("gradients", f"{gradients / 2**20:.1f} MiB"),
        (
            "sent between the two, a step",
            f"{a_step / 2**20:.1f} MiB = {a_step / 2 / gradients:.2f} × the gradients each",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args()
    print(machine())
    show("data-parallel training on one machine", measure(options.quick))


if __name__ == "__main__":
    main()
