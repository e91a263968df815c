"""Edit attributes of images along a linear classifier's weights in z; measure what changes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli
from dbae.evaluation import command, manipulation, pictures
from dbae.evaluation.classifier import find_classifier, load_classifier
from dbae.evaluation.manipulation import ManipulationConfig
from dbae.files import make_folder


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, ManipulationConfig).parse_args(arguments)
    config = ManipulationConfig(**cli.given(options, ManipulationConfig))
    with command.loaded(options) as (model, context):
        command.check_trained_on(model, config.dataset)
        if not context.is_main:  # one process is enough
            return 0
        path = (
            Path(config.classifier)
            if config.classifier
            else find_classifier(options.checkpoint, config.dataset, model.config)
        )
        classifier = load_classifier(path, model.config.latent_dim)
        size = model.config.image_size
        reads = config.indices or config.num_measured
        dataset = pictures.open_data(config, size) if reads else None
        inputs = pictures.read_pictures(config, size, dataset)
        edits, choice = manipulation.plan(config, len(inputs), classifier)
        for note in [*pictures.notes(inputs, dataset), *([choice] if choice else [])]:
            print(note)
        folder = config.output_folder(options.checkpoint)
        make_folder(folder)  # before the long work, as it may fail
        result = manipulation.manipulate(
            model,
            inputs,
            classifier,
            edits,
            config,
            dataset=dataset,
            checkpoint=options.checkpoint,
            classifier_file=path,
        )
        written = manipulation.write(result, folder)
        print(f"\n{result.table}\n", *written, sep="\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
