"""The flags of the evaluations: one comes or goes only together with this list."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from dbae.cli import parser
from dbae.evaluation import command
from dbae.evaluation.classification import ClassificationConfig
from dbae.evaluation.interpolation import InterpolationConfig
from dbae.evaluation.manipulation import ManipulationConfig
from dbae.evaluation.reconstruction import ReconstructionConfig
from dbae.evaluation.regression import RegressionConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["checkpoint", "schedule", "stochastic", "end_data", "device", "precision", "compile"]
SAMPLING = [
    "batch_size", "sampler", "steps", "rho", "churn", "guidance", "eta", "order", "latent", "seed",
    "bad_images", "output_dir",
]  # fmt: skip
PICTURES = ["dataset", "data_dir", "split", "images", "indices"]
PROBE = [
    "dataset", "probe_data", "data_dir", "labels", "attributes", "protocol", "latent", "flip",
    "epochs", "lr", "probe_batch_size", "num_train", "num_test", "compare", "resamples", "seed",
    "batch_size", "bad_images", "output_dir",
]  # fmt: skip
FLAGS = {
    ReconstructionConfig: [
        *SAMPLING, "dataset", "data_dir", "split", "num_samples", "weights_dir",
        "reference_compat", "baselines",
    ],
    InterpolationConfig: [*SAMPLING, *PICTURES, "points", "mode"],
    ManipulationConfig: [
        *SAMPLING, *PICTURES, "classifier", "attributes", "scales", "recompute_x_T",
        "num_measured",
    ],
    ClassificationConfig: PROBE,
    RegressionConfig: PROBE,
}  # fmt: skip


@pytest.mark.parametrize("config", FLAGS)
def test_the_list_of_flags_is_deliberate(config: type) -> None:
    made = command.parser("", config)
    names = [action.dest for action in made._actions if action.dest != "help"]
    assert names == [*MODEL, *FLAGS[config]]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "dbae_encode.py",
            [*MODEL, "dataset", "data_dir", "split", "num_samples", "flip", "store_labels",
             "labels", "batch_size", "bad_images", "output_dir"],
        ),
        ("dbae_report.py", ["run_dir", "output"]),
        (
            "dbae_reproduce.py",
            ["checkpoints", "celeba_dir", "celebahq_dir", "lfw_dir", "weights_dir", "limit",
             "dry_run"],
        ),
    ],
)  # fmt: skip
def test_entry_points_have_these_flags_alone(
    script: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    seen: list[list[str]] = []

    class Stop(Exception):
        pass

    def note(self: object, *_: object) -> None:
        seen.append([action.dest for action in self._actions if action.dest != "help"])  # type: ignore[attr-defined]
        raise Stop

    monkeypatch.setattr(type(parser("")), "parse_args", note)
    with pytest.raises(Stop):
        main([])
    assert seen == [expected]
