"""Reconstruction runs: their files, their figures, and that neither ranks nor batches matter."""

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

import dbae
from dbae.data import ImageDataset, open_dataset
from dbae.distributed import Context
from dbae.errors import UserError
from dbae.evaluation import results
from dbae.evaluation.reconstruction import ReconstructionConfig, reconstruct_images, run

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dbae_reconstruction.py"
CONFIG = ReconstructionConfig(num_samples=7, batch_size=3, steps=2)


@pytest.fixture(scope="module")
def demo() -> ImageDataset:
    return open_dataset("demo", None, 32, "test")


def main_of(path: Path):
    return runpy.run_path(str(path))["main"]


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def all_samples(folder: Path) -> np.ndarray:
    (path,) = folder.glob("samples_*.npz")
    return np.load(path)["arr_0"]


def test_the_folder_bears_the_sampler_and_the_step() -> None:
    config = ReconstructionConfig(rho=7, steps=100, guidance=1, churn=0)
    path = config.output_folder(Path("x/ema_0.9999_1020000.pt"))
    assert path == Path("x/sample_1020000/euler_7.0_100_w=1.0_churn=0.0")
    config = ReconstructionConfig(sampler="heun", rho=7, steps=167, guidance=1, churn=0.33)
    assert config.output_folder(Path("x/demo.pt")).parts[1:] == (
        "sample_demo",
        "heun_7.0_167_w=1.0_churn=0.33",
    )
    chosen = dataclasses.replace(config, output_dir="elsewhere")
    assert chosen.output_folder(Path("x/demo.pt")) == Path("elsewhere")


def test_wrong_settings_are_one_clear_line() -> None:
    wrong: dict[str, Any] = {
        "batch_size": 0,
        "steps": 0,
        "num_samples": -1,
        "rho": 0.0,
        "churn": 1.0,
        "guidance": float("nan"),
        "sampler": "rk45",
        "latent": "median",
    }
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"^--{name} .*{value}"):
            ReconstructionConfig(**{name: value})


