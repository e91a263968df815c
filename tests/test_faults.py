"""Training survives what a cluster does to it: each fault is really done (RELIABILITY.md)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import (
    ROOT,
    RUN,
    Launched,
    Running,
    assert_same_run,
    children,
    pair,
    progress,
    tensors,
    train,
)

from dbae.checkpoint import checksums_path
from dbae.data.order import BatchOrder
from dbae.distributed import Context
from dbae.errors import UserError
from dbae.guard import StepGuard
from dbae.lock import FolderLock
from dbae.presets import ModelConfig, TrainConfig
from dbae.store import SET_ASIDE, CheckpointStore
from dbae.training import Trainer

STEPS = ["--max_steps=6", "--save_interval=3"]
PAIR = ["--batch_size=2"]  # two ranks of 2 images


def resume(workdir: Path, *flags: str) -> str:
    return train(workdir, *STEPS, *flags).stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    resume(workdir)
    return workdir / RUN


@pytest.fixture(scope="module")
def uninterrupted_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pair")
    code, _, err = pair(workdir, *STEPS, *PAIR)
    assert code == 0, err
    return workdir / RUN


def one_line(err: str) -> str:
    """The error, which must be one line."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


# --- F1, F2, F4: kills and signals at any moment -------------------------------------------------


def test_f1_killed_while_any_file_of_a_checkpoint_is_written(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """Half of the file is on the disk when SIGKILL comes; four such kills, one after another."""
    for name in ("model_000003", "ema_0.9999_000003", "state_000006", "checkpoint_000006"):
        fault = f"""
import dbae.files as files
class Half:
    def __init__(self, file): self.file, self.left = file, 1000
    def write(self, data):
        self.file.write(bytes(data)[: self.left]); self.file.flush()
        self.left -= len(data)
        if self.left <= 0 or {name.startswith("checkpoint")}: os.kill(os.getpid(), signal.SIGKILL)
        return len(data)
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
import builtins
real = builtins.open
def opened(path, *args, **kwargs):
    file = real(path, *args, **kwargs)
    return Half(file) if {name!r} in str(path) and ".tmp" in str(path) else file
files.open = opened
"""
        running = Running(tmp_path, *STEPS, fault=fault)
        assert running.end()[0] == -signal.SIGKILL
        assert list((tmp_path / RUN).glob(f".{name}*.tmp"))  # it really was in the midst of it
    out = resume(tmp_path)
    # All but the hashes of step 6 had been written, so that it counts.
    assert "resuming from step 6" in out
    assert not list((tmp_path / RUN).glob(".*.tmp"))
    assert_same_run(tmp_path / RUN, uninterrupted, 6)


def test_f2_stopped_after_every_single_step(uninterrupted: Path, tmp_path: Path) -> None:
    """A time limit that is over at once: exit code 143, and each start does one step."""
    workdir = tmp_path / "out put, ünïcode"
    flags = ["--max_minutes=0.00001", "--log_interval=4"]
    for step in range(1, 6):
        done = train(workdir, *STEPS, *flags, check=False)
        assert done.returncode == 143
        assert one_line(done.stderr).startswith(
            f"--max_minutes 1e-05: stopped at step {step} of 6, all is saved; the same command"
        )
    assert train(workdir, *STEPS, *flags).returncode == 0
    whole = tmp_path / "whole"
    resume(whole, "--log_interval=4")
    assert_same_run(workdir / RUN, whole / RUN, 6)
    assert [row["step"] for row in progress(workdir / RUN)] == ["4", "6"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_makes_one_checkpoint_and_an_exit_code(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    running = Running(tmp_path, *STEPS)
    running.wait_for("step=1/")
    running.signal(number)
    code, err = running.end()
    assert code == (130 if number == signal.SIGINT else 143)
    line = one_line(err)
    stopped = re.match(rf"{number.name}: stopped at step (\d) of 6", line)
    assert stopped, line
    states = [path.name for path in (tmp_path / RUN).glob("state_*.pt")]
    assert f"state_{int(stopped[1]):06d}.pt" in states and len(states) <= 2
    resume(tmp_path)
    assert_same_run(tmp_path / RUN, uninterrupted, 6)


@pytest.mark.parametrize("background", ["false", "true"])
def test_f4_a_signal_during_a_save(background: str, uninterrupted: Path, tmp_path: Path) -> None:
    fault = """
import dbae.checkpoint as checkpoint
real = checkpoint.write
def write(path, content):
    if "model_000003" in path.name: os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3)
    return real(path, content)
checkpoint.write = write
"""
    running = Running(tmp_path, *STEPS, f"--async_save={background}", fault=fault)
    code, err = running.end()
    assert code == 143 and "SIGTERM: stopped at step" in one_line(err)
    newest = max((tmp_path / RUN).glob("state_*.pt"))
    store = CheckpointStore(tmp_path / RUN, {}, 0, 0, False, print)
    assert store.problem(int(newest.stem[-6:])) is None and store.problem(3) is None
    resume(tmp_path)
    assert_same_run(tmp_path / RUN, uninterrupted, 6)


def test_a_second_signal_ends_a_process_that_hangs_at_once(tmp_path: Path) -> None:
    """It hangs in a system call that never returns; Python handles no signal meanwhile."""
    fault = """
from dbae.training import Trainer
def hang(self, batch):
    import ctypes
    print("hanging", flush=True)
    libc = ctypes.CDLL(None)
    while True: libc.sleep(1000)
Trainer._train_step = hang
"""
    running = Running(tmp_path, *STEPS, fault=fault)
    running.wait_for("hanging")
    while running.process.is_alive():  # signals within two seconds are one request
        running.signal(signal.SIGTERM)
        running.process.join(0.5)
    code, err = running.end()
    assert code == 143 and one_line(err) == "stopped at once; the last checkpoint is whole"


def test_a_save_in_the_background_is_the_same_checkpoint(
    uninterrupted: Path, tmp_path: Path
) -> None:
    resume(tmp_path, "--async_save=true")
    for step in (3, 6):
        assert_same_run(tmp_path / RUN, uninterrupted, step)


def test_a_save_in_the_background_copies_before_training_goes_on(tmp_path: Path) -> None:
    """The write is held up until the weights have changed: the file must hold the earlier ones."""
    fault = """
import threading
import dbae.checkpoint as checkpoint
from dbae.training import Trainer
moved, real, step = threading.Event(), checkpoint.write, Trainer._train_step
def write(path, content):
    if "000001" in path.name: assert moved.wait(30)
    return real(path, content)
def train_step(self, batch):
    step(self, batch)
    if self.step == 1: moved.set()
checkpoint.write, Trainer._train_step = write, train_step
"""
    flags = ["--max_steps=2", "--save_interval=1"]
    code, err = Running(tmp_path / "a", *flags, "--async_save=true", fault=fault).end()
    assert code == 0, err
    train(tmp_path / "b", *flags)
    for step in (1, 2):
        for name in (f"model_{step:06d}.pt", f"state_{step:06d}.pt"):
            ours, theirs = (
                tensors(tmp_path / "a" / RUN / name),
                tensors(tmp_path / "b" / RUN / name),
            )
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_what_fails_in_the_background_stops_the_run_at_the_next_step(tmp_path: Path) -> None:
    fault = """
import dbae.checkpoint as checkpoint
from dbae.errors import UserError
from dbae.training import Trainer
real, step = checkpoint.write, Trainer._train_step
def write(path, content):
    if "000003" in path.name: raise UserError(f"cannot write {path}: Input/output error")
    return real(path, content)
def train_step(self, batch):
    step(self, batch)
    if self.step == 3:
        while not self.store.failed: time.sleep(0.01)
checkpoint.write, Trainer._train_step = write, train_step
"""
    running = Running(tmp_path, "--max_steps=60", "--save_interval=3", "--async_save", fault=fault)
    code, err = running.end()
    assert code == 2 and "Input/output error" in one_line(err)
    assert "step=4/" in running.out and "step=5/" not in running.out


# --- F5: checkpoints that are damaged ------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
@pytest.mark.parametrize("kind", ["model", "ema_0.9999", "state"])
def test_f5_a_damaged_newest_checkpoint_is_named_and_set_aside(
    damage: object, kind: str, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    damage(tmp_path / "run" / f"{kind}_000006.pt")  # type: ignore[operator]
    store = CheckpointStore(tmp_path / "run", {}, 0, 0, False, print)
    step, notes = store.newest_whole()
    assert step == 3
    (note,) = notes
    assert "step 6" in note and SET_ASIDE in note
    assert ("is missing" if damage is Path.unlink else f"{kind}_000006.pt is damaged") in note
    assert not list((tmp_path / "run").glob("*_000006.*"))
    aside = {path.name for path in (tmp_path / "run" / SET_ASIDE).iterdir()}
    assert "checkpoint_000006.sha256" in aside and len(aside) >= 3


def test_f5_a_run_goes_on_from_the_checkpoint_before(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / RUN)
    flip_a_bit(tmp_path / RUN / "state_000006.pt")
    out = resume(tmp_path)
    assert "passing over the checkpoint of step 6" in out and "resuming from step 3" in out
    assert_same_run(tmp_path / RUN, uninterrupted, 6)


def test_f5_none_whole_is_an_error_and_never_a_new_start(
    uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / RUN)
    for step in (3, 6):
        truncate(tmp_path / RUN / f"model_{step:06d}.pt")
    before = sorted(path.name for path in (tmp_path / RUN).iterdir())
    for _ in range(2):  # nor the second time
        done = train(tmp_path, *STEPS, check=False)
        assert done.returncode == 2
        line = one_line(done.stderr)
        assert "no checkpoint in" in line and "model_000006.pt is damaged" in line
    assert sorted(path.name for path in (tmp_path / RUN).iterdir()) == sorted({*before, ".lock"})


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_f5_without_a_whole_config_json_the_checkpoint_tells_whose_it_is(
    damage: object, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / RUN)
    damage(tmp_path / RUN / "config.json")  # type: ignore[operator]
    done = train(tmp_path, *STEPS, "--seed=5", check=False)
    assert done.returncode == 2 and "holds another run (seed 0 → 5)" in one_line(done.stderr)
    assert "step 6 of 6: done" in resume(tmp_path)
    assert (tmp_path / RUN / "config.json").stat().st_size > 1000


def test_f5_states_that_are_gone_and_hashes_that_are_empty_are_no_new_start(
    uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "a" / RUN)
    (tmp_path / "a" / RUN / "state_000006.pt").unlink()
    assert "resuming from step 3" in resume(tmp_path / "a")
    assert_same_run(tmp_path / "a" / RUN, uninterrupted, 6)
    for state in (tmp_path / "a" / RUN).glob("state_*.pt"):
        state.unlink()
    done = train(tmp_path / "a", *STEPS, check=False)
    assert done.returncode == 2 and "no checkpoint in" in one_line(done.stderr)

    shutil.copytree(uninterrupted, tmp_path / "b" / RUN)
    empty(checksums_path(tmp_path / "b" / RUN, 6))
    truncate(tmp_path / "b" / RUN / "model_000006.pt")
    assert "resuming from step 3" in resume(tmp_path / "b")
    assert_same_run(tmp_path / "b" / RUN, uninterrupted, 6)


def test_a_run_goes_back_once_to_an_earlier_checkpoint_and_goes_on_from_there(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """The second time the same command goes on from the newest, of the new history alone."""
    shutil.copytree(uninterrupted, tmp_path / RUN)
    back = [f"--resume={tmp_path / RUN / 'ema_0.9999_000003.pt'}", "--lr=0.01"]
    out = train(tmp_path, "--max_steps=4", *back).stdout
    assert "the checkpoint of step 6 is now in set_aside/" in out and "from step 3" in out
    out = train(tmp_path, "--max_steps=5", *back).stdout
    assert "resuming from step 4" in out
    assert [row["step"] for row in progress(tmp_path / RUN)] == list("12345")
    assert progress(tmp_path / RUN)[3] != progress(uninterrupted)[4]


def test_a_damaged_weight_file_is_refused_by_evaluations_too(
    uninterrupted: Path, tmp_path: Path
) -> None:
    from dbae import load_model

    shutil.copytree(uninterrupted, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "ema_0.9999_000006.pt")
    with pytest.raises(UserError, match=r"ema_0\.9999_000006\.pt is damaged .* use another"):
        load_model(tmp_path / "run")


def test_recorded_hashes_are_those_of_sha256sum(uninterrupted: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", checksums_path(uninterrupted, 6).name],
        cwd=uninterrupted, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(": OK") == 3


# --- Retention -----------------------------------------------------------------------------------


def saved(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        names = (f"model_{step:06d}.pt", f"ema_0.5_{step:06d}.pt", f"state_{step:06d}.pt")
        store.save(step, {name: {"step": step, "x": torch.ones(2)} for name in names})


def test_f15_retention_counts_in_numbers_past_a_million(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, {}, 2, 500_000, False, print)
    saved(store, 500_000, 999_998, 999_999, 1_000_000, 1_000_001)
    assert store.steps() == [1_000_001, 1_000_000, 500_000]
    assert store.newest_whole() == (1_000_001, [])
    assert not list(tmp_path.glob("*99999*"))  # no file of theirs is left


def test_retention_never_deletes_the_only_whole_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    keeping = CheckpointStore(tmp_path, {}, 0, 0, False, said.append)
    saved(keeping, 1, 2)
    store = CheckpointStore(tmp_path, {}, 1, 0, False, said.append)
    real = store.problem
    store.problem = lambda step: "unreadable" if step == 3 else real(step)  # type: ignore[method-assign]
    saved(store, 3)
    assert store.steps() == [3, 2, 1]
    assert said[-1] == "no older checkpoint is deleted, as the newer ones are damaged"
    store.problem = real  # type: ignore[method-assign]
    saved(store, 4)
    assert store.steps() == [4]


# --- F6, F7: the disk ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB, which holds one checkpoint of the small model and not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass
    return ballast


NO_FORESIGHT = "import dbae.store as store; store.require_space = lambda *_: None\n"


@pytest.mark.parametrize("foresight", [True, False])
def test_f6_a_full_disk_loses_nothing(
    foresight: bool, small_disk: Path, uninterrupted: Path
) -> None:
    """The second checkpoint finds too little room, or runs out of it in the midst."""
    code, err = Running(small_disk, *STEPS, fault="" if foresight else NO_FORESIGHT).end()
    assert code == 2
    line = one_line(err)
    assert ("too little disk for a checkpoint" if foresight else "the disk is full") in line
    store = CheckpointStore(small_disk / RUN, {}, 0, 0, False, print)
    assert store.newest_whole() == (3, []) and not list((small_disk / RUN).glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    resume(small_disk)
    assert_same_run(small_disk / RUN, uninterrupted, 6)


def test_f6_a_full_disk_while_the_log_is_written(small_disk: Path, uninterrupted: Path) -> None:
    running = Running(small_disk, *STEPS, fault=SLOW + LONG_LINES)
    running.wait_for("saved the checkpoint of step 3")
    ballast = fill(small_disk)
    code, err = running.end()
    assert code == 2
    line = one_line(err)
    assert "progress.csv: No space left on device" in line and "the same command goes on" in line
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    resume(small_disk)
    assert_same_run(small_disk / RUN, uninterrupted, 6)


# A file's last page has room for more even on a full disk: log lines that need another.
LONG_LINES = """
import dbae.runlog
append = dbae.runlog._append
dbae.runlog._append = lambda path, text: append(path, text + "#" * 8192 + "\\n")
"""
# Steps of half a second, so that a test can do something between them.
SLOW = """
from dbae.training import Trainer
step = Trainer._train_step
Trainer._train_step = lambda self, batch: (step(self, batch), time.sleep(0.5))
"""


def test_f7_a_folder_that_turns_read_only(small_disk: Path, uninterrupted: Path) -> None:
    running = Running(small_disk, *STEPS, fault=SLOW)
    running.wait_for("saved the checkpoint of step 3")
    # Detach and mount again would leave the running process with the old one.
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    (small_disk / RUN).rename(small_disk / "elsewhere")
    code, err = running.end()
    assert code == 2 and "No such file or directory" in one_line(err)
    (small_disk / "elsewhere").rename(small_disk / RUN)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = train(small_disk, *STEPS, check=False)
    assert done.returncode == 2 and "Read-only file system" in one_line(done.stderr)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    resume(small_disk)
    assert_same_run(small_disk / RUN, uninterrupted, 6)


# --- F3, F8 to F11: several processes ------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, None])
def test_f3_a_signal_to_one_rank_or_to_torchrun_stops_all_with_one_checkpoint(
    rank: int | None, uninterrupted_pair: Path, tmp_path: Path
) -> None:
    launched = Launched(tmp_path, *STEPS, *PAIR)
    launched.wait_for("step=1/")
    os.kill(launched.process.pid if rank is None else launched.rank(rank), signal.SIGTERM)
    code, err = launched.end()
    assert code == 143, err
    assert "SIGTERM: stopped at step" in one_line(err)
    assert len(list((tmp_path / RUN).glob("state_*.pt"))) in (1, 2)
    code, out, err = pair(tmp_path, *STEPS, *PAIR)
    assert code == 0, err
    assert "resuming from step" in out
    assert_same_run(tmp_path / RUN, uninterrupted_pair, 6)


def test_f11_a_killed_rank_and_an_elastic_restart(uninterrupted_pair: Path, tmp_path: Path) -> None:
    """SIGKILL for rank 1 after a checkpoint; torchrun starts both again; the end is the same."""
    launched = Launched(tmp_path, *STEPS, *PAIR, launcher=["--max_restarts=1"])
    launched.wait_for("saved the checkpoint of step 3")
    os.kill(launched.rank(1), signal.SIGKILL)
    code, err = launched.end()
    assert code == 0, err
    assert "resuming from step 3" in launched.out
    assert_same_run(tmp_path / RUN, uninterrupted_pair, 6)


def test_three_ranks_end_bit_for_bit_the_same_after_restarts(tmp_path: Path) -> None:
    """From three on, the order in which gradients are added up matters."""
    flags = ["--max_steps=4", "--batch_size=2"]
    code, _, err = pair(tmp_path / "whole", *flags, ranks=3)
    assert code == 0, err
    for expected in (143, 143, 143, 0):
        code, _, err = pair(tmp_path / "often", *flags, "--max_minutes=0.00001", ranks=3)
        assert code == expected, err
    assert_same_run(tmp_path / "often" / RUN, tmp_path / "whole" / RUN, 4)


def test_ranks_end_in_order_when_their_launcher_is_killed(
    uninterrupted_pair: Path, tmp_path: Path
) -> None:
    """SIGKILL for torchrun, which leaves it no time to end them."""
    launched = Launched(tmp_path, "--max_steps=1000", *PAIR)
    launched.wait_for("step=1/")
    ranks = [launched.rank(rank) for rank in (0, 1)]
    launched.process.kill()
    launched.end()
    for pid in ranks:
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            time.sleep(0.05)
    assert list((tmp_path / RUN).glob("state_*.pt"))


POISON = """
import torch
from dbae.model import DBAE
from dbae.training import Trainer
step, loss, DBAE.poison = Trainer._train_step, DBAE.loss, False
def train_step(self, batch):
    DBAE.poison = self.context.rank == 1 and (self.step + 1) in {steps}
    step(self, batch)
def poisoned(self, *args, **kwargs):
    terms = loss(self, *args, **kwargs)
    if DBAE.poison:
        {how}
    return terms
Trainer._train_step, DBAE.loss = train_step, poisoned
"""
NAN_LOSS = 'terms["loss"] = terms["loss"] + torch.tensor([0.0, float("nan")])'
# A finite loss whose derivative is not: √0.
NAN_GRADIENT = 'terms["loss"] = terms["loss"] + (next(self.parameters()).flatten()[:1] * 0).sqrt()'


@pytest.mark.parametrize(
    ("how", "why"),
    [(NAN_LOSS, "loss nan of 1 of 4 images"), (NAN_GRADIENT, "gradient norm nan")],
)
def test_f8_what_is_not_finite_on_one_rank_updates_none(
    how: str, why: str, uninterrupted_pair: Path, tmp_path: Path
) -> None:
    fault = POISON.format(steps="(3,)", how=how)
    code, out, err = pair(tmp_path, *STEPS, *PAIR, "--save_interval=1", fault=fault)
    assert code == 0, err
    assert f"step=3 skipped: {why}; no weight was changed" in out
    run = tmp_path / RUN
    before, after = tensors(run / "model_000002.pt"), tensors(run / "model_000003.pt")
    trained = [
        name
        for name in before  # forward passes move the buffers of batch and spectral norm
        if not re.search(r"running_|num_batches|weight_[uv]$", name)
    ]
    assert all(torch.equal(before[name], after[name]) for name in trained)
    ours, theirs = tensors(run / "state_000003.pt"), tensors(run / "state_000002.pt")
    moments = [name for name in ours if name.startswith("/optimizer")]
    assert moments and all(torch.equal(ours[name], theirs[name]) for name in moments)
    assert not all(
        torch.equal(after[name], tensors(run / "model_000004.pt")[name]) for name in trained
    )
    rows = progress(run)
    assert [row["bad_steps"] for row in rows] == ["0", "0", "1", "1", "1", "1"]
    assert rows[3]["loss"] != "nan" and rows[2]["loss"] == "nan"  # the interval had no other step
    (entry,) = map(json.loads, (run / "bad_steps.jsonl").read_text().splitlines())
    # The images can be had again from what was written.
    assert entry["step"] == 3 and entry["first_position"] == 8
    assert entry["images"] == BatchOrder(50_000, 0).indices(8, 4)
    if how is NAN_LOSS:
        (sample,) = entry["not_finite"]
        assert sample["rank"] == 1 and sample["position"] == 11
        assert sample["image"] == f"demo-{entry['images'][3]:05d}" and 0 < sample["t"] < 1


def test_f8_bad_steps_in_a_row_end_the_run_with_what_to_try(tmp_path: Path) -> None:
    fault = POISON.format(steps="range(2, 100)", how=NAN_LOSS)
    flags = ["--max_steps=50", "--save_interval=1", *PAIR, "--max_bad_steps=3"]
    code, _, err = pair(tmp_path, *flags, fault=fault)
    assert code == 2
    line = one_line(err)
    assert "3 bad steps in a row, the last at step 4 (loss nan of 1 of 4 images)" in line
    assert "Try a lower --lr" in line
    assert len((tmp_path / RUN / "bad_steps.jsonl").read_text().splitlines()) == 3


def test_bad_steps_are_counted_on_across_a_restart(tmp_path: Path) -> None:
    fault = POISON.format(steps="(1, 3)", how=NAN_LOSS).replace("rank == 1", "rank == 0")
    code, err = Running(tmp_path / "a", "--max_steps=4", fault=fault).end()
    assert code == 0, err
    for _ in range(4):
        flags = ["--max_steps=4", "--max_minutes=0.00001"]
        code, _ = Running(tmp_path / "b", *flags, fault=fault).end()
    assert code == 0
    assert_same_run(tmp_path / "b" / RUN, tmp_path / "a" / RUN, 4)
    logs = [(tmp_path / name / RUN / "bad_steps.jsonl").read_text() for name in "ab"]
    assert logs[0] == logs[1] and logs[0].count("\n") == 2


def test_f9_a_spike_of_one_step_is_skipped_where_asked_for(tmp_path: Path) -> None:
    guard = StepGuard(max_bad_steps=5, max_spike=3)
    for loss in [1.0, 2.0] * 20:
        assert not guard.spikes(loss)
        guard.applied(loss)
    assert guard.spikes(5.0) and not guard.spikes(4.0)
    off = StepGuard(5, 0)
    off.applied(1.0)
    assert not off.spikes(1e9)

    fault = POISON.format(steps="(31,)", how='terms["loss"] = terms["loss"] * 1000')
    fault = fault.replace("rank == 1", "rank == 0")
    flags = ["--max_steps=31", "--save_interval=30", "--max_spike=20"]
    running = Running(tmp_path, *flags, fault=fault)
    code, err = running.end()
    assert code == 0, err
    assert re.search(r"step=31 skipped: loss [\d.e+]+, a spike", running.out)
    run = tmp_path / RUN
    before, after = tensors(run / "state_000030.pt"), tensors(run / "state_000031.pt")
    moments = [name for name in before if name.startswith("/optimizer")]
    assert all(torch.equal(before[name], after[name]) for name in moments)


def test_an_overflow_of_fp16_is_told_apart_from_a_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler really overflows float32 here: no GPU is needed to see who is blamed."""
    model = ModelConfig(32, latent_dim=6, num_channels=32, num_res_blocks=1, endpoint_channels=4)
    config = TrainConfig(
        workdir=str(tmp_path), max_steps=2, batch_size=2, sample_interval=0, log_interval=1
    )
    trainer = Trainer(model, config, Context())
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batches = trainer._batches()
    trainer._train_step(next(batches))
    assert (trainer.guard.overflows, trainer.guard.bad) == (1, 0)
    assert trainer.scaler.get_scale() == pytest.approx(5e37)
    after = list(trainer.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    real = trainer.model.loss

    def nan_loss(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        terms = real(*args, **kwargs)  # type: ignore[arg-type]
        terms["loss"] = terms["loss"] * float("nan")
        return terms

    monkeypatch.setattr(trainer.model, "loss", nan_loss)
    trainer._train_step(next(batches))
    assert (trainer.guard.overflows, trainer.guard.bad) == (1, 1)
    assert trainer.scaler.get_scale() == pytest.approx(5e37)  # not the scale's fault
    trainer.close()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    fault = """
import torch
from dbae.training import Trainer
step = Trainer._train_step
def train_step(self, batch):
    step(self, batch)
    if self.step == 4:
        with torch.no_grad(): next(self.model.parameters()).view(-1)[0] = float("inf")
Trainer._train_step = train_step
"""
    code, err = Running(tmp_path, *STEPS, fault=fault).end()
    assert code == 2 and "the weights are no longer finite at step 6" in one_line(err)
    assert not list((tmp_path / RUN).glob("*_000006.*"))
    assert (tmp_path / RUN / "state_000003.pt").exists()


def test_f10_a_restart_with_another_world_size_trains_on_the_same_images(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """3 steps as two ranks of 2 images, 3 as one of 4: the log agrees but for rounding."""
    code, _, err = pair(tmp_path, "--max_steps=3", *PAIR)
    assert code == 0, err
    assert "resuming from step 3" in resume(tmp_path)
    ours, theirs = progress(tmp_path / RUN), progress(uninterrupted)
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            assert float(value) == pytest.approx(float(other[name]), rel=2e-3, abs=1e-6), name


def test_ranks_that_differ_are_told_before_anything_is_written(tmp_path: Path) -> None:
    fault = """
if os.environ["RANK"] == "1": sys.argv.append("--lr=0.5")
"""
    code, _, err = pair(tmp_path, *STEPS, *PAIR, fault=fault)
    assert code == 2
    line = one_line(err)
    assert "rank 1 differs from rank 0" in line and "--lr" in line and "0.5" in line
    assert not list(tmp_path.rglob("*.pt"))


# --- F12: data-loading workers -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that train from a folder of pictures by a worker process."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [
        "--dataset=folder", f"--data_dir={folder}", "--image_size=32", "--num_channels=32",
        "--num_res_blocks=1", "--max_steps=12", "--save_interval=12",
    ]  # fmt: skip


FOLDER_RUN = "folder32_32_6d_true_vp"


@pytest.fixture(scope="module")
def without_workers(pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("none")
    train(workdir, *pictures, "--num_workers=0")
    return workdir / FOLDER_RUN


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_f12_a_worker_that_is_killed_is_replaced(
    number: signal.Signals, pictures: list[str], without_workers: Path, tmp_path: Path
) -> None:
    running = Running(tmp_path, *pictures, "--num_workers=1", fault=SLOW)
    running.wait_for("step=2/")
    (worker,) = children(running.pid)
    running.signal(number, worker)
    code, err = running.end()
    assert code == 0, err
    assert f"DataLoader worker (pid(s) {worker}) exited unexpectedly" in one_line(err)
    assert "loading starts anew at step" in err
    assert_same_run(tmp_path / FOLDER_RUN, without_workers, 12)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("time.sleep(1000)", "a data-loading worker gave nothing for 2 s"),
        ("raise MemoryError", "data loading ran out of memory; use fewer --num_workers"),
    ],
)
def test_f12_a_worker_that_hangs_or_runs_out_of_memory_is_replaced(
    trouble: str, message: str, pictures: list[str], without_workers: Path, tmp_path: Path
) -> None:
    """Once, at its fifth image; a file tells the next worker that it has happened."""
    fault = f"""
from dbae.data.datasets import ImageDataset
real, seen, marker = ImageDataset.__getitem__, [], Path({str(tmp_path / "happened")!r})
def item(self, i):
    seen.append(i)
    if len(seen) == 5 and not marker.exists():
        marker.touch()
        {trouble}
    return real(self, i)
ImageDataset.__getitem__ = item
"""
    flags = [*pictures, "--num_workers=1", "--timeout_s=4"]
    code, err = Running(tmp_path, *flags, fault=fault).end()
    assert code == 0, err
    assert message in one_line(err) and "loading starts anew at step" in err
    assert_same_run(tmp_path / FOLDER_RUN, without_workers, 12)


@pytest.mark.parametrize("error", ["ConnectionResetError(104, 'Connection reset')", "EOFError"])
def test_f12_a_worker_that_dies_while_it_hands_over_a_batch_is_replaced(
    error: str, pictures: list[str], without_workers: Path, tmp_path: Path
) -> None:
    """What torch then raises, at the fourth batch; the moment itself cannot be met at will."""
    fault = f"""
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Iterator
real, calls = Iterator._try_get_data, []
def get(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 4: raise {error}
    return real(self, *args, **kwargs)
Iterator._try_get_data = get
"""
    code, err = Running(tmp_path, *pictures, "--num_workers=1", fault=fault).end()
    assert code == 0, err
    assert "a data-loading worker went away (" in one_line(err)
    assert_same_run(tmp_path / FOLDER_RUN, without_workers, 12)


def test_f12_workers_that_never_live_end_the_run_in_one_line(
    pictures: list[str], tmp_path: Path
) -> None:
    fault = """
from dbae.data.datasets import ImageDataset
ImageDataset.__getitem__ = lambda self, i: os.kill(os.getpid(), signal.SIGKILL)
"""
    running = Running(tmp_path, *pictures, "--num_workers=1", fault=fault)
    code, err = running.end()
    assert code == 2
    *notes, last = err.splitlines()
    assert len(notes) == 3 and all("loading starts anew at step 1" in note for note in notes)
    assert last.startswith("error: DataLoader worker") and "--num_workers" in last


def test_a_signal_to_the_whole_process_group_stops_in_order(
    pictures: list[str], without_workers: Path, tmp_path: Path
) -> None:
    running = Running(tmp_path, *pictures, "--num_workers=1", fault=SLOW)
    running.wait_for("step=1/")
    os.killpg(running.pid, signal.SIGTERM)
    code, err = running.end()
    assert code == 143 and "SIGTERM: stopped at step" in one_line(err)
    train(tmp_path, *pictures)
    assert_same_run(tmp_path / FOLDER_RUN, without_workers, 12)


# --- F15: two trainers, stale locks --------------------------------------------------------------


def test_f15_the_second_trainer_on_a_folder_refuses_and_names_the_first(
    uninterrupted: Path, tmp_path: Path
) -> None:
    first = Running(tmp_path, *STEPS, fault=SLOW)
    first.wait_for("step=1/")
    second = train(tmp_path, *STEPS, check=False)
    assert second.returncode == 2
    assert f"is in use by pid {first.pid} on host" in one_line(second.stderr)
    first.signal(signal.SIGKILL)
    first.end()
    out = resume(tmp_path)
    assert f"the lock of pid {first.pid} on host" in out and "was taken over" in out
    assert_same_run(tmp_path / RUN, uninterrupted, 6)


def test_a_lock_ends_with_its_process_and_not_with_a_worker_that_outlives_it(
    tmp_path: Path,
) -> None:
    script = """
import os, sys, time
from pathlib import Path
from dbae.lock import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
if os.fork() == 0:
    time.sleep(60)
print("locked", flush=True)
os._exit(1)
"""
    done = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    assert done.wait(30) == 1
    try:
        with FolderLock(tmp_path) as lock:
            assert lock.stale == f"pid {done.pid} on host {os.uname().nodename}"
            with pytest.raises(UserError, match=f"in use by pid {os.getpid()}"):
                FolderLock(tmp_path).acquire()
        with FolderLock(tmp_path) as lock:
            assert lock.stale is None
    finally:
        os.killpg(done.pid, signal.SIGKILL)


def test_where_a_file_system_has_no_locks_the_holders_word_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dbae.lock

    monkeypatch.setattr(dbae.lock, "_lock", lambda handle: None)
    content = tmp_path / ".lock"
    other = {"host": "elsewhere", "pid": 1, "started": 5}
    content.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"pid 1 on host elsewhere; .* \(if it is gone, delete "):
        FolderLock(tmp_path).acquire()
    # This machine's: its process number has been given to another process since.
    content.write_text(json.dumps({**dbae.lock._this_process(), "started": 1}))
    with FolderLock(tmp_path) as lock:
        assert lock.stale is not None


# --- The mirror ----------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_mirror_on_a_machine_that_has_nothing(
    uninterrupted: Path, tmp_path: Path
) -> None:
    mirror = [f"--mirror={tmp_path / 'elsewhere'}", "--keep_last=1", "--keep_every=0"]
    out = train(tmp_path / "a", "--max_steps=3", "--save_interval=1", *mirror).stdout
    assert "mirrored the checkpoint of step 3" in out
    there = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert there == {
        "config.json", "progress.csv", "checkpoint_000003.sha256", "model_000003.pt",
        "ema_0.9999_000003.pt", "state_000003.pt",
    }  # fmt: skip
    out = resume(tmp_path / "b", *mirror)
    assert "the checkpoint of step 3 was brought from the mirror" in out
    assert "resuming from step 3" in out
    assert_same_run(tmp_path / "b" / RUN, uninterrupted, 6)


def test_a_damaged_mirror_is_no_new_start(uninterrupted: Path, tmp_path: Path) -> None:
    mirror = [f"--mirror={tmp_path / 'elsewhere'}"]
    resume(tmp_path / "a", *mirror)
    flip_a_bit(tmp_path / "elsewhere" / "model_000006.pt")
    out = resume(tmp_path / "b", *mirror)
    assert "the copy of step 6 in the mirror is not used" in out and "from step 3" in out
    assert_same_run(tmp_path / "b" / RUN, uninterrupted, 6)
    flip_a_bit(tmp_path / "elsewhere" / "model_000003.pt")
    flip_a_bit(tmp_path / "elsewhere" / "state_000006.pt")
    done = train(tmp_path / "c", *STEPS, *mirror, check=False)
    assert done.returncode == 2 and "no copy in the mirror is whole" in one_line(done.stderr)


def test_a_mirror_serves_one_run_and_never_its_own_folder(tmp_path: Path) -> None:
    """Neither a run that has checkpoints nor an empty folder takes over another's mirror."""
    mirror = f"--mirror={tmp_path / 'elsewhere'}"
    resume(tmp_path / "a", mirror)
    before = (tmp_path / "elsewhere" / "config.json").read_text()
    train(tmp_path / "b", "--max_steps=1", "--seed=1")
    for workdir in ("b", "c"):
        done = train(tmp_path / workdir, *STEPS, "--seed=1", mirror, check=False)
        assert done.returncode == 2
        assert f"{tmp_path / 'elsewhere'} holds another run (seed 0 → 1)" in one_line(done.stderr)
    assert (tmp_path / "elsewhere" / "config.json").read_text() == before
    assert not list((tmp_path / "c" / RUN).glob("*.pt"))
    done = train(tmp_path / "a", *STEPS, f"--mirror={tmp_path / 'a' / RUN}", check=False)
    assert done.returncode == 2 and "is the run's own folder" in one_line(done.stderr)
    assert "step 6 of 6: done" in resume(tmp_path / "a", mirror)


def test_a_newer_copy_in_the_mirror_is_gone_on_from(uninterrupted: Path, tmp_path: Path) -> None:
    mirror = f"--mirror={tmp_path / 'elsewhere'}"
    train(tmp_path / "a", "--max_steps=2", mirror)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "b", "--max_steps=4", mirror)
    out = resume(tmp_path / "a", mirror)
    assert "resuming from step 4" in out
    assert_same_run(tmp_path / "a" / RUN, uninterrupted, 6)


def test_a_mirror_that_is_lost_does_not_stop_training_and_is_told_at_the_end(
    tmp_path: Path,
) -> None:
    fault = """
from dbae.remote import Mirror
from dbae.errors import UserError
upload = Mirror.upload
def lost(self, names):
    if "config.json" != names[0]: raise UserError("cannot upload: connection refused")
    upload(self, names)
Mirror.upload = lost
"""
    running = Running(tmp_path, *STEPS, f"--mirror={tmp_path / 'elsewhere'}", fault=fault)
    code, err = running.end()
    assert code == 2 and one_line(err) == "error: cannot upload: connection refused"
    assert "not mirrored: cannot upload: connection refused; it is tried again" in running.out
    assert "step=6/6" in running.out and (tmp_path / RUN / "state_000006.pt").exists()
    # The same command again makes up for it.
    assert "mirrored the checkpoint of step 6" in resume(
        tmp_path, f"--mirror={tmp_path / 'elsewhere'}"
    )
