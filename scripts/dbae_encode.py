"""Encode a data set once: latents.npz, latents.safetensors, figures and neighbours of z."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import UserError, cli
from dbae.data import ImageDataset, Labels, binary_labels, open_dataset, real_labels
from dbae.evaluation import command, latents
from dbae.evaluation.protocol import require_at_least


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """What is encoded. Each field is a command-line flag."""

    dataset: str = cli.option("demo", "which data preset to read; the checkpoint decides the size")
    data_dir: str | None = cli.option(None, "folder, zip or LMDB with the images")
    split: str = cli.option("all", "which part of the data: all, train, valid, test")
    num_samples: int = cli.option(0, "encode the first so many images of the split (0: all)")
    flip: bool = cli.option(False, "encode the mirrored images too")
    store_labels: str = cli.option(
        "auto",
        "attributes to store beside z (auto: those that there are)",
        choices=("auto", "none", "binary", "real"),
    )
    labels: str | None = cli.option(
        None, "file of attributes (default: found beside the images by its usual name)"
    )
    batch_size: int = cli.option(64, "images per forward pass")
    bad_images: str = cli.option(
        "error", "an unreadable image stops the run or is replaced", choices=("error", "skip")
    )
    output_dir: str | None = cli.option(
        None, "folder of the results (default: sample_STEP/latents/… beside the checkpoint)"
    )

    def __post_init__(self) -> None:
        require_at_least(self, num_samples=0, batch_size=1)
        cli.check_choices(self)


def _labels(config: EncodeConfig, dataset: ImageDataset) -> Labels | None:
    """The labels that the config asks for; of "auto" whichever can be read, if any."""
    readers = {"binary": [binary_labels], "real": [real_labels], "none": []}
    for reader in readers.get(config.store_labels, [binary_labels, real_labels]):
        try:
            return reader(dataset, config.labels)
        except UserError:
            if config.store_labels != "auto" or config.labels:
                raise
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.parser(__doc__, EncodeConfig).parse_args(arguments)
    config = EncodeConfig(**cli.given(options, EncodeConfig))
    with command.loaded(options) as (model, context):
        dataset = open_dataset(
            config.dataset,
            config.data_dir,
            model.config.image_size,
            config.split,
            config.bad_images,
        )
        for note in dataset.notes:
            context.print(note)
        found = latents.latents_of(
            model,
            dataset,
            context,
            options.checkpoint,
            count=config.num_samples,
            flip=config.flip,
            labels=_labels(config, dataset),
            batch_size=config.batch_size,
            folder=Path(config.output_dir) if config.output_dir else None,
        )
        if found is not None:
            about = latents.statistics(found.mean)
            print(
                f"\nz of {len(found)} images: {found.mean.shape[1]} dimensions, "
                f"{len(about['dead'])} dead, effective rank {about['effective_rank']:.1f}"
            )
            folder = Path(config.output_dir or latents.cache_folder(options.checkpoint, dataset))
            for name in (latents.NPZ, latents.SAFETENSORS, latents.JSON, latents.NEIGHBOURS):
                print(folder / name)
    return 0


if __name__ == "__main__":
    cli.run(main)