def launch(rank: int, world: int, port: int, *flags: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many for one rank as for two
    if world > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        env |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_ranks_give_what_one_gives_and_leave_no_trace_for_the_next_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--checkpoint", str(checkpoint), "--num_samples", "8", "--batch_size", "3"]
    flags += ["--steps", "2", "--churn", "0.33", "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two, one = tmp_path / "two", tmp_path / "one"
    processes = [launch(r, 2, port, *flags, "--output_dir", str(two)) for r in (0, 1)]
    processes.append(launch(0, 1, port, *flags, "--output_dir", str(one)))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert "SSIM" in outputs[0] and "SSIM" not in outputs[1]

    names = {path.name for path in two.iterdir()}
    parts = {"0_real_sample_0.npz", "1_fake_sample_1.npz", "0_fake_sample_2.npz", "1_x_1.png"}
    assert parts | {"1_sample_1.png", "1_x_T_sample_1.png", "samples_8x32x32x3_nfe4.npz"} <= names
    assert np.array_equal(all_samples(two), all_samples(one))
    assert stored(two)["per_image"] == stored(one)["per_image"]
    for key in ("mse", "ssim", "baselines"):
        assert stored(two)[key] == stored(one)[key]
    assert (two / "comparison.png").read_bytes() == (one / "comparison.png").read_bytes()

    (two / "notes.txt").write_text("mine")
    again = launch(0, 1, port, *flags, "--output_dir", str(two))
    assert again.wait(120) == 0, again.communicate()[0]
    names = {path.name for path in two.iterdir()}
    assert names == {path.name for path in one.iterdir()} | {"notes.txt"}


@pytest.fixture(scope="module")
def finished(model: dbae.DBAE, demo: ImageDataset, checkpoint: Path, tmp_path_factory):
    """A run with baselines: its result, in its folder."""
    folder = tmp_path_factory.mktemp("results")
    train = open_dataset("demo", None, 32, "train")
    train.indices = train.indices[:6]
    context = Context()
    result = run(
        model, demo, CONFIG, context, folder, False, checkpoint=checkpoint, train_dataset=train
    )
    assert result is not None
    return result


def test_a_run_writes_everything_in_data_set_order(finished, demo: ImageDataset) -> None:
    folder = finished.folder
    fakes = [np.load(folder / f"0_fake_sample_{i}.npz")["samples"] for i in range(3)]
    reals = [np.load(folder / f"0_real_sample_{i}.npz")["samples"] for i in range(3)]
    assert [len(part) for part in fakes] == [3, 3, 1]
    assert finished.samples.name == "samples_7x32x32x3_nfe2.npz"
    assert np.array_equal(np.load(finished.samples)["arr_0"], np.concatenate(fakes))
    originals = np.stack([demo[i].image.permute(1, 2, 0).numpy() for i in range(7)])
    assert np.array_equal(np.concatenate(reals), originals)
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"comparison.png"} | {
        f"{kind}_{i}.png" for kind in ("0_sample", "0_x", "x_T_sample") for i in range(3)
    }
    assert not list(folder.glob("*unfinished*"))


def test_metrics_hold_figures_protocol_and_each_image(finished, checkpoint: Path) -> None:
    metrics = stored(finished.folder)
    assert metrics == json.loads(json.dumps(finished.metrics))
    for name in ("mse", "ssim"):
        values = metrics["per_image"][name]
        assert metrics[name]["n"] == len(values) == 7
        assert metrics[name]["mean"] == pytest.approx(np.mean(values))
        assert metrics[name]["stderr"] == pytest.approx(np.std(values, ddof=1) / 7**0.5)
    assert metrics["lpips"] is not None or "alexnet-owt-7be5be79.pth" in metrics["lpips_reason"]
    assert metrics["per_image"]["index"] == list(range(50_000, 50_007))
    assert metrics["per_image"]["name"][0] == "demo-50000"
    protocol = metrics["protocol"]
    expected = {
        "checkpoint": checkpoint.name, "ema": 0.9999, "schedule": "vp", "end_data": 0.5,
        "sampler": "euler", "steps": 2, "nfe": 2, "rho": 7.0, "churn": 0.0, "guidance": 1.0,
        "latent": "sample", "seed": 0, "split": "test", "n": 7, "reference_compat": False,
    }  # fmt: skip
    assert {key: protocol[key] for key in expected} == expected
    assert len(protocol["checkpoint_sha256"]) == 64
    assert protocol["dataset"]["dataset"] == "demo"
    assert {"dbae", "torch", "numpy", "lpips"} <= set(protocol["versions"])


def test_the_table_sets_baselines_beside_the_model(finished) -> None:
    rows = {line.split("  ")[0]: line for line in finished.table.splitlines()}
    assert {"DBAE", "x_T", "mean image", "PCA, 4 components"} <= set(rows)
    assert "euler-2" in rows["DBAE"] and "±" in rows["PCA, 4 components"]
    assert "fitted on 6 images of split train" in finished.table
    figures = finished.metrics["baselines"]
    assert figures["pca"]["mse"]["n"] == 7
    assert figures["mean_image"]["fit_among_scored"] == 0


def test_pca_with_too_few_images_is_a_reason_in_its_row(
    model: dbae.DBAE, demo: ImageDataset, tmp_path: Path
) -> None:
    train = open_dataset("demo", None, 32, "train")
    train.indices = range(4)
    config = dataclasses.replace(CONFIG, num_samples=1, steps=1)
    result = run(model, demo, config, Context(), tmp_path, False, train_dataset=train)
    assert result is not None
    assert "4 components need more" in result.metrics["baselines"]["pca"]["reason"]
    assert "PCA, 4 components: 4 components need more" in result.table
    assert result.metrics["mse"]["stderr"] is None


def test_churned_noise_depends_on_the_image_not_on_its_batch(
    model: dbae.DBAE, demo: ImageDataset
) -> None:
    x0 = dbae.data.to_model_range(torch.stack([demo[i].image for i in range(5)]))
    config = ReconstructionConfig(steps=2, churn=0.5)
    whole, _, nfe = reconstruct_images(model, x0, config, range(5))
    assert nfe == 4
    pieces = torch.cat(
        [
            reconstruct_images(model, x0[part], config, range(5)[part])[0]
            for part in (slice(0, 2), slice(2, 5))
        ]
    )
    # Convolutions round otherwise in other batches, and this model magnifies that.
    assert torch.allclose(whole, pieces, atol=1e-3)
    other = reconstruct_images(model, x0, dataclasses.replace(config, seed=1), range(5))[0]
    assert (whole - other).abs().mean() > 1e-3


def test_latent_mean_and_sample_differ_for_a_stochastic_model(
    model: dbae.DBAE, demo: ImageDataset
) -> None:
    x0 = dbae.data.to_model_range(demo[0].image[None])
    config = ReconstructionConfig(steps=1, latent="mean")
    x_T = reconstruct_images(model, x0, config, [0])[1]
    with torch.no_grad():
        assert torch.allclose(x_T, model.endpoint(model.encode_stats(x0)[0]), atol=1e-6)
    drawn = reconstruct_images(model, x0, dataclasses.replace(config, latent="sample"), [0])[1]
    assert not torch.allclose(drawn, x_T, atol=1e-6)


def test_an_unreadable_image_is_named_and_earlier_results_stay(
    model: dbae.DBAE, demo: ImageDataset, tmp_path: Path
) -> None:
    from PIL import Image

    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(pictures / f"{i}.png")
    config = dataclasses.replace(CONFIG, dataset="folder", num_samples=0, batch_size=2, steps=1)
    run(model, open_dataset("folder", str(pictures), 32, "all"), config, Context(), out, False)
    before = stored(out)
    (pictures / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2\.png"):
        run(model, open_dataset("folder", str(pictures), 32, "all"), config, Context(), out, False)
    assert stored(out) == before and len(all_samples(out)) == 3
    lenient = open_dataset("folder", str(pictures), 32, "all", "skip")
    result = run(model, lenient, config, Context(), out, False)
    assert result is not None and result.metrics["protocol"]["replaced"] == ["2.png"]
    assert not (out / "unfinished").exists()


def test_scoring_on_the_trainings_own_images_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dbae.create_model("demo", latent_dim=4).eval()
    train, test = (open_dataset("demo", None, 32, split) for split in ("train", "test"))
    for trained, scored, seen in (
        (None, test, None),
        (train.describe(), test, False),
        (train.describe(), train, True),
        ({**train.describe(), "split": "all"}, test, True),
        ({**train.describe(), "source": "of other images"}, train, False),
    ):
        model.trained_on = trained
        result = run(model, scored, CONFIG, Context(), tmp_path, progress=False)
        assert result is not None and result.metrics["protocol"]["seen_in_training"] is seen
        assert ("the model was trained on images of this split" in capsys.readouterr().out) is (
            seen is True
        )


def test_a_model_that_gives_no_numbers_is_refused(demo: ImageDataset, tmp_path: Path) -> None:
    broken = dbae.create_model("demo", latent_dim=4).eval()
    torch.nn.init.constant_(broken.unet.out[-1].bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        run(broken, demo, dataclasses.replace(CONFIG, num_samples=1), Context(), tmp_path, False)


def test_too_many_samples_asked_for_are_all_there_are(
    model: dbae.DBAE, demo: ImageDataset, tmp_path: Path, capsys
) -> None:
    few = open_dataset("demo", None, 32, "test")
    few.indices = few.indices[:2]
    result = run(model, few, dataclasses.replace(CONFIG, steps=1), Context(), tmp_path, False)
    assert result is not None and result.metrics["mse"]["n"] == 2
    assert "only 2 images" in capsys.readouterr().out


def test_the_command_refuses_what_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    main = main_of(SCRIPT)
    base = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    for flags, complaint in (
        (["--checkpoint", str(tmp_path / "none.pt")], "none.pt does not exist"),
        ([*base, "--schedule", "ve"], "trained with schedule=vp"),
        ([*base, "--stochastic", "false"], "trained with stochastic=true"),
        ([*base, "--dataset", "imagenet"], "imagenet"),
        ([*base, "--split", "holdout"], "holdout"),
        ([*base, "--sampler", "rk45"], "rk45"),
        ([*base, "--weights_dir", str(tmp_path / "none")], "--weights_dir"),
        ([*base, "--num_sample", "3"], "--num_sample"),
        ([], "--checkpoint"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            main(flags)
        assert "\n" not in str(error.value)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_output_that_cannot_be_written_is_one_line(
    model: dbae.DBAE, demo: ImageDataset, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*Not a directory"):
        run(model, demo, CONFIG, Context(), tmp_path / "file" / "out", False)


# eval_reconstruction.py ---------------------------------------------------------------------


@pytest.fixture
def evaluate():
    return main_of(ROOT / "eval_reconstruction.py")


def write_pair(folder: Path, rank: int, i: int, real: np.ndarray, fake: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{rank}_real_sample_{i}.npz", samples=real)
    np.savez(folder / f"{rank}_fake_sample_{i}.npz", samples=fake)


def test_scoring_again_gives_the_same_figures_and_keeps_the_protocol(
    finished, evaluate, tmp_path: Path, capsys
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    before = stored(folder)
    assert evaluate([f"--sample_path={folder}", "--batch_size", "2"]) == 0
    after = stored(folder)
    assert "0.0" in capsys.readouterr().out
    for name in ("mse", "ssim"):
        assert after[name]["mean"] == pytest.approx(before[name]["mean"], abs=1e-12)
    assert after["per_image"]["name"] == before["per_image"]["name"]
    assert after["baselines"] == before["baselines"]
    assert before["protocol"].items() <= after["protocol"].items()

    evaluate([f"--sample_path={folder}", "--reference_compat"])
    compat = stored(folder)
    assert compat["protocol"]["reference_compat"] is True
    assert compat["mse"]["mean"] == pytest.approx(before["mse"]["mean"] / 16)
    assert compat["standard"]["ssim"]["mean"] == pytest.approx(before["ssim"]["mean"])
    assert compat["protocol"]["checkpoint"] == before["protocol"]["checkpoint"]
    out = capsys.readouterr().out
    assert "published script" in out and "mean image" not in out.split("\n\n")[-2]

    evaluate([f"--sample_path={folder}"])
    assert "standard" not in stored(folder)
    assert stored(folder)["mse"]["mean"] == pytest.approx(before["mse"]["mean"], abs=1e-12)


def test_a_folder_of_the_reference_is_scored_in_numeric_order(evaluate, tmp_path: Path) -> None:
    folder = tmp_path / "euler_7.0_100_w=1.0_churn=0.33"
    real = np.zeros((1, 16, 16, 3), np.uint8)
    for i in range(11):
        for rank in (0, 1):
            write_pair(folder, rank, i, real, real + np.uint8(2 * i + rank))
    (folder / "samples_22x16x16x3_nfe200.npz").write_bytes(b"")
    evaluate([f"--sample_path={folder}"])
    metrics = stored(folder)
    expected = [(k / 255) ** 2 for k in range(22)]
    assert metrics["per_image"]["mse"] == pytest.approx(expected)
    protocol = metrics["protocol"]
    assert (protocol["sampler"], protocol["steps"], protocol["nfe"]) == ("euler", 100, 200)
    assert (protocol["rho"], protocol["guidance"], protocol["churn"]) == (7.0, 1.0, 0.33)


def test_folders_that_cannot_be_scored_are_named(evaluate, tmp_path: Path) -> None:
    image = np.zeros((2, 16, 16, 3), np.uint8)

    def complaint(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            evaluate([f"--sample_path={folder}"])
        assert "\n" not in str(error.value) and not (folder / "metrics.json").exists()
        return str(error.value)

    assert "is not a folder" in complaint(tmp_path / "absent")
    assert "has no files" in complaint(tmp_path)
    folder = tmp_path / "unpaired"
    write_pair(folder, 0, 0, image, image)
    (folder / "0_real_sample_0.npz").unlink()
    assert "0_fake_sample_0.npz has no partner 0_real_sample_0.npz" in complaint(folder)
    write_pair(tmp_path / "shapes", 0, 0, image, image[:, :8])
    assert "8x16 pixels" in complaint(tmp_path / "shapes")
    write_pair(tmp_path / "counts", 0, 0, image, image[:1])
    assert "has 1 images" in complaint(tmp_path / "counts")
    write_pair(tmp_path / "floats", 0, 0, image, image.astype(np.float32))
    assert "float32" in complaint(tmp_path / "floats")
    write_pair(tmp_path / "broken", 0, 0, image, image)
    (tmp_path / "broken" / "0_fake_sample_0.npz").write_bytes(b"PK\3\4 broken")
    assert "not a readable .npz" in complaint(tmp_path / "broken")
    np.savez(tmp_path / "broken" / "0_fake_sample_0.npz", images=image)
    assert "no array named samples" in complaint(tmp_path / "broken")


def test_merging_streams_the_parts_in_the_order_given(tmp_path: Path) -> None:
    parts = []
    for i, n in enumerate((3, 1)):
        path = tmp_path / f"0_fake_sample_{i}.npz"
        results.write_samples(path, torch.full((n, 3, 4, 5), i, dtype=torch.uint8))
        parts.append(path)
    merged = results.merge(tmp_path, parts[::-1], 9)
    assert merged.name == "samples_4x4x5x3_nfe9.npz"
    assert np.load(merged)["arr_0"][:, 0, 0, 0].tolist() == [1, 0, 0, 0]
