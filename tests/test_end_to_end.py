"""The documented command lines, really run: train, resume, reconstruct, score."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from dbae import create_model, load_model
from dbae.checkpoint import save_weights
from dbae.data import CELEBA_ATTRIBUTES, open_dataset, to_model_range, to_uint8
from dbae.evaluation.baselines import Pca, training_positions
from dbae.evaluation.metrics import mse

ROOT = Path(__file__).parents[1]
SMALL = [
    "--image_size", "32", "--num_channels", "32", "--latent_dim", "5", "--endpoint_channels", "4",
    "--num_res_blocks", "1", "--attention_resolutions", "", "--log_interval", "1",
]  # fmt: skip


def bash(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NUM_GPUS": "0", **env}
    done = subprocess.run(
        ["bash", *command], capture_output=True, text=True, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CelebA of 40 images in the published LMDB layout, each of one known colour."""
    folder = tmp_path_factory.mktemp("data root") / "celeba"
    with lmdb.open(str(folder), map_size=2**26) as database, database.begin(write=True) as entry:
        for i in range(40):
            file = io.BytesIO()
            Image.new("RGB", (178, 218), (6 * i, 100, 255 - 6 * i)).save(file, "PNG")
            entry.put(f"None-{i:07d}".encode(), file.getvalue())
        entry.put(b"length", b"40")
    return folder


