"""Manipulation: the step in z, the classifier's file, the strips, and what edits are measured."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dbae
from dbae.data import ImageDataset, open_dataset, to_model_range, to_uint8
from dbae.errors import UserError
from dbae.evaluation.classifier import (
    AttributeClassifier,
    find_classifier,
    load_classifier,
    save_classifier,
)
from dbae.evaluation.manipulation import (
    CONTROL,
    Edit,
    ManipulationConfig,
    Strip,
    edited,
    effects,
    manipulate,
    mean_distance,
    plan,
    random_directions,
    write,
)
from dbae.evaluation.pictures import Picture, read_pictures
from dbae.evaluation.reconstruction import reconstruct_images

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dbae_manipulation.py"
CONFIG = ManipulationConfig(steps=1, batch_size=3)
NAMES = ("hat", "beard", "long hair")


@pytest.fixture(scope="module")
def classifier() -> AttributeClassifier:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    std = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return AttributeClassifier(weight, torch.tensor([0.1, 0.0, -0.1]), NAMES, std, {"epochs": 15})


@pytest.fixture(scope="module")
def demo() -> ImageDataset:
    return open_dataset("demo", None, 32, "test")


@pytest.fixture(scope="module")
def inputs(demo: ImageDataset) -> list[Picture]:
    return read_pictures(ManipulationConfig(indices=(0, 1)), 32, demo)


def plain_classifier(path: Path, rows: int, columns: int = 4) -> Path:
    torch.save(OrderedDict(weight=torch.randn(rows, columns), bias=torch.zeros(rows)), path)
    return path


def run_script(*flags: object) -> int:
    return runpy.run_path(str(SCRIPT))["main"]([str(flag) for flag in flags])


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# The classifier -----------------------------------------------------------------------------


def test_a_classifier_comes_back_as_it_was_saved(
    classifier: AttributeClassifier, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "best.pt", classifier)
    back = load_classifier(tmp_path / "best.pt", 4)
    assert torch.equal(back.weight, classifier.weight) and torch.equal(back.bias, classifier.bias)
    assert back.names == NAMES and back.facts == {"epochs": 15}
    assert back.score_std is not None and back.score_std.tolist() == [1, 2, 3]
    linear = torch.nn.Linear(4, 3)  # others read it as what it is
    linear.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    z = torch.randn(2, 4)
    assert torch.allclose(back.scores(z), linear(z))
    bare = dataclasses.replace(classifier, score_std=None, facts={})
    save_classifier(tmp_path / "bare.pt", bare)
    assert load_classifier(tmp_path / "bare.pt", 4).score_std is None


def test_a_plain_file_of_40_rows_has_celebas_names_and_others_numbers(tmp_path: Path) -> None:
    celeba = load_classifier(plain_classifier(tmp_path / "a.pt", 40), 4)
    assert (celeba.names[20], celeba.names[39]) == ("Male", "Young")
    assert celeba.index("Male") == celeba.index("male") == celeba.index("20") == 20
    other = load_classifier(plain_classifier(tmp_path / "b.pt", 2), 4)
    assert other.names == ("attribute 0", "attribute 1")


def test_directions_are_unit_vectors_up_the_score(classifier: AttributeClassifier) -> None:
    w = classifier.direction(1)
    assert float(w.norm()) == pytest.approx(1)
    z = torch.randn(1, 4)
    gain = classifier.scores(z + w) - classifier.scores(z)
    assert float(gain[0, 1]) == pytest.approx(float(classifier.weight[1].norm()), rel=1e-4)
    without = dataclasses.replace(classifier, weight=torch.zeros(3, 4))
    with pytest.raises(UserError, match="beard are all zero"):
        without.direction(1)


def test_unusable_classifiers_are_one_clear_line(checkpoint: Path, tmp_path: Path) -> None:
    good = plain_classifier(tmp_path / "good.pt", 3)
    torch.save({"weight": torch.full((3, 4), torch.nan), "bias": torch.zeros(3)}, tmp_path / "n.pt")
    torch.save({"weight": torch.zeros(3, 4), "bias": torch.zeros(4)}, tmp_path / "bias.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for path, latent_dim, complaint in (
        (good, 512, "reads z of 4 numbers, the model's z has 512"),
        (tmp_path / "absent.pt", 4, r"absent\.pt does not exist"),
        (checkpoint, 4, r"weight \(k, d\) and bias \(k\)"),
        (tmp_path / "bias.pt", 4, r"bias \(4,\)"),
        (tmp_path / "list.pt", 4, "holds a list"),
        (tmp_path / "n.pt", 4, "not finite"),
        (tmp_path / "text.pt", 4, "not a readable PyTorch"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            load_classifier(path, latent_dim)
        assert "\n" not in str(error.value)


def test_the_classifier_beside_the_checkpoint_is_found(model: dbae.DBAE, tmp_path: Path) -> None:
    weights = tmp_path / "ema_0.9999_000012.pt"
    folder = tmp_path / "sample_12" / "downstream_inference"

    def made(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        (folder / name / "best.pt").write_bytes(b"")
        return folder / name / "best.pt"

    with pytest.raises(UserError, match=r"bash infer_class_dbae\.sh celeba vp .*000012\.pt true"):
        find_classifier(weights, "celeba", model.config)
    other = made("multitask_ema_demo")
    assert find_classifier(weights, "demo", model.config) == other
    made("multitask_live")
    with pytest.raises(UserError, match=r"several.*multitask_ema_demo, multitask_live"):
        find_classifier(weights, "demo", model.config)
    usual = made("multitask_ema")
    assert find_classifier(weights, "demo", model.config) == usual


# Which edits --------------------------------------------------------------------------------


def test_the_published_edits_are_celebas_default(tmp_path: Path) -> None:
    celeba = load_classifier(plain_classifier(tmp_path / "a.pt", 40), 4)
    assert plan(CONFIG, 2, celeba) == ([Edit(0, 20, 0.3), Edit(1, 39, 0.2)], None)
    assert plan(CONFIG, 1, celeba)[0] == [Edit(0, 20, 0.3), Edit(0, 39, 0.2)]
    assert plan(CONFIG, 3, celeba)[0] == [Edit(i, 20, 0.3) for i in range(3)]


def test_what_is_given_once_is_used_for_all(classifier: AttributeClassifier) -> None:
    edits, note = plan(CONFIG, 2, classifier)
    assert edits == [Edit(0, 0, 0.3), Edit(1, 1, 0.3)]
    assert note is not None and "hat and beard" in note and "±0.3" in note
    config = dataclasses.replace(CONFIG, attributes=("Long hair",), scales=(0.1, 0.2))
    assert plan(config, 2, classifier) == ([Edit(0, 2, 0.1), Edit(1, 2, 0.2)], None)
    config = dataclasses.replace(CONFIG, attributes=("0", "beard"))
    assert plan(config, 1, classifier)[0] == [Edit(0, 0, 0.3), Edit(0, 1, 0.3)]
    single = dataclasses.replace(classifier, weight=classifier.weight[:1], names=("hat",))
    assert plan(CONFIG, 2, single)[0] == [Edit(0, 0, 0.3), Edit(1, 0, 0.3)]
    for wrong, inputs, complaint in (
        ({"attributes": ("hat", "beard")}, 3, "2 attributes for 3 edits: give one, or 3"),
        ({"scales": (0.1, 0.2)}, 3, "2 scales for 3"),
        ({"attributes": ("hat",) * 3}, 2, "2 images for 3"),
        ({"attributes": ("wig",)}, 1, "'wig' is unknown.*hat, beard, long hair"),
        ({"attributes": ("3",)}, 1, "'3' is unknown; choose a number from 0 to 2"),
    ):
        with pytest.raises(UserError, match=complaint):
            plan(dataclasses.replace(CONFIG, **wrong), inputs, classifier)


# Pictures -----------------------------------------------------------------------------------


def test_the_step_is_the_papers_formula() -> None:
    z, w = torch.randn(2, 16), torch.nn.functional.normalize(torch.randn(16), dim=0)
    moved = edited(z, w, -0.3)
    assert torch.allclose(moved, z - 0.3 * 4 * w)
    assert Edit(0, 0, 0.2).scales() == [-0.2, -0.1, 0.0, 0.1, 0.2]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_middle_is_the_reconstruction_and_x_T_is_kept_or_recomputed(
    model: dbae.DBAE, inputs: list[Picture], classifier: AttributeClassifier, recompute: bool
) -> None:
    config = dataclasses.replace(CONFIG, recompute_x_T=recompute, churn=0.5, latent="mean")
    edits = [Edit(0, 0, 0.3), Edit(1, 2, 20.0)]
    result = manipulate(model, inputs, classifier, edits, config, progress=False)
    x0 = to_model_range(torch.stack([given.pixels for given in inputs]))
    images, x_T, _ = reconstruct_images(model, x0, config, range(2))
    with torch.no_grad():
        z = model.encode(x0, mean=True)
        far = model.endpoint(edited(z[1:], classifier.direction(2), 20.0))
    for i, strip in enumerate(result.strips):
        assert (strip.images[2].int() - to_uint8(images[i]).int()).abs().max() <= 1
        assert (strip.x_T[2].int() - to_uint8(x_T[i]).int()).abs().max() <= 1
        assert not torch.equal(strip.images[0], strip.images[4])
    last = result.strips[1].x_T[4].int()
    if recompute:
        assert (last - to_uint8(far[0]).int()).abs().max() <= 1
        assert (last - result.strips[1].x_T[2].int()).abs().max() > 10
    else:
        assert (result.strips[1].x_T.int() - last).abs().max() <= 1
    assert ("kept" in result.metrics["protocol"]["x_T"]) is not recompute


def test_strips_are_named_by_their_image_and_where_needed_their_attribute(
    model: dbae.DBAE, inputs: list[Picture], classifier: AttributeClassifier, tmp_path: Path
) -> None:
    named = [dataclasses.replace(inputs[0], name=name) for name in ("a/me.png", "you.jpg")]
    edits = [Edit(0, 0, 0.1), Edit(0, 2, 0.1), Edit(0, 2, 0.2), Edit(1, 2, 0.1)]
    result = manipulate(model, named, classifier, edits, CONFIG, progress=False)
    (tmp_path / "old_manipulated_x0.png").write_bytes(b"")
    written = write(result, tmp_path)
    stems = ["me_hat", "me_long_hair_1", "me_long_hair_2", "you"]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json"} | {
        f"{stem}_manipulated_{kind}.png" for stem in stems for kind in ("x0", "xT")
    }
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    for stem in stems:
        assert Image.open(tmp_path / f"{stem}_manipulated_x0.png").size == (172 * 3, 36 * 3)
    metrics = stored(tmp_path)
    assert metrics["measured"] is None and metrics["kind"] == "manipulation"
    described = metrics["edits"][2]
    assert described["image"] == "a/me.png" and described["attribute"] == "long hair"
    assert described["scales"] == [-0.2, -0.1, 0.0, 0.1, 0.2]
    assert described["file"] == "me_long_hair_2_manipulated_x0.png"
    assert len(described["probability"]) == 5 and described["change"][2] == 0
    with torch.no_grad():
        z = model.encode(to_model_range(result.strips[2].images), mean=True)
    scores = classifier.scores(z)[:, 2]
    assert described["probability"] == pytest.approx(scores.sigmoid().tolist(), abs=1e-4)
    change = (scores - scores[2]) / 3
    assert described["change"] == pytest.approx(change.tolist(), abs=1e-4)


# Measured edits -----------------------------------------------------------------------------


def test_effects_of_a_known_move(classifier: AttributeClassifier) -> None:
    std = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    w = classifier.direction(1).double()
    before = torch.randn(5, 4, dtype=torch.float64)
    found = effects(classifier, 1, -1, w, before, before - 0.7 * w, std)
    length = float(classifier.weight[1].norm())
    assert found.target.tolist() == pytest.approx([0.7 * length / 2] * 5, rel=1e-5)
    assert found.orthogonal.abs().max() < 1e-6
    slopes = (classifier.weight.double() @ w / std).abs()
    assert found.others is not None
    assert found.others.tolist() == pytest.approx([0.7 * float(slopes[[0, 2]].mean())] * 5)
    scores = classifier.scores(before)[:, 1]
    assert found.flipped_before.tolist() == (scores < 0).tolist()
    assert found.flipped.tolist() == (scores < 0.7 * length).tolist()

    beside = torch.linalg.svd(w[None])[2][1]  # a unit vector orthogonal to w
    aside = effects(classifier, 1, 1, w, before, before + 2 * w + 0.5 * beside, std)
    assert aside.orthogonal.tolist() == pytest.approx([0.5] * 5, abs=1e-5)
    alone = AttributeClassifier(classifier.weight[:1], classifier.bias[:1], ("hat",))
    assert effects(alone, 0, 1, w, before, before, std[:1]).others is None


def test_the_control_takes_another_direction_for_each_image() -> None:
    directions = random_directions(torch.zeros(400, 8), seed=0)
    assert directions.norm(dim=1).tolist() == pytest.approx([1] * 400, abs=1e-5)
    assert (directions.T @ directions / 400 - torch.eye(8) / 8).abs().max() < 0.03  # uniform
    assert torch.equal(random_directions(torch.zeros(5, 8), seed=0), directions[:5])
    assert not torch.allclose(random_directions(torch.zeros(5, 8), seed=1), directions[:5])


def test_the_mean_distance_is_over_all_pairs() -> None:
    z = torch.randn(300, 3, dtype=torch.float64)  # more than a block of rows
    pairs = torch.nn.functional.pdist(z)
    assert mean_distance(z) == pytest.approx(float(pairs.mean()))


def test_measured_rows_are_what_the_edits_do(
    model: dbae.DBAE, demo: ImageDataset, inputs: list[Picture], classifier: AttributeClassifier
) -> None:
    config = dataclasses.replace(CONFIG, num_measured=4, latent="mean", recompute_x_T=True)
    edits = [Edit(0, 1, 0.5), Edit(1, 1, 0.5), Edit(0, 0, 0.2)]  # of the first two one row
    result = manipulate(model, inputs, classifier, edits, config, dataset=demo, progress=False)
    measured = result.metrics["measured"]
    assert measured["n"] == 4
    rows = measured["rows"]
    assert [(row["attribute"], row["scale"]) for row in rows] == [
        ("beard", 0.5), ("beard", -0.5), ("hat", 0.2), ("hat", -0.2), (CONTROL, 0.5),
        (CONTROL, -0.5),
    ]  # fmt: skip
    assert rows[4]["judged"] == "beard"

    x0 = to_model_range(torch.stack([demo[i].image for i in range(4)]))

    def made(z: torch.Tensor) -> torch.Tensor:
        return to_uint8(model.sample(z, sampler="euler", steps=1).images)

    with torch.no_grad():
        z = model.encode(x0, mean=True)
        images = [made(z), made(edited(z, classifier.direction(1), -0.5))]
        scores = [
            classifier.scores(model.encode(to_model_range(x), mean=True)).double() for x in images
        ]
        std = classifier.scores(z).double().std(0)
    change = (scores[1] - scores[0]) / std
    row = rows[1]
    mean, stderr = float(-change[:, 1].mean()), float(change[:, 1].std()) / 2
    assert row["target"] == pytest.approx(
        {"value": mean, "low": mean - 1.96 * stderr, "high": mean + 1.96 * stderr}, abs=2e-3
    )
    others = float(change[:, [0, 2]].abs().mean())
    assert row["others"]["value"] == pytest.approx(others, abs=2e-3)
    assert row["flipped"]["value"] == float((scores[1][:, 1] < 0).double().mean())
    pixels = (images[1].double() - images[0].double()).div(255).square().mean()
    assert row["pixel_mse"]["value"] == pytest.approx(float(pixels), rel=1e-2)
    share = row["flipped"]
    assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1
    assert share["high"] - share["low"] > 0.4  # four images say little, even if unanimous
    protocol = result.metrics["protocol"]
    assert protocol["dataset"]["split"] == "test" and protocol["replaced"] == []
    assert "same encoder" in protocol["judge"] and "random" in protocol["measured"]["control"]
    assert CONTROL in result.table and "4 images" in result.table
    json.dumps(result.metrics, allow_nan=False)


def test_neither_batches_nor_more_images_change_an_images_noise(
    model: dbae.DBAE, demo: ImageDataset, inputs: list[Picture], classifier: AttributeClassifier
) -> None:
    def rows(batch_size: int, seed: int = 0) -> list[dict[str, Any]]:
        config = dataclasses.replace(
            CONFIG, num_measured=5, batch_size=batch_size, churn=0.3, seed=seed
        )
        edits = [Edit(0, 0, 0.4)]
        result = manipulate(model, inputs, classifier, edits, config, dataset=demo, progress=False)
        return result.metrics["measured"]["rows"]

    for a, b in zip(rows(2), rows(5), strict=True):
        assert a["target"]["value"] == pytest.approx(b["target"]["value"], abs=5e-3)
        assert a["pixel_mse"]["value"] == pytest.approx(b["pixel_mse"]["value"], rel=1e-2)
    assert rows(5)[2]["target"] != rows(5, seed=1)[2]["target"]


def test_measuring_needs_images_that_differ(
    model: dbae.DBAE, inputs: list[Picture], classifier: AttributeClassifier, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, num_measured=9, latent="mean")
    edits = [Edit(0, 0, 0.1)]
    for i, complaint in enumerate(
        ("has only 1 image", "hat, beard, long hair is the same for all 2 images")
    ):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
        few = open_dataset("folder", str(tmp_path), 32, "all")
        with pytest.raises(UserError, match=complaint):
            manipulate(model, inputs, classifier, edits, config, dataset=few, progress=False)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "2.png")
    few = open_dataset("folder", str(tmp_path), 32, "all")
    result = manipulate(model, inputs, classifier, edits, config, dataset=few, progress=False)
    assert result.metrics["measured"]["n"] == 3
    assert "the split has no more images" in result.table


# The command --------------------------------------------------------------------------------


def test_the_command_twice_gives_identical_files(
    checkpoint: Path, classifier: AttributeClassifier, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    best = checkpoint.parent / "sample_12" / "downstream_inference" / "multitask_ema" / "best.pt"
    best.parent.mkdir(parents=True)
    save_classifier(best, classifier)
    flags = ["--dataset", "demo", "--schedule", "vp", "--checkpoint", checkpoint]
    flags += ["--churn", "0.33", "--guidance", "1", "--split", "test", "--rho", "7"]
    flags += ["--sampler", "heun", "--steps", "1", "--stochastic", "true", "--num_measured", "3"]
    flags += ["--device", "cpu", "--scales", "0.3,0.25"]
    assert run_script(*flags) == 0
    folder = checkpoint.parent / "sample_12" / "manipulation_heun_7.0_1_w=1.0_churn=0.33"
    assert run_script(*flags, "--output_dir", tmp_path) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "img3_manipulated_x0.png", "img3_manipulated_xT.png", "img4_manipulated_x0.png",
        "img4_manipulated_xT.png", "metrics.json",
    }  # fmt: skip
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    metrics = stored(folder)
    assert [edit["scales"][4] for edit in metrics["edits"]] == [0.3, 0.25]
    about = metrics["protocol"]["classifier"]
    assert about["file"] == "best.pt" and len(about["sha256"]) == 64
    out = capsys.readouterr().out
    assert "img4.png is 256×256" in out and "hat and beard" in out and CONTROL in out
    assert str(tmp_path / "img3_manipulated_x0.png") in out


def test_mistakes_are_one_clear_line(
    checkpoint: Path, classifier: AttributeClassifier, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "best.pt", classifier)
    base = ["--checkpoint", checkpoint, "--device", "cpu", "--steps", "1"]
    base += ["--classifier", tmp_path / "best.pt"]
    for flags, complaint in (
        (["--attributes", "Male"], "'Male' is unknown.*hat, beard, long hair"),
        (["--classifier", plain_classifier(tmp_path / "w.pt", 3, 7)], "z of 7 numbers.* has 4"),
        (["--classifier", tmp_path / "none.pt"], r"none\.pt does not exist"),
        (["--images", tmp_path / "none.png"], r"none\.png cannot be read"),
        (["--scales", "0.3,x"], "expected numbers separated by commas, found '0.3,x'"),
        (["--scales", "0"], "--scales 0.0 must be positive"),
        (["--scales", "nan"], "--scales nan must be positive"),
        (["--num_measured", "1"], "--num_measured 1 must be 0 or at least 2"),
        (["--num_measured", "-2"], "--num_measured -2"),
        (["--num_measured", "2", "--split", "holdout"], "holdout"),
        (["--dataset", "imagenet", "--indices", "1"], "imagenet"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            run_script(*base, *flags)
        assert "\n" not in str(error.value)
    assert not (
        checkpoint.parent / "sample_12" / "manipulation_euler_7.0_1_w=1.0_churn=0.0"
    ).exists()


def test_a_strip_has_five_images_of_which_the_middle_is_unedited(
    model: dbae.DBAE, inputs: list[Picture], classifier: AttributeClassifier
) -> None:
    config = dataclasses.replace(CONFIG, latent="mean")
    strips = [
        manipulate(model, inputs, classifier, [Edit(0, 0, s)], config, progress=False).strips[0]
        for s in (0.1, 0.6)
    ]
    assert all(isinstance(strip, Strip) and len(strip.images) == 5 for strip in strips)
    assert torch.equal(strips[0].images[2], strips[1].images[2])
    near, far = ((s.images[4].int() - s.images[2].int()).abs().sum() for s in strips)
    assert far > near > 0
    assert math.isclose(Edit(0, 0, 0.6).scales()[3], 0.3)
