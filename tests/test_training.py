"""Training: resuming, stateless randomness, several processes, averaged weights, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import ROOT, RUN, SMALL, TRAIN, assert_same_run, progress, tensors, train

from dbae import create_model, load_model
from dbae.cli import add_flags, parser
from dbae.distributed import Context
from dbae.ema import Ema
from dbae.layers import SpectralConv2d
from dbae.presets import ModelConfig, TrainConfig
from dbae.random import fold, normal, uniform
from dbae.training import Trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir, "--max_steps=6", "--save_interval=3")
    return workdir / RUN


def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    uninterrupted: Path, tmp_path: Path
) -> None:
    command = [*TRAIN, *SMALL, f"--workdir={tmp_path}", "--max_steps=6", "--save_interval=3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step=4/"):  # past the checkpoint of step 3, with a row too many
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    folder = tmp_path / RUN
    assert (folder / "state_000003.pt").exists() and not (folder / "state_000006.pt").exists()
    done = train(tmp_path, "--max_steps=6", "--save_interval=3")
    assert f"resuming from step 3 in {folder}" in done.stdout
    assert_same_run(folder, uninterrupted, 6)


def test_a_finished_run_says_so_and_stays_as_it_is(uninterrupted: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in uninterrupted.glob("*.pt")}
    done = train(uninterrupted.parent, "--max_steps=6", "--save_interval=3")
    assert "step 6 of 6: done (raise --max_steps)" in done.stdout
    assert {p.name: p.stat().st_mtime_ns for p in uninterrupted.glob("*.pt")} == before
    assert len(progress(uninterrupted)) == 6


def test_two_processes_train_on_the_same_batches_with_the_same_noise(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """Two gloo ranks of 2 images against one process of 2 micro-batches of 2."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *TRAIN[1:], *SMALL, "--batch_size=2", f"--workdir={tmp_path}",
         "--max_steps=6", "--save_interval=3"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = progress(tmp_path / RUN), progress(uninterrupted)
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            assert float(value) == pytest.approx(float(other[name]), rel=2e-3, abs=1e-6), name
    ema, expected = (
        tensors(folder / "ema_0.9999_000006.pt") for folder in (tmp_path / RUN, uninterrupted)
    )
    for name, value in ema.items():
        if "running_" not in name and "num_batches" not in name:  # each rank's own statistics
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=2e-4, msg=name)
    assert done.stdout.count("starting from new weights") == 1


def test_a_run_explains_itself(uninterrupted: Path) -> None:
    stored = json.loads((uninterrupted / "config.json").read_text())
    assert stored["train"]["max_steps"] == 6
    assert stored["data"]["n"] == 50_000
    model = load_model(uninterrupted)
    assert dataclasses.asdict(model.config) == {**stored["model"], "attention_resolutions": ()}
    rows = progress(uninterrupted)
    assert [row["step"] for row in rows] == list("123456")
    assert [row["images"] for row in rows] == [str(4 * i) for i in range(1, 7)]
    for row in rows:
        assert 0 < float(row["xs_mse"]) < float(row["loss"]) and float(row["grad_norm"]) > 0
        assert float(row["z_norm"]) > 0 and 0 <= float(row["z_dead"]) <= 1


def test_log_lines_can_be_searched_and_grids_are_drawn(tmp_path: Path) -> None:
    done = train(tmp_path, "--max_steps=2", "--sample_interval=2", "--precision=bf16")
    line = next(line for line in done.stdout.splitlines() if line.startswith("step=2/2"))
    fields = dict(item.split("=") for item in line.split())
    assert {"loss", "xs_mse", "grad", "img/s", "eta", "next_ckpt", "z_dead"} <= fields.keys()
    assert 0 <= int(fields["data_wait"].rstrip("%")) <= 100
    grid = np.asarray(Image.open(tmp_path / RUN / "samples" / "000002.png"))
    assert grid.shape[0] > 3 * 32 and grid.shape[1] > 8 * 32 and grid.std() > 10


