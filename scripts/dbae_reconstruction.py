"""Reconstruct a data set with a trained DBAE and score it: MSE, SSIM, LPIPS, pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.data import ImageDataset, open_dataset
from dbae.evaluation import command
from dbae.evaluation.reconstruction import ReconstructionConfig, run


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, ReconstructionConfig).parse_args(arguments)
    config = ReconstructionConfig(**cli.given(options, ReconstructionConfig))
    with command.loaded(options) as (model, context):

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
