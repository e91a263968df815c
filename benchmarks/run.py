"""All speed benchmarks, one after the other: every ratio of the table in README.md beside this.

    python3 benchmarks/run.py [--quick]

`--quick` takes under ten minutes on two cores. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import data_speed, networks, probe_speed, scaling, startup
from benchmarks.common import machine, show

_PARTS = {
    "networks, celeba preset (64 pixels), random weights": networks.measure,
    "data": data_speed.measure,
    "probes": probe_speed.measure,
    "data-parallel training, two processes on this machine": scaling.measure,
    "startup": startup.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, smaller sizes")
    options = parser.parse_args()
    started = time.perf_counter()
    print(f"{machine()}, seed 0")
    for title, measure in _PARTS.items():
        show(title, measure(options.quick))
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