def test_draws_depend_on_the_position_only(tmp_path: Path) -> None:
    model = ModelConfig(32, latent_dim=6, num_channels=32, num_res_blocks=1, endpoint_channels=4)
    config = TrainConfig(workdir=str(tmp_path), max_steps=1)
    trainer = Trainer(model, config, Context())
    images = torch.rand(6, 3, 32, 32)
    whole = trainer._draw(images, range(10, 16))
    halves = [trainer._draw(images[:2], range(10, 12)), trainer._draw(images[2:], range(12, 16))]
    for all_at_once, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(all_at_once, torch.cat(parts))
    assert not torch.equal(whole[2][0], whole[2][1])
    other = trainer._draw(images, range(11, 17))
    assert torch.equal(other[2][0], whole[2][1]) and not torch.equal(other[2][0], whole[2][0])


def test_random_streams_are_standard_and_apart() -> None:
    cpu = torch.device("cpu")
    values = normal(1, "a", range(4000), (4,), cpu)
    assert abs(float(values.mean())) < 0.03 and abs(float(values.std()) - 1) < 0.03
    numbers = uniform(1, "a", range(4000), cpu)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.02
    assert len({fold(s, w, p) for s in (0, 1) for w in ("a", "b") for p in range(100)}) == 400
    assert fold(0, 1, 2) != fold(0, 12) and fold(1, "x") == fold(1, "x") < 2**63


def test_averaged_weights_follow_the_warmed_up_rule() -> None:
    model = nn.Sequential(SpectralConv2d(3, 8, 3), nn.BatchNorm2d(8))
    ema = Ema(model, rate=0.5)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for n in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.randn(2, 3, 5, 5))
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        for key, value in model.state_dict().items():
            expected[key] = (
                decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value
            )
    for key, value in ema.shadow.state_dict().items():
        if "weight_u" not in key and "weight_v" not in key:
            torch.testing.assert_close(value, expected[key])
    for _ in range(200):
        ema.shadow[0].power_iteration()  # type: ignore[operator]
    # Spectral norm's vectors belong to the averaged weight, not to the average of vectors.
    largest = torch.linalg.matrix_norm(ema.shadow[0].weight_orig.flatten(1), 2)
    assert float(largest * ema.shadow[0].scale()) == pytest.approx(1, abs=1e-3)  # type: ignore[operator]
    assert not ema.shadow.training


def test_averaged_weights_are_the_better_model_early_on() -> None:
    """100 noisy steps towards a target: the average is closer to it than the last iterate."""
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    target = torch.randn(1, 50)
    ema = Ema(model, 0.9999)
    for n in range(100):
        with torch.no_grad():
            gradient = model.weight - target + torch.randn(1, 50)
            model.weight -= 0.3 * gradient
        ema.update(n)
    last = float((model.weight - target).detach().norm())
    shadow = ema.shadow
    assert float((shadow.weight - target).detach().norm()) < 0.7 * last  # type: ignore[operator]


def test_a_released_checkpoint_gives_its_weights_to_a_new_run(tmp_path: Path) -> None:
    from dbae.checkpoint import save_weights

    source = tmp_path / "ema_0.9999_000777.pt"
    donor = create_model(
        "demo", latent_dim=6, stochastic=True, endpoint_channels=4, attention_resolutions=()
    )
    save_weights(source, donor)
    done = train(tmp_path / "new", "--max_steps=1", f"--resume={source}")
    assert f"starting from the weights of {source} (no training state beside it)" in done.stdout
    trained = tensors(tmp_path / "new" / RUN / "model_000001.pt")
    again = train(tmp_path / "new", "--max_steps=2", f"--resume={source}")
    assert f"resuming from step 1 in {tmp_path / 'new' / RUN}" in again.stdout
    moved = (trained["/label_emb.weight"] - donor.unet.label_emb.weight).abs().max()
    assert 0 <= float(moved.detach()) < 0.01


def _folder(path: Path, seed: int = 0) -> Path:
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)).save(
            path / f"{i}.png"
        )
    return path


