"""Probe z with linear regressions of real-valued attributes (the paper's Table 1, r and MSE)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.evaluation import command
from dbae.evaluation.regression import Regression, RegressionConfig


def main(arguments: Sequence[str] | None = None) -> int:
    return command.probe(__doc__, RegressionConfig, Regression(), arguments)


if __name__ == "__main__":
    cli.run(main)
