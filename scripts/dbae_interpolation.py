"""Interpolate between images in z: strips of images and endpoints, frames, an animation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.evaluation import command, interpolation, pictures
from dbae.evaluation.interpolation import InterpolationConfig
from dbae.files import make_folder


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, InterpolationConfig).parse_args(arguments)
    config = InterpolationConfig(**cli.given(options, InterpolationConfig))
    with command.loaded(options) as (model, context):
        command.check_trained_on(model, config.dataset)
        if not context.is_main:  # one process is enough
            return 0
        size = model.config.image_size
        dataset = pictures.open_data(config, size) if config.indices else None
        inputs = pictures.read_pictures(config, size, dataset)
        for note in pictures.notes(inputs, dataset):
            print(note)
        folder = config.output_folder(options.checkpoint)
        make_folder(folder)  # before the long work, as it may fail
        result = interpolation.interpolate(
            model, inputs, config, dataset=dataset, checkpoint=options.checkpoint
        )
        written = interpolation.write(result, folder)
        print(f"\n{result.table}\n", *written, sep="\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