def test_own_pictures_train_from_a_folder_and_bad_ones_are_named_or_counted(
    tmp_path: Path,
) -> None:
    folder = _folder(tmp_path / "bilder für uns")
    (folder / "3.png").write_bytes(b"no picture")
    own = ["--dataset=folder", f"--data_dir={folder}", "--image_size=32", "--num_channels=32"]
    failed = train(tmp_path / "w", *own, "--max_steps=3", check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ")
    assert "3.png" in failed.stderr and failed.stderr.count("\n") == 1
    train(tmp_path / "w", *own, "--max_steps=3", "--bad_images=skip", "--num_workers=1")
    rows = progress(tmp_path / "w" / "folder32_32_6d_true_vp")
    # 12 positions of 5 images: the bad one is met two or three times.
    assert rows[-1]["replaced_images"] in ("2", "3")
    own[1] = f"--data_dir={_folder(tmp_path / 'others', seed=1)}"
    other = train(tmp_path / "w", *own, "--max_steps=4", check=False)
    assert other.returncode == 2 and "5 images → 5 others" in other.stderr


def test_a_mistake_of_all_processes_is_told_once(tmp_path: Path) -> None:
    launcher = [sys.executable, str(ROOT / "scripts" / "torchrun.py"), "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", *TRAIN[1:], *SMALL, "--image_size=48",
         f"--workdir={tmp_path}"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --image_size 48 has no architecture")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=ffhp"], "data set 'ffhp' is unknown; choose one of ffhq, celebahq"),
        (["--dataset=folder", "--data_dir=/nowhere"], "/nowhere"),
        (["--dataset=celeba"], "--data_dir"),
        (["--schedule=xx"], "argument --schedule: invalid choice: 'xx'"),
        (["--max_step=5"], "unrecognized arguments: --max_step=5"),
        (["--lr=fast"], "argument --lr: invalid float value: 'fast'"),
        (["--flip=maybe"], "argument --flip: expected true or false, found 'maybe'"),
        (["--sigma_data=0"], "--sigma_data must be positive"),
        (["--image_size=96"], "--image_size 96 has no architecture"),
        (["--batch_size=6", "--microbatch=4"], "6 is not a multiple of --microbatch 4"),
        (["--resume=/nowhere/ema_0.9_1.pt"], "checkpoint /nowhere/ema_0.9_1.pt does not exist"),
        (["--precision=fp16"], "--precision fp16 needs a CUDA GPU"),
        (["--split=tset"], "tset"),
        (["--device=cuda"], "cuda"),
        (["--logger=wandb"], "pip install wandb"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(
    flags: list[str], message: str, tmp_path: Path
) -> None:
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = train(tmp_path / "w", "--max_steps=1", *flags, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_another_model_or_seed_in_the_same_folder_is_refused(uninterrupted: Path) -> None:
    before = (uninterrupted / "config.json").read_text()
    for flag, message in (
        ("--num_res_blocks=2", "holds another run (num_res_blocks 1 → 2); use the same flags"),
        ("--end_data=0.3", "holds another run (end_data 0.5 → 0.3)"),
        ("--seed=5", "holds another run (seed 0 → 5)"),
    ):
        done = train(uninterrupted.parent, "--max_steps=9", flag, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    done = train(uninterrupted.parent, "--max_steps=9", "--resume=/nowhere/a.pt", check=False)
    assert done.returncode == 2 and "checkpoint /nowhere/a.pt does not exist" in done.stderr
    assert (uninterrupted / "config.json").read_text() == before


def test_the_list_of_flags_is_deliberate() -> None:
    """A flag comes or goes only together with this list."""
    train_flags, model_flags = parser(""), parser("")
    add_flags(train_flags, TrainConfig)
    add_flags(model_flags, ModelConfig)

    def names(of: Any) -> list[str]:
        return [a.dest for a in of._actions if a.dest != "help"]

    assert names(train_flags) == [
        "dataset", "data_dir", "split", "bad_images", "fast_decode", "workdir", "batch_size",
        "microbatch", "lr", "ema_rate", "max_steps", "time_sampling", "flip", "precision",
        "compile", "activation_checkpointing", "seed", "max_bad_steps", "max_spike", "max_minutes",
        "timeout_s", "save_interval", "keep_last", "keep_every", "mirror", "async_save",
        "sample_interval", "log_interval", "num_workers", "logger",
    ]  # fmt: skip
    assert names(model_flags) == [
        "image_size", "num_channels", "latent_dim", "endpoint_channels", "stochastic",
        "num_res_blocks", "attention_resolutions", "dropout", "schedule", "sigma_data", "end_data",
        "cov_xy", "weight_schedule",
    ]  # fmt: skip
