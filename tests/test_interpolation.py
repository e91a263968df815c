"""Interpolation: the path of z, what is made of it, how smooth it is, and its files."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dbae
from dbae.checkpoint import save_weights
from dbae.data import demo, open_dataset, to_model_range, to_uint8
from dbae.errors import UserError
from dbae.evaluation.interpolation import (
    InterpolationConfig,
    between,
    interpolate,
    smoothness,
    through,
    write,
)
from dbae.evaluation.pictures import Picture, read_pictures
from dbae.evaluation.reconstruction import reconstruct_images

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dbae_interpolation.py"
CONFIG = InterpolationConfig(points=3, steps=1, batch_size=2)


@pytest.fixture(scope="module")
def inputs() -> list[Picture]:
    config = InterpolationConfig(indices=(0, 1, 2))
    return read_pictures(config, 32, open_dataset("demo", None, 32, "test"))


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def run_script(*flags: object) -> int:
    return runpy.run_path(str(SCRIPT))["main"]([str(flag) for flag in flags])


# The path of z ------------------------------------------------------------------------------


def test_the_straight_path_is_the_papers_formula_with_exact_ends() -> None:
    z_1, z_2 = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    path = between(z_1, z_2, 11)
    assert path.shape == (11, 6) and path.dtype == torch.float32
    for k in range(11):
        assert torch.allclose(path[k], (1 - k / 10) * z_1 + (k / 10) * z_2)
    assert torch.equal(path[0], z_1) and torch.equal(path[10], z_2)


def test_the_spherical_path_turns_and_grows_evenly_with_exact_ends() -> None:
    z_1, z_2 = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([-4.0, 4.0, 7.0])  # of length 3 and 9
    path = between(z_1, z_2, 7, "spherical")
    assert torch.allclose(path.norm(dim=1), torch.linspace(3, 9, 7), atol=1e-5)
    units = path / path.norm(dim=1, keepdim=True)
    turns = (units[:-1] * units[1:]).sum(1).double().acos()
    whole = (torch.dot(z_1, z_2) / 27).double().acos()
    assert torch.allclose(turns, (whole / 6).expand(6), atol=1e-5)
    assert torch.equal(path[0], z_1) and torch.equal(path[6], z_2)


def test_vectors_without_an_arc_are_joined_by_a_line() -> None:
    z = torch.tensor([3.0, -1.0, 2.0])
    for other in (2 * z, -z, torch.zeros(3)):
        path = between(z, other, 5, "spherical")
        assert torch.equal(path, between(z, other, 5, "linear"))


def test_a_path_through_several_images_does_not_double_the_shared_ones() -> None:
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    for mode in ("linear", "spherical"):
        path = through(z, 5, mode)
        assert path.shape == (9, 4)
        assert torch.equal(path[::4], z)
        assert torch.equal(path[4:], between(z[1], z[2], 5, mode))


# Smoothness ---------------------------------------------------------------------------------


def flat(*colours: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)


def test_smoothness_of_known_paths() -> None:
    fade = smoothness(flat((0, 0, 0), (51, 51, 51), (255, 255, 255)))
    assert fade == pytest.approx(
        {"path_length": 1.0, "direct": 1.0, "straightness": 1.0, "largest_step": 1.6}
    )
    corner = smoothness(flat((0, 0, 0), (255, 0, 0), (255, 255, 0)))
    assert corner["straightness"] == pytest.approx(2**-0.5)
    assert corner["largest_step"] == pytest.approx(1)
    assert smoothness(flat((0, 0, 0), (9, 9, 9), (0, 0, 0)))["straightness"] == 0
    still = smoothness(flat((7, 7, 7), (7, 7, 7)))
    assert still == {"path_length": 0, "direct": 0, "straightness": 1, "largest_step": 1}


# Images -------------------------------------------------------------------------------------


def test_the_ends_are_the_reconstructions(model: dbae.DBAE, inputs: list[Picture]) -> None:
    config = dataclasses.replace(CONFIG, steps=2)
    result = interpolate(model, inputs[:2], config, progress=False)
    x0 = to_model_range(torch.stack([given.pixels for given in inputs[:2]]))
    images, x_T, nfe = reconstruct_images(model, x0, config, range(2))
    for found, expected in ((result.images, images), (result.x_T, x_T)):
        assert found.shape == (3, 3, 32, 32) and found.dtype == torch.uint8
        difference = found[[0, 2]].int() - to_uint8(expected).int()
        assert difference.abs().max() <= 1
    assert result.metrics["protocol"]["nfe"] == nfe == 2
    assert (result.images[0].int() - result.images[2].int()).abs().max() > 10


def test_only_z_differs_between_the_images_of_a_churned_strip(
    model: dbae.DBAE, inputs: list[Picture]
) -> None:
    twice = [inputs[0], inputs[0]]
    config = dataclasses.replace(CONFIG, churn=0.5, steps=2, latent="mean")
    images = interpolate(model, twice, config, progress=False).images
    assert (images[0].int() - images.int()).abs().max() <= 1  # though of two batches
    drawn = interpolate(model, twice, dataclasses.replace(config, latent="sample"), progress=False)
    assert not torch.equal(drawn.z[0], drawn.z[2])
    reseeded = interpolate(model, twice, dataclasses.replace(config, seed=1), progress=False)
    assert (images.int() - reseeded.images.int()).abs().float().mean() > 1


def test_a_run_writes_strips_frames_an_animation_and_its_protocol(
    model: dbae.DBAE, inputs: list[Picture], checkpoint: Path, tmp_path: Path
) -> None:
    longer = dataclasses.replace(CONFIG, points=4)
    write(interpolate(model, inputs, longer, progress=False), tmp_path)
    result = interpolate(model, inputs, CONFIG, checkpoint=checkpoint, progress=False)
    written = write(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "interpolation_x0.png", "interpolation_xT.png", "interpolation.gif", "frames",
        "metrics.json",
    }  # fmt: skip
    assert all(path.exists() for path in written)
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [
        f"x0_{i:03d}.png" for i in range(5)
    ]
    frame = np.asarray(Image.open(tmp_path / "frames" / "x0_003.png"))
    assert np.array_equal(frame, result.images[3].permute(1, 2, 0).numpy())
    for name in ("interpolation_x0.png", "interpolation_xT.png"):
        assert Image.open(tmp_path / name).size == ((5 * 34 + 2) * 3, 36 * 3)
    with Image.open(tmp_path / "interpolation.gif") as gif:
        assert (gif.n_frames, gif.size) == (8, (96, 96))
        assert (gif.info["loop"], gif.info["duration"]) == (0, 100)

    metrics = stored(tmp_path)
    assert metrics == json.loads(json.dumps(result.metrics))
    assert metrics["kind"] == "interpolation"
    assert metrics["images"] == ["demo-50000", "demo-50001", "demo-50002"]
    segments = metrics["segments"]
    assert [(s["from"][-1], s["to"][-1]) for s in segments] == [("0", "1"), ("1", "2")]
    whole = metrics["smoothness"]
    assert whole["path_length"] == pytest.approx(sum(s["path_length"] for s in segments))
    assert 0 < whole["straightness"] <= 1 <= whole["largest_step"] and "[0, 1]" in whole["unit"]
    expected = {
        "mode": "linear", "points": 3, "checkpoint": checkpoint.name, "sampler": "euler",
        "steps": 1, "nfe": 1, "seed": 0, "latent": "sample", "ema": 0.9999,
    }  # fmt: skip
    assert {key: metrics["protocol"][key] for key in expected} == expected
    assert "straightness" in result.table and "demo-50001" in result.table


def test_a_model_that_gives_no_numbers_is_refused(inputs: list[Picture]) -> None:
    broken = dbae.create_model("demo", latent_dim=4).eval()
    torch.nn.init.constant_(broken.unet.out[-1].bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        interpolate(broken, inputs[:2], CONFIG, progress=False)


# Input images -------------------------------------------------------------------------------


def test_the_shipped_images_are_drawings_that_no_model_was_trained_on() -> None:
    for number, index in ((1, 50020), (2, 50039), (3, 50040), (4, 50094)):
        path = ROOT / "assets" / f"img{number}.png"
        drawn = demo.draw(index, 256).astype(int)
        assert np.abs(np.asarray(Image.open(path)).astype(int) - drawn).max() <= 1
        assert path.stat().st_size < 20_000


def test_an_image_of_another_size_is_cut_and_resized_and_says_so(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (250, 10, 10)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "fits.png")
    paths = (str(tmp_path / "wide.png"), str(tmp_path / "fits.png"))
    cut, fits = read_pictures(InterpolationConfig(images=paths), 32)
    assert cut.note == "wide.png is 80×40: cut to its centred square and resized to 32×32"
    assert cut.pixels.shape == (3, 32, 32) and (cut.pixels[0] == 250).all()
    assert fits.note is None and cut.stem == "wide"


def test_the_command_twice_gives_identical_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", "demo", "--schedule", "vp", "--checkpoint", checkpoint]
    flags += ["--churn", "0.33", "--guidance", "1", "--split", "test", "--rho", "7"]
    flags += ["--sampler", "heun", "--steps", "1", "--stochastic", "true", "--points", "3"]
    flags += ["--device", "cpu"]
    assert run_script(*flags) == 0
    folder = checkpoint.parent / "sample_12" / "interpolation_heun_7.0_1_w=1.0_churn=0.33"
    assert run_script(*flags, "--output_dir", tmp_path) == 0
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 7
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    out = capsys.readouterr().out
    assert "img1.png is 256×256: resized to 32×32" in out and "path length" in out
    assert str(tmp_path / "interpolation.gif") in out
    assert stored(folder)["images"] == ["img1.png", "img2.png"]


def test_images_of_a_zip_are_taken_by_position_and_named(checkpoint: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for i in range(3):
            Image.new("RGB", (40, 40), (90 * i, 0, 0)).save(tmp_path / "x.png")
            archive.write(tmp_path / "x.png", f"p/{i}.png")
    out = tmp_path / "out"
    flags = ["--checkpoint", checkpoint, "--dataset", "folder", "--data_dir", tmp_path / "mine.zip"]
    flags += ["--split", "all", "--indices", "2,0", "--steps", "1", "--points", "2"]
    run_script(*flags, "--mode", "spherical", "--output_dir", out, "--device", "cpu")
    metrics = stored(out)
    assert metrics["images"] == ["p/2.png", "p/0.png"]
    assert metrics["protocol"]["mode"] == "spherical"
    assert metrics["protocol"]["dataset"]["kind"] == "zip"


def test_mistakes_are_one_clear_line(checkpoint: Path, model: dbae.DBAE, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    of_faces = tmp_path / "ema_0.9999_000001.pt"
    save_weights(of_faces, model, {"data": {"dataset": "celeba"}})
    one = str(ROOT / "assets" / "img1.png")
    base = ["--checkpoint", checkpoint, "--device", "cpu", "--steps", "1"]
    for flags, complaint in (
        (["--images", f"{one},{tmp_path / 'none.png'}"], r"none\.png cannot be read.*--images"),
        (["--images", f"{one},{tmp_path / 'text.png'}"], r"text\.png.*not an image"),
        (["--images", one], "at least two images"),
        (["--images", one, "--indices", "1"], "--images and --indices"),
        (["--indices", "0,5000"], "--indices 5000.*0 to 4999"),
        (["--indices", "0,-1"], "--indices -1"),
        (["--indices", "a"], "whole numbers"),
        (["--points", "1"], "--points 1 must be at least 2"),
        (["--mode", "cubic"], "cubic"),
        (["--checkpoint", of_faces], "trained on celeba, not on demo: say celeba"),
        (["--output_dir", tmp_path / "text.png"], "cannot write to .*text"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            run_script(*base, *flags)
        assert "\n" not in str(error.value)


def test_of_several_processes_one_does_the_work(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--checkpoint", checkpoint, "--steps", "1", "--points", "2", "--device", "cpu"]
    command = [sys.executable, str(SCRIPT), *map(str, flags), "--output_dir", str(tmp_path)]
    places = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for r in (0, 1)
    ]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, **meeting},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "straightness" in outputs[0] and "straightness" not in outputs[1]
    assert stored(tmp_path)["kind"] == "interpolation"
