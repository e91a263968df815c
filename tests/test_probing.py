"""Linear probes of a model as a user runs them: their parts, their files, their mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import encode, plain, write_folder

import dbae
from dbae.checkpoint import save_weights
from dbae.distributed import Context
from dbae.errors import UserError
from dbae.evaluation import published
from dbae.evaluation.classification import Classification, ClassificationConfig
from dbae.evaluation.classifier import load_classifier
from dbae.evaluation.probes import average_precision
from dbae.evaluation.probing import Result, divide, run, why_not_comparable
from dbae.evaluation.regression import Regression, RegressionConfig

FAST = {"epochs": 2, "resamples": 20, "num_train": 150, "num_test": 40}
DEMO = {"probe_data": "demo", **FAST}


@pytest.fixture(scope="module")
def model() -> dbae.DBAE:
    torch.manual_seed(0)
    return dbae.create_model("demo", latent_dim=5).eval()


@pytest.fixture(scope="module")
def checkpoint(model: dbae.DBAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "ema_0.9999_000012.pt"
    save_weights(path, model)
    return path


def classify(model: dbae.DBAE, checkpoint: Path, **options: Any) -> Result:
    config = ClassificationConfig(**{**DEMO, **options})
    result = run(model, config, Classification(), Context(), checkpoint)
    assert result is not None
    return result


def regress(model: dbae.DBAE, checkpoint: Path, **options: Any) -> Result:
    config = RegressionConfig(**{**DEMO, **options})
    result = run(model, config, Regression(), Context(), checkpoint)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def both(model: dbae.DBAE, checkpoint: Path) -> Result:
    return classify(model, checkpoint, compare=("pixels", "pca", "untrained"))


def test_the_folder_has_the_published_name_for_the_published_data() -> None:
    for config, name in (
        (ClassificationConfig(), "multitask_ema"),
        (RegressionConfig(), "regression_ema"),
        (ClassificationConfig(probe_data="demo"), "multitask_ema_demo"),
    ):
        folder = config.output_folder(Path("run/ema_0.9999_980000.pt"))
        assert folder == Path("run/sample_980000/downstream_inference") / name
    live = ClassificationConfig().output_folder(Path("run/model_980000.pt"))
    assert live.name == "multitask_model"
    assert ClassificationConfig(output_dir="there").output_folder(Path("x.pt")) == Path("there")


def test_every_method_meets_both_probes_on_the_same_images(both: Result) -> None:
    rows = both.metrics["rows"]
    methods = ["DBAE", "raw pixels (32×32)", "PCA, 5 components", "untrained encoder"]
    assert [row["method"] for row in rows] == [m for m in methods for _ in range(2)]
    assert [row["probe"] for row in rows] == ["paper", "converged"] * 4
    assert [row["dim"] for row in rows[::2]] == [5, 3 * 32 * 32, 5, 5]
    assert len({(row["n_train"], row["n_valid"], row["n_test"]) for row in rows}) == 1
    assert rows[0]["n_train"] + rows[0]["n_valid"] == 150 and rows[0]["n_test"] == 40
    for row in rows:
        assert row["ap"]["low"] <= row["ap"]["value"] <= row["ap"]["high"]


def test_the_figures_are_those_of_the_saved_classifier(
    model: dbae.DBAE, checkpoint: Path, both: Result
) -> None:
    classifier = load_classifier(both.folder / "best.pt", 5)
    assert classifier.names == dbae.data.demo.ATTRIBUTES
    parts = divide(ClassificationConfig(**DEMO), Classification(), 32, Context())
    images = torch.stack([parts.test.dataset[i].image for i in parts.test.rows])
    with torch.no_grad():
        z = model.encode(dbae.data.to_model_range(images))
    scores = classifier.scores(z).numpy()
    ones = np.ones((1, len(z)))
    found = average_precision(scores, parts.test.values, ones)[0]
    stored = [entry["ap"]["value"] for entry in both.metrics["rows"][0]["attributes"]]
    np.testing.assert_allclose(found, stored, atol=1e-6)
    assert classifier.score_std is not None
    np.testing.assert_allclose(classifier.score_std, scores.std(0), rtol=1e-4)


def test_the_whole_protocol_stands_beside_the_figures(
    model: dbae.DBAE, checkpoint: Path, both: Result
) -> None:
    stored = json.loads((both.folder / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(both.metrics))
    protocol = stored["protocol"]
    assert protocol["checkpoint"] == checkpoint.name and len(protocol["checkpoint_sha256"]) == 64
    assert (protocol["ema"], protocol["latent"], protocol["seed"]) == (0.9999, "deterministic", 0)
    assert protocol["parts"]["test"]["n_used"] == 40
    assert protocol["versions"]["scikit-learn"]
    text = (both.folder / "test.txt").read_text()
    assert text == both.table + "\n"
    for words in (
        "EMA 0.9999", "seed 0", "20 resamples of the 40 test images", "32×32 pixels", "2 epochs",
        "held out of train", "knowing nothing: AP", "TAD",
    ):  # fmt: skip
        assert words in text


def test_published_rows_stand_only_beside_a_probe_like_the_papers(both: Result) -> None:
    assert both.metrics["published"] == []
    assert "published" not in both.table
    parts = divide(ClassificationConfig(**DEMO), Classification(), 32, Context())
    for options, k, reason in (
        ({}, 11, None),
        ({}, 40, "for 11 of 40 attributes"),
        ({"num_test": 5}, 11, "on a part of the images only"),
        ({"protocol": "converged"}, 11, "without the paper's recipe"),
    ):
        usual = {"usual_data": "demo", "usual_attributes": k}
        kind = type("OfTheDemoSet", (ClassificationConfig,), usual)
        assert why_not_comparable(parts, kind(probe_data="demo", **options)) == reason
    rows = published.probe_rows("ap")
    assert {"trained_on": "FFHQ", "method": "DBAE", "ap": 0.664} in rows
    assert len(rows) == 16 and len(published.RECONSTRUCTIONS) == 11


def test_the_same_command_gives_the_same_figures(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path
) -> None:
    first, again = (
        classify(model, checkpoint, output_dir=str(tmp_path / name)).metrics for name in "ab"
    )
    assert first == again
    other = classify(model, checkpoint, output_dir=str(tmp_path / "c"), seed=1).metrics
    assert other["rows"][0]["ap"] != first["rows"][0]["ap"]


def test_no_image_and_flip_is_encoded_twice(model: dbae.DBAE, tmp_path: Path) -> None:
    path = tmp_path / "model_000001.pt"
    save_weights(path, model)
    seen = 0

    def count(_: object, inputs: tuple[torch.Tensor], __: object) -> None:
        nonlocal seen
        seen += len(inputs[0])

    hook = model.encoder.register_forward_hook(count)
    try:
        classify(model, path)
        assert seen == 2 * 150 + 40  # training images and their mirror images, test images
        classify(model, path, protocol="converged")
        regress(model, path)
        assert seen == 2 * 150 + 40
    finally:
        hook.remove()


def test_one_protocol_alone_leaves_the_other_out(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path
) -> None:
    paper = classify(model, checkpoint, protocol="paper", output_dir=str(tmp_path / "p"))
    assert [row["probe"] for row in paper.metrics["rows"]] == ["paper"]
    assert sorted(p.name for p in paper.folder.iterdir()) == ["best.pt", "metrics.json", "test.txt"]
    assert "Adam" in paper.table and "penalty" not in paper.table
    # In the same folder: nothing of the earlier run stays beside the new figures.
    converged = classify(model, checkpoint, protocol="converged", output_dir=str(tmp_path / "p"))
    assert [row["probe"] for row in converged.metrics["rows"]] == ["converged"]
    names = ["logistic.pt", "metrics.json", "test.txt"]
    assert sorted(p.name for p in converged.folder.iterdir()) == names
    assert "Adam" not in converged.table and "penalty λ of DBAE, by validation" in converged.table


def test_a_stochastic_encoders_mean_and_sample_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dbae.create_model("demo", latent_dim=3, stochastic=True).eval()
    path = tmp_path / "ema_0.9999_000001.pt"
    save_weights(path, model)
    sample, mean = (classify(model, path, latent=latent).metrics for latent in ("sample", "mean"))
    assert sample["protocol"]["latent"] == "sample" and mean["protocol"]["latent"] == "mean"
    assert sample["rows"][1]["ap"] != mean["rows"][1]["ap"]


def test_regression_names_the_last_and_the_best_epoch_and_stands_on_ridge(
    model: dbae.DBAE, checkpoint: Path
) -> None:
    result = regress(model, checkpoint)
    rows = {row["probe"]: row for row in result.metrics["rows"]}
    assert list(rows) == ["paper, last epoch", "paper, best epoch", "ridge"]
    assert rows["paper, last epoch"]["epoch"] == 2
    history = rows["paper, last epoch"]["history"]
    best = min(history, key=lambda row: row["valid_mse"])
    assert rows["paper, best epoch"]["epoch"] == best["epoch"]
    assert result.metrics["base_rate"]["mse"] > 0
    names = [entry["name"] for entry in rows["ridge"]["attributes"]]
    assert names == list(dbae.data.demo.FACTORS)
    assert (result.folder / "ridge.pt").exists() and (result.folder / "best.pt").exists()


def lfw(path: Path) -> Path:
    """LFW's layout with 60 people of two images each, whose grey level is their attribute."""
    rows, files = [], {}
    lists: dict[str, list[str]] = {"peopleDevTrain.txt": [], "peopleDevTest.txt": []}
    for i in range(60):
        name = f"Person_{i:02d}"
        lists["peopleDevTrain.txt" if i % 3 else "peopleDevTest.txt"].append(f"{name}\t2\n")
        for number in (1, 2):
            level = 4 * i + number
            image = encode(Image.new("RGB", (32, 32), (level, level, level)), "PNG")
            files[f"lfw_funneled/{name}/{name}_{number:04d}.jpg"] = image
            if (i, number) != (1, 2):  # an image without a row
                rows.append(f"Person {i:02d}\t{number}\t{level / 100}\t{-level}\n")
    head = "# lfw_attributes.txt\n#\tperson\timagenum\tBright\tDark\n"
    for file, people in lists.items():
        files[file] = f"{len(people)}\n{''.join(people)}".encode()
    return write_folder(path, {**files, "lfw_attributes.txt": (head + "".join(rows)).encode()})