def test_train_resume_reconstruct_and_score_by_the_documented_lines(
    celeba: Path, tmp_path: Path
) -> None:
    train = [
        str(ROOT / "train_dbae.sh"), "celeba", "vp", "false", "--batch_size", "4",
        "--save_interval", "1", "--workdir", str(tmp_path), "--seed", "1", *SMALL,
    ]  # fmt: skip
    first = bash(*train, "--max_steps", "1", CELEBA_DIR=str(celeba))
    assert "starting from new weights" in first.stdout
    second = bash(*train, "--max_steps", "2", CELEBA_DIR=str(celeba))
    run = tmp_path / "celeba32_32_5d_false_vp"
    assert f"resuming from step 1 in {run}" in second.stdout
    assert "split in the same proportions (train 32, valid 4, test 4)" in second.stdout

    checkpoint = run / "ema_0.9999_000002.pt"
    bash(
        str(ROOT / "recon_dbae.sh"), "celeba", "vp", str(checkpoint), "0.33", "1", "test", "7",
        "heun", "3", "false", "--data_dir", str(celeba), "--num_samples", "4",
        "--batch_size", "3",
    )  # fmt: skip
    folder = run / "sample_2" / "heun_7.0_3_w=1.0_churn=0.33"
    samples = np.load(folder / "samples_4x32x32x3_nfe8.npz")["arr_0"]
    assert samples.shape == (4, 32, 32, 3) and samples.dtype == np.uint8
    batches = [np.load(folder / f"0_real_sample_{i}.npz")["samples"] for i in range(2)]
    reds = np.concatenate(batches)[:, 16, 16, 0]
    assert reds.tolist() == [6 * i for i in range(36, 40)]  # the test split, in order
    assert (folder / "0_sample_0.png").exists() and (folder / "x_T_sample_1.png").exists()

    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["protocol"]["nfe"] == 8 and stored["protocol"]["n"] == 4
    scored = subprocess.run(
        [sys.executable, str(ROOT / "eval_reconstruction.py"), f"--sample_path={folder}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    again = json.loads((folder / "metrics.json").read_text())
    assert again["mse"] == stored["mse"] and again["ssim"] == stored["ssim"]
    assert again["mse"]["n"] == 4


def small_model(folder: Path, **options: Any) -> Path:
    """An untrained checkpoint in the form of a training run's."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    model = create_model("demo", latent_dim=5, endpoint_channels=4, **options)
    save_weights(folder / "ema_0.9999_000012.pt", model.eval())
    return folder / "ema_0.9999_000012.pt"


def write_attributes(path: Path, names: Sequence[str], files: Sequence[str]) -> None:
    """A file in CelebA's form with attributes that differ from image to image."""
    rows = [
        f"{file} " + " ".join("1" if (i + k) % (2 + k % 3) else "-1" for k in range(len(names)))
        for i, file in enumerate(files)
    ]
    path.write_text("\n".join([str(len(files)), " ".join(names), *rows, ""]))


def test_probe_interpolate_manipulate_and_report_by_the_documented_lines(
    celeba: Path, tmp_path: Path
) -> None:
    names = [f"{i:06d}.jpg" for i in range(1, 41)]
    write_attributes(celeba / "list_attr_celeba.txt", CELEBA_ATTRIBUTES, names)
    model = str(small_model(tmp_path / "run", stochastic=True))
    env = {"CELEBA_DIR": str(celeba)}
    probed = bash(
        str(ROOT / "infer_class_dbae.sh"), "celeba", "vp", model, "true", "--epochs", "1",
        "--resamples", "20", "--probe_batch_size", "8", **env,
    )  # fmt: skip
    assert "this probe is on a copy of another length" in probed.stdout
    assert "(sample)" in probed.stdout
    results = tmp_path / "run" / "sample_12"
    downstream = results / "downstream_inference" / "multitask_ema"
    assert {"best.pt", "test.txt", "metrics.json"} <= {p.name for p in downstream.iterdir()}
    stored = json.loads((downstream / "metrics.json").read_text())
    assert stored["protocol"]["division"] == "the data set's own splits"
    assert stored["rows"][0]["n_train"] == 32

    words = "celeba vp MODEL 0.33 1 train 7 heun 2 true".replace("MODEL", model).split(" ")
    bash(str(ROOT / "interpol_dbae.sh"), *words, **env)
    sampler = "heun_7.0_2_w=1.0_churn=0.33"
    for name in ("interpolation_x0.png", "interpolation_xT.png", "interpolation.gif"):
        assert (results / f"interpolation_{sampler}" / name).exists()
    bash(
        str(ROOT / "manipul_dbae.sh"), *words, "--attributes", stored_names(stored)[0],
        "--num_measured", "3", **env,
    )  # fmt: skip
    folder = results / f"manipulation_{sampler}"
    assert (folder / "img3_manipulated_x0.png").exists()
    assert json.loads((folder / "metrics.json").read_text())["measured"]["n"] == 3

    report = subprocess.run(
        [sys.executable, str(ROOT / "scripts/dbae_report.py"), str(tmp_path / "run")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    for section in ("classification", "interpolation", "manipulation"):
        assert f'id="{section}' in page


def stored_names(metrics: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in metrics["rows"][0]["attributes"]]


def test_the_papers_tables_from_what_is_there(celeba: Path, tmp_path: Path) -> None:
    names = [f"{i:06d}.jpg" for i in range(1, 41)]
    write_attributes(celeba / "list_attr_celeba.txt", CELEBA_ATTRIBUTES, names)
    checkpoints = tmp_path / "checkpoints"
    model = small_model(checkpoints / "ffhq128_128_512d_false_vp", stochastic=False)
    run = model.parent
    command = [str(ROOT / "reproduce.sh"), str(checkpoints), "--limit", "8"]
    env = {"CELEBA_DIR": str(celeba), "DATA_ROOT": str(tmp_path / "nothing")}
    # Another run of the same checkpoint is neither taken for the paper's nor replaced.
    quick = ["ffhq", "vp", str(model), "false", "--num_train", "8", "--num_test", "8"]
    bash(str(ROOT / "infer_class_dbae.sh"), *quick, "--epochs", "1", "--lr", "0.5", **env)
    mine = run / "sample_12" / "downstream_inference" / "multitask_ema" / "metrics.json"
    before = mine.read_bytes()
    done = bash(*command, **env)
    assert mine.read_bytes() == before and "done before: " not in done.stdout
    for missing in (
        "checkpoint of DBAE trained on FFHQ", "ffhq128_128_512d_true_vp/ema_0.9999_*.pt",
        "nothing/celebahq/data.mdb", "peopleDevTrain.txt", "alexnet-owt-7be5be79.pth",
    ):  # fmt: skip
        assert any(
            line.startswith("missing: ") and missing in line for line in done.stdout.splitlines()
        ), missing
    row = next(line for line in done.stdout.splitlines() if "FFHQ" in line and "AP, paper" in line)
    assert row.startswith("DBAE-d trained on FFHQ") and row.endswith("0.656")
    assert 0 < float(row.split("AP, paper")[1].split("[")[0]) <= 1
    assert "DBAE-d trained on FFHQ, regression: missing" in done.stdout
    assert "A TRIAL on the first 8 images: ours compare with nothing" in done.stdout
    again = bash(*command, **env)
    assert "done before: " in again.stdout and "encoded" not in again.stdout
    assert (checkpoints / "reproduction_trial_8.txt").read_text() in again.stdout
    assert not (checkpoints / "reproduction.txt").exists()


def test_two_cpu_processes_train_by_the_launcher(tmp_path: Path) -> None:
    command = [str(ROOT / "train_dbae.sh"), "demo", "ve", "--max_steps", "2", "--batch_size", "2"]
    done = bash(*command, "--workdir", str(tmp_path), *SMALL, NPROC="2", LAUNCHER="torchrun")
    assert "batch   4 images a step = 2 × 2 process(es)" in done.stdout
    assert load_model(tmp_path / "demo32_32_5d_false_ve").config.schedule == "ve"


def test_the_shipped_demo_model_beats_pca_on_images_it_never_saw() -> None:
    path = ROOT / "assets" / "demo_model.pt"
    assert path.stat().st_size <= 10_000_000
    model = load_model(path)
    size = model.config.image_size
    train, test = (open_dataset("demo", None, size, split) for split in ("train", "test"))
    unseen = torch.stack([test[i].image for i in range(100)])
    shown = torch.stack([train[i].image for i in training_positions(len(train), 3 * size**2)])
    x0 = to_model_range(unseen)
    ours = mse(unseen, to_uint8(model.reconstruct(x0, "euler", 10))).mean()
    pca = mse(unseen, Pca(shown, model.config.latent_dim).reconstruct(unseen)).mean()
    assert ours < 0.95 * pca
