"""Train a DBAE, or resume training: the entry point behind train_dbae.sh."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.distributed import DEVICES, join
from dbae.presets import ModelConfig, TrainConfig, get_preset


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, join the other processes, train."""
    parser = cli.parser("Train a DBAE. The same command again resumes an interrupted run.")
    parser.add_argument("--resume", help="start from this checkpoint or run folder")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="(default: auto)")
    cli.add_flags(parser, TrainConfig, defaults="the preset's")
    cli.add_flags(parser, ModelConfig, defaults="the preset's")
    flags = parser.parse_args(argv)

    given = cli.given(flags, TrainConfig)
    preset = get_preset(given.get("dataset", "demo"))
    config = TrainConfig(**{**preset.train, "dataset": "demo", **given})
    model_config = dataclasses.replace(preset.model, **cli.given(flags, ModelConfig))

    from dbae.training import Trainer

    command = shlex.join(sys.argv if argv is None else ["dbae_train.py", *argv])
    with join(flags.device, config.timeout_s) as context:
        Trainer(model_config, config, context, flags.resume, command).run()


if __name__ == "__main__":
    cli.run(main)
