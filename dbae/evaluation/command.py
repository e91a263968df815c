"""What the entry points of evaluations share: flags that name a model, and loading it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

from .. import cli
from ..bridge import SCHEDULES
from ..checkpoint import load_model, local
from ..distributed import DEVICES, Context, join
from ..errors import UserError
from ..model import DBAE
from ..precision import PRECISIONS
from .probing import ProbeConfig, Task, run
from .results import METRICS_FILE

# Ranks meet only at the end; one may wait for another's last batch, which is slow on a CPU.
_TIMEOUT_S = 3600


def parser(description: str | None, config: type) -> argparse.ArgumentParser:
    """A parser with `--checkpoint`, what overrides its content, and a flag per field of `config`.

    `description` is an entry point's docstring, of which the first paragraph is shown.
    """
    made = cli.parser((description or "").split("\n\n")[0])
    made.add_argument(
        "--checkpoint",
        required=True,
        type=local,
        help="weights (ema_*.pt), here or elsewhere (gs://…), or a run's folder",
    )
    for flag, convert, meaning in (
        ("--schedule", str, "bridge of the checkpoint; needed where the file does not record it"),
        ("--stochastic", cli.parse_bool, "whether its encoder is stochastic; checked against it"),
        ("--end_data", float, "σ_T for sampling, in place of the checkpoint's"),
    ):
        made.add_argument(
            flag,
            type=convert,
            help=f"{meaning} (default: what the checkpoint says)",
            default=argparse.SUPPRESS,
            choices=SCHEDULES if flag == "--schedule" else None,
            metavar="true|false" if convert is cli.parse_bool else None,
        )
    made.add_argument("--device", default="auto", choices=DEVICES, help="(default: auto)")
    made.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        help="arithmetic of the networks; auto: bf16 where the device is made for it, else fp32 "
        "(default: fp32, in which an image's figures do not depend on its batch)",
    )
    cli.add_switch(made, "--compile", "compile the networks at the start, torch.compile")
    cli.add_flags(made, config)
    return made


@contextlib.contextmanager
def loaded(options: argparse.Namespace) -> Iterator[tuple[DBAE, Context]]:
    """Join the other processes and load the model that the parsed options name."""
    names = ("schedule", "stochastic", "end_data")
    overrides = {name: getattr(options, name) for name in names if hasattr(options, name)}
    with join(options.device, timeout_s=_TIMEOUT_S) as context:
        model = load_model(options.checkpoint, context.device, **overrides)
        yield model.accelerate(options.precision, options.compile), context


def check_trained_on(model: DBAE, dataset: str) -> None:
    """Raise UserError where the checkpoint says that it was trained on another data set."""
    trained = (model.trained_on or {}).get("dataset", dataset)
    if trained != dataset:
        raise UserError(
            f"the checkpoint was trained on {trained}, not on {dataset}: say {trained} as DATASET"
        )


def probe(
    description: str | None,
    config_class: type[ProbeConfig],
    task: Task,
    arguments: Sequence[str] | None,
) -> int:
    """The entry point of a linear probe: parse, load, probe, print."""
    options = parser(description, config_class).parse_args(arguments)
    config = config_class(**cli.given(options, config_class))
    with loaded(options) as (model, context):
        if config.dataset is not None:
            check_trained_on(model, config.dataset)
        result = run(model, config, task, context, options.checkpoint)
        if result:
            print(f"\n{result.table}\n")
            print(result.folder / METRICS_FILE)
    return 0
