"""Probe z with linear classifiers of yes/no attributes (the paper's Table 1, AP)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.evaluation import command
from dbae.evaluation.classification import Classification, ClassificationConfig


def main(arguments: Sequence[str] | None = None) -> int:
    return command.probe(__doc__, ClassificationConfig, Classification(), arguments)


if __name__ == "__main__":
    cli.run(main)
