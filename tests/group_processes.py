"""Processes that stand for the ranks of a group, for tests of what they do to each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
LAUNCHER_PREFIXES = (
    "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "OMP_NUM_THREADS"
)  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Ours without what a launcher (of the tests themselves, say) would have set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    return kept | {"PYTHONPATH": str(REPO)}


def mpich() -> dict[str, str]:
    """The environment in which mpiexec and mpi4py's library are MPICH's; skips where it is not."""
    folder = Path(sys.prefix) / "mpich"
    libraries = sorted(folder.glob("lib/libmpi.so.*"))
    if not libraries:
        pytest.skip("no MPICH here: scripts/setup_env.sh dev installs it (Linux)")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "MPI4PY_LIBMPI": str(libraries[0])}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


# One rank: what BODY does, as an entry script does it. `show` tells the test what a rank saw.
CHILD = """
import json, os, signal, sys, threading, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from dbae import cli
from dbae.distributed import GroupError, LostContact, join
from dbae.errors import Stopped, UserError

def show(what):
    print(json.dumps(what), flush=True)

def main(argv):
    try:
        with join("cpu", timeout_s=TIMEOUT_S) as context:
            rank = context.rank
BODY
    finally:
        show({"left": not dist.is_initialized()})

cli.run(main)
"""


def rank_script(folder: Path, body: str, timeout_s: float = 30) -> Path:
    """A script that runs `body` inside of `join`."""
    script = folder / "rank.py"
    body = textwrap.indent(textwrap.dedent(body), " " * 12)
    script.write_text(CHILD.replace("TIMEOUT_S", str(timeout_s)).replace("BODY", body))
    return script


class Ranks:
    """Processes that run `body` inside of `join`, started by nothing but their environment."""

    def __init__(
        self, folder: Path, body: str, timeout_s: float = 30, size: int = 2, port: int = 0
    ) -> None:
        script = rank_script(folder, body, timeout_s)
        env = clean_environment() | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
        self.processes = [
            subprocess.Popen(
                [sys.executable, script],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip

    def line(self, rank: int) -> Any:
        """The next thing that a rank shows."""
        stdout = self.processes[rank].stdout
        assert stdout is not None
        return json.loads(stdout.readline())

    def end(self, rank: int, within_s: float = 60) -> tuple[int, list[Any], str]:
        """Exit code, all that a rank still shows, and its stderr."""
        process = self.processes[rank]
        try:
            out, err = process.communicate(timeout=within_s)
        finally:
            process.kill()
        return process.returncode, [json.loads(line) for line in out.splitlines()], err
