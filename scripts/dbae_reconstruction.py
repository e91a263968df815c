"""Reconstruct a data set with a trained DBAE and score it: MSE, SSIM, LPIPS, pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli, load_model
from dbae.bridge import SCHEDULES
from dbae.data import ImageDataset, open_dataset
from dbae.distributed import DEVICES, join
from dbae.evaluation.reconstruction import ReconstructionConfig, run

# Ranks meet only at the end; one may wait for another's last batch, which is slow on a CPU.
_TIMEOUT_S = 3600


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="weights (ema_*.pt), or a run's folder"
    )
    for flag, convert, meaning in (
        ("--schedule", str, "bridge of the checkpoint; needed where the file does not record it"),
        ("--stochastic", cli.parse_bool, "whether its encoder is stochastic; checked against it"),
        ("--end_data", float, "σ_T for sampling, in place of the checkpoint's"),
    ):
        parser.add_argument(
            flag,
            type=convert,
            help=f"{meaning} (default: what the checkpoint says)",
            default=argparse.SUPPRESS,
            choices=SCHEDULES if flag == "--schedule" else None,
            metavar="true|false" if convert is cli.parse_bool else None,
        )
    parser.add_argument("--device", default="auto", choices=DEVICES, help="(default: auto)")
    cli.add_flags(parser, ReconstructionConfig)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    config = ReconstructionConfig(**cli.given(options, ReconstructionConfig))
    overrides = {
        name: getattr(options, name)
        for name in ("schedule", "stochastic", "end_data")
        if hasattr(options, name)
    }
    with join(options.device, timeout_s=_TIMEOUT_S) as context:
        model = load_model(options.checkpoint, context.device, **overrides)

        def open_split(split: str) -> ImageDataset:
            return open_dataset(
                config.dataset, config.data_dir, model.config.image_size, split, config.bad_images
            )

        dataset = open_split(config.split)
        for note in dataset.notes:
            context.print(note)
        result = run(
            model,
            dataset,
            config,
            context,
            config.output_folder(options.checkpoint),
            checkpoint=options.checkpoint,
            train_dataset=open_split("train") if config.baselines and context.is_main else None,
        )
        if result:
            print(f"\n{result.table}\n")
            for path in (result.comparison, result.samples, result.folder / "metrics.json"):
                print(path)
    return 0


if __name__ == "__main__":
    cli.run(main)