def test_lfw_is_probed_on_people_who_are_never_in_two_parts(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"probe_data": "lfw", "data_dir": str(lfw(tmp_path)), "num_train": 0, "num_test": 0}
    parts = divide(RegressionConfig(**options), Regression(), 32, Context())
    people = [set(part.groups) for part in parts]
    assert sum(map(len, people)) == len(set.union(*people)) == 60
    assert people[2] == {f"Person_{i:02d}" for i in range(0, 60, 3)}
    assert sum(map(len, parts)) == 119
    note = "1 of 80 images of train have no row in lfw_attributes.txt and are left out"
    assert note in capsys.readouterr().out
    result = regress(model, checkpoint, **options)
    assert result.folder.name == "regression_ema"
    rows = {row["probe"]: row for row in result.metrics["rows"]}
    # Brightness is what an encoder, even an untrained one, shows best.
    assert rows["ridge"]["pearson_r"]["value"] > 0.9
    assert "this probe is for 2 of 73 attributes" in result.table


def labelled_folder(path: Path, constant: bool = False) -> Path:
    """120 images of 40 people in three colours, with two attributes that the colour tells."""
    names = [f"{i:03d}.png" for i in range(120)]
    people = "".join(f"{name} person {i // 3}\n" for i, name in enumerate(names))
    rows = [f"{name} {1 if i % 2 else -1} {1 if constant or i // 2 % 2 else -1}"
            for i, name in enumerate(names)]  # fmt: skip
    text = "\n".join(["120", "Odd Second", *rows])
    images = {name: plain(i) for i, name in enumerate(names)}
    files = {**images, "identity.txt": people.encode(), "list_attr.txt": text.encode()}
    return write_folder(path, files)


