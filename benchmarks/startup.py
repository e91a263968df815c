"""How long importing the package and answering `--help` take.

python3 benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Figures, machine, show

ROOT = Path(__file__).resolve().parents[1]
_IMPORT = """
import time
started = time.perf_counter(); import torch; torch_s = time.perf_counter() - started
started = time.perf_counter(); import dbae; dbae_s = time.perf_counter() - started
print(torch_s, dbae_s)
"""


def measure(quick: bool) -> Figures:
    """The import's share beyond torch's, and the slowest `--help`."""
    runs = []
    for _ in range(3 if quick else 7):
        out = subprocess.run(
            [sys.executable, "-c", _IMPORT], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        runs.append([float(word) for word in out.split()])
    torch_s, dbae_s = (statistics.median(column) for column in zip(*runs, strict=True))
    scripts = [*sorted((ROOT / "scripts").glob("*.py")), ROOT / "eval_reconstruction.py"]
    helps = {script.name: _help(script) for script in scripts if script.name != "torchrun.py"}
    slowest = max(helps, key=lambda name: helps[name])
    return [
        ("import torch", f"{torch_s:.2f} s"),
        ("import dbae after it", f"{dbae_s:.2f} s"),
        (f"slowest --help of {len(helps)}", f"{helps[slowest]:.2f} s ({slowest})"),
    ]


def _help(script: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, script, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    options = parser.parse_args()
    print(machine())
    show("startup", measure(options.quick))


if __name__ == "__main__":
    main()
