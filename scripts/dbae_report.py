"""Write a run's report: one self-contained HTML file with its curves, figures and pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="a training run's folder, or a folder with results of evaluations (metrics.json)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the HTML file (default: RUN_DIR/report.html)"
    )
    options = parser.parse_args(arguments)
    print(write_report(options.run_dir, options.output))
    return 0


if __name__ == "__main__":
    cli.run(main)