def test_a_folder_with_an_attribute_file_is_probed_by_people(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path
) -> None:
    path = labelled_folder(tmp_path / "faces")
    options = {"probe_data": "folder", "data_dir": str(path), "num_train": 0, "num_test": 0}
    config = ClassificationConfig(**options)
    parts = divide(config, Classification(), 32, Context())
    people = [set(part.groups) for part in parts]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert sum(map(len, people)) == 40
    result = classify(model, checkpoint, **options)
    test = result.metrics["protocol"]["parts"]["test"]
    assert f"of the {test['people']} test people" in result.table
    assert [entry["name"] for entry in result.metrics["rows"][0]["attributes"]] == ["Odd", "Second"]


def test_validation_people_are_held_out_of_train_where_no_split_is() -> None:
    config = ClassificationConfig(probe_data="demo", num_train=2000, num_test=10)
    parts = divide(config, Classification(), 32, Context())
    assert len(parts.train) + len(parts.valid) == 2000
    assert 150 < len(parts.valid) < 250
    assert not set(parts.train.groups) & set(parts.valid.groups)
    assert parts.test.dataset.split == "test"


def test_a_constant_attribute_is_left_out_and_said(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = labelled_folder(tmp_path / "faces", constant=True)
    options = {"probe_data": "folder", "data_dir": str(path), "num_train": 0, "num_test": 0}
    result = classify(model, checkpoint, **options)
    assert "attribute Second is left out: is yes for all" in capsys.readouterr().out
    assert [entry["name"] for entry in result.metrics["left_out"]] == ["Second"]
    assert "left out: Second is yes for all" in result.table
    capsys.readouterr()
    with pytest.raises(UserError, match=r"no attribute of .* can be probed: Second is yes for all"):
        classify(model, checkpoint, **options, attributes=("Second",))
    assert "latents" not in capsys.readouterr().out  # known before any image is encoded


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        classify(model, checkpoint, output_dir=str(tmp_path / "file" / "folder"))
    assert "latents" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": ("hat", "moustache")}, "'moustache' is not in demo; choose from glasses"),
        ({"compare": ("pixel",)}, "--compare 'pixel' is unknown; choose from pixels, pca"),
        ({"protocol": "quick"}, "--protocol 'quick' is unknown; choose one of paper, converged"),
        ({"resamples": 5}, "--resamples 5 must be 0 or at least 20"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"lr": 0.0}, "--lr 0.0 must be positive"),
        ({"probe_data": "celeba", "data_dir": "/nowhere"}, "/nowhere does not exist"),
        ({"probe_data": "lfw", "data_dir": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(
    model: dbae.DBAE, checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        classify(model, checkpoint, **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)
