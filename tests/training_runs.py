"""Small training runs in processes of their own, whole and interrupted, and their comparison."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, str(ROOT / "scripts" / "dbae_train.py")]
# A model that takes a few milliseconds a step.
SMALL = [
    "--attention_resolutions=", "--endpoint_channels=4", "--latent_dim=6", "--dropout=0.1",
    "--stochastic=true", "--flip=true", "--batch_size=4", "--microbatch=2", "--log_interval=1",
    "--sample_interval=0", "--device=cpu", "--precision=fp32",
]  # fmt: skip
RUN = "demo32_32_6d_true_vp"
TIMED_COLUMNS = ("images_per_s", "seconds", "data_wait")


class Running:
    """A training run in a process of its own, which a test waits for, line by line.

    Not a new interpreter, which takes seconds to import torch, but a fork of one that has done
    only that: `multiprocessing`'s forkserver. Signals, sessions and exit codes are real.

    Args:
        workdir: the run's.
        flags: after those in SMALL.
        fault: a Python snippet that is executed before training starts.
        env: variables of its environment.
    """

    def __init__(self, workdir: Path, *flags: str, fault: str = "", **env: str) -> None:
        self._out, self._err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        command = ["dbae_train.py", *SMALL, f"--workdir={workdir}", *flags]
        paths = (self._out.name, self._err.name)
        self.process = _forkserver().Process(target=_train, args=(command, fault, env, *paths))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return Path(self._out.name).read_text()

    def wait_for(self, text: str) -> None:
        """Wait until it has printed a line that contains the text."""
        while text not in self.out.rpartition("\n")[0]:
            if not self.process.is_alive() and text not in self.out:
                raise AssertionError(f"no {text!r} in: {self.out}\n{self.end()[1]}")
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code and stderr."""
        self.process.join(60)
        code = self.process.exitcode
        assert code is not None, f"it hangs: {self.out}\n{Path(self._err.name).read_text()}"
        return code, Path(self._err.name).read_text()

    def signal(self, number: signal.Signals, pid: int | None = None) -> None:
        os.kill(pid or self.pid, number)


def train(
    workdir: Path, *flags: str, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """A run from its start to its end."""
    running = Running(workdir, *flags, **env)
    code, err = running.end()
    assert not check or code == 0, err
    return subprocess.CompletedProcess([*flags], code, running.out, err)


def pair(workdir: Path, *flags: str, fault: str = "", ranks: int = 2) -> tuple[int, str, str]:
    """Two (or more) gloo ranks from start to end: largest exit code, stdout and stderr of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        Running(workdir, *flags, fault=fault, RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank in range(ranks)
    ]
    ends = [rank.end() for rank in running]
    outs = "".join(rank.out for rank in running)
    return max(code for code, _ in ends), outs, "".join(err for _, err in ends)


def _forkserver() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["dbae.training", "dbae.presets", "training_runs"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return server


def _train(command: list[str], fault: str, env: dict[str, str], out: str, err: str) -> None:
    """In the fork: what `python scripts/dbae_train.py …` does."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as outside of tests
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.update(env)
    sys.argv = command
    sys.path.insert(0, str(ROOT / "scripts"))
    exec("import os, signal, sys, time\nfrom pathlib import Path\n" + fault, {})
    import dbae_train

    from dbae import cli

    cli.run(dbae_train.main)


def progress(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in TIMED_COLUMNS} for row in csv.DictReader(file)
        ]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint file, by their path within it."""
    found = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)

    walk("", torch.load(path, weights_only=True))
    assert found
    return found


def assert_same_run(found: Path, expected: Path, step: int) -> None:
    for name in (f"model_{step:06d}.pt", f"ema_0.9999_{step:06d}.pt", f"state_{step:06d}.pt"):
        ours, theirs = tensors(found / name), tensors(expected / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not different, f"{name}: {different[:3]}"
    assert progress(found) == progress(expected)


class Launched:
    """Two ranks under scripts/torchrun.py, a real launch; read and signalled like `Running`."""

    def __init__(self, workdir: Path, *flags: str, launcher: Sequence[str] = ()) -> None:
        torchrun = [str(ROOT / "scripts" / "torchrun.py"), "--standalone", "--nproc_per_node=2"]
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, *launcher, *TRAIN[1:], *SMALL, f"--workdir={workdir}",
             *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        self.out = ""

    def wait_for(self, text: str) -> None:
        """Read output up to and including the line that contains the text."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.out += line
            if text in line:
                return
        raise AssertionError(f"no {text!r} in: {self.out}\n{self.end()[1]}")

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code and stderr."""
        out, err = self.process.communicate(timeout=60)
        self.out += out
        return self.process.returncode, err

    def rank(self, rank: int) -> int:
        """The process of a rank, found by the environment that torchrun gave it."""
        for pid in children(self.process.pid):
            if f"RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
        raise AssertionError(f"no rank {rank}")


def children(pid: int) -> list[int]:
    """Processes that this one started and that live."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
