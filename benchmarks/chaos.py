"""A training run under random faults, round after round, against one that nobody disturbs.

    python3 benchmarks/chaos.py --rounds 100 --ranks 2 --seed 0

Each round starts the training command anew and does one fault to it: SIGKILL, SIGTERM or SIGUSR1
to one rank, to the launcher or to the whole process group, at a random moment, while a checkpoint
is written, or while the run is being loaded; or damage to the newest checkpoint after a kill. When
a run reaches its end, its weights, averaged weights, optimizer and log must be equal, bit for bit,
to the undisturbed run's, and the next run begins. Exit code 1 where anything differs, a process
survives its round, or a round ends in a way that README does not describe.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RUN = "demo32_32_6d_true_vp"
STEPS = 60
FLAGS = [
    "--attention_resolutions=", "--endpoint_channels=4", "--latent_dim=6", "--dropout=0.1",
    "--stochastic=true", "--batch_size=2", "--microbatch=1", "--log_interval=3",
    "--sample_interval=0", "--device=cpu", f"--max_steps={STEPS}", "--save_interval=4",
    "--keep_last=3", "--num_workers=1", "--timeout_s=60",
]  # fmt: skip
# What is done, and when.
FAULTS = (
    "SIGKILL one rank", "SIGKILL all", "SIGTERM one rank", "SIGTERM launcher", "SIGTERM all",
    "SIGUSR1 launcher", "SIGTERM after a loading worker's SIGKILL",
)  # fmt: skip
MOMENTS = ("any", "any", "save", "load")
DAMAGE = ("none", "none", "none", "bit flip", "truncation")


@dataclasses.dataclass
class Round:
    """What was done in a round and what came of it."""

    fault: str
    moment: str
    damage: str
    code: int
    trouble: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="(default: 20)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, 1 or more (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--async_save", action="store_true", help="train with --async_save")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        return _soak(options, dice, Path(folder))


def _soak(options: argparse.Namespace, dice: random.Random, folder: Path) -> int:
    command = _command(options)
    started = time.perf_counter()
    subprocess.run([*command, f"--workdir={folder / 'whole'}"], env=_env(), check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    print(f"the undisturbed run of {STEPS} steps took {time.perf_counter() - started:.0f} s")
    rounds: list[Round] = []
    runs = 0
    while len(rounds) < options.rounds:
        workdir = folder / f"run {runs}"
        while len(rounds) < options.rounds:
            done = _round(command, workdir, dice)
            rounds.append(done)
            print(f"{len(rounds):4} {done.fault:41} {done.moment:5} {done.damage:10} "
                  f"exit {done.code:4} step {_newest(workdir / RUN):3} {done.trouble}",
                  flush=True)  # fmt: skip
            if done.code == 0:
                break
        subprocess.run([*command, f"--workdir={workdir}"], env=_env(), stdout=subprocess.DEVNULL)
        trouble = _difference(workdir / RUN, folder / "whole" / RUN)
        print(f"run {runs} after {len(rounds)} rounds: {trouble or 'equal, bit for bit'}")
        rounds[-1].trouble += trouble
        shutil.rmtree(workdir, ignore_errors=True)
        runs += 1
    return _summary(rounds, runs, options)


def _command(options: argparse.Namespace) -> list[str]:
    train = [str(ROOT / "scripts" / "dbae_train.py"), *FLAGS]
    if options.async_save:
        train.append("--async_save")
    if options.ranks == 1:
        return [sys.executable, *train]
    torchrun = [str(ROOT / "scripts" / "torchrun.py"), "--standalone"]
    return [sys.executable, *torchrun, f"--nproc_per_node={options.ranks}", *train]


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _round(command: list[str], workdir: Path, dice: random.Random) -> Round:
    """Start, wait for the moment, do the fault, wait for the end, look for what is left."""
    fault, moment, damage = dice.choice(FAULTS), dice.choice(MOMENTS), dice.choice(DAMAGE)
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"], env=_env(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _wait_for(moment, process, workdir / RUN, dice)
    _do(fault, process, dice)
    trouble = ""
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        trouble = "it hung; "
    code = process.returncode
    expected = {0, 143} if "TERM" in fault or "USR1" in fault else {0, 137, -9, 2}
    # Before the handlers are there, a signal just kills; nothing is lost then.
    if "TERM" in fault or "USR1" in fault:
        expected |= {-15, -10, 138}
    if code not in expected:
        trouble += f"exit code {code}: {err[-300:]!r}; "
    if "Traceback (most recent" in err:
        trouble += f"a traceback: {err[-300:]!r}; "
    if left := _survivors(workdir):
        trouble += f"processes {left} survived; "
    damage = _damage(damage, workdir / RUN) if code else "none"
    return Round(fault, moment, damage, code, trouble)


def _wait_for(
    moment: str, process: subprocess.Popen[str], folder: Path, dice: random.Random
) -> None:
    """Until a random time has passed, a checkpoint is being written, or loading has begun."""
    if moment == "load":
        time.sleep(dice.uniform(0, 4))
        return
    before = _newest(folder)
    while process.poll() is None and _newest(folder) <= before:
        time.sleep(0.01)
    if moment == "any":
        time.sleep(dice.uniform(0, 2))
        return
    while process.poll() is None and not list(folder.glob(".*.tmp")):
        time.sleep(0.0005)


def _do(fault: str, process: subprocess.Popen[str], dice: random.Random) -> None:
    if process.poll() is not None:
        return
    word, _, whom = fault.partition(" ")
    number = signal.Signals[word]
    try:
        if whom.startswith("after"):
            if workers := _workers(process.pid):
                os.kill(dice.choice(workers), signal.SIGKILL)
                time.sleep(2)
            whom = "launcher"
        if whom == "all":
            os.killpg(process.pid, number)
            for pid in _descendants(process.pid):  # torchrun gives ranks sessions of their own
                os.kill(pid, number)
        elif whom == "launcher":
            os.kill(process.pid, number)
        else:
            ranks = list(_children(process.pid)) or [process.pid]
            os.kill(dice.choice(ranks), number)
    except ProcessLookupError:
        pass  # it ended just now


def _children(pid: int) -> Iterator[int]:
    try:
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return


def _descendants(pid: int) -> list[int]:
    found = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found


def _workers(pid: int) -> list[int]:
    """Data-loading processes: those without children of their own, if they are not ranks."""
    ranks = set(_children(pid))
    return [d for d in _descendants(pid) if d not in ranks and not list(_children(d))]


def _survivors(workdir: Path) -> list[int]:
    """Processes of the round that are there ten seconds after its end: by their command line."""
    mark = f"--workdir={workdir}".encode()
    for _ in range(100):
        left = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and mark in _read(path / "cmdline")
        ]
        if not left:
            return []
        time.sleep(0.1)
    return left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _newest(folder: Path) -> int:
    return max((int(path.stem.rpartition("_")[2]) for path in folder.glob("state_*.pt")), default=0)


def _damage(kind: str, folder: Path) -> str:
    """Damage one file of the newest of several checkpoints; what was really done."""
    steps = sorted(folder.glob("state_*.pt"))
    if kind == "none" or len(steps) < 2:
        return "none"
    data = bytearray(steps[-1].read_bytes())
    if kind == "bit flip":
        data[len(data) // 3] ^= 4
    else:
        del data[len(data) // 3 :]
    steps[-1].write_bytes(data)
    return kind


def _difference(found: Path, expected: Path) -> str:
    """The first difference between two finished runs, in words; "" where they are equal."""
    names = (f"model_{STEPS:06d}.pt", f"ema_0.9999_{STEPS:06d}.pt", f"state_{STEPS:06d}.pt")
    for name in names:
        try:
            ours, theirs = (
                _tensors(torch.load(f / name, weights_only=True)) for f in (found, expected)
            )
        except OSError as error:
            return f"{error}; "
        if ours.keys() != theirs.keys():
            return f"{name} has other entries; "
        for key, value in theirs.items():
            if not torch.equal(ours[key], value):
                return f"{name}: {key} differs; "
    return "" if _log(found) == _log(expected) else "progress.csv differs; "


def _tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, (list, tuple)):
        entries = enumerate(value)
    return {k: v for key, item in entries for k, v in _tensors(item, f"{name}/{key}").items()}


def _log(folder: Path) -> list[list[str]]:
    with open(folder / "progress.csv", newline="") as file:
        return [row[:-2] for row in csv.reader(file)]  # the last two columns are times


def _summary(rounds: list[Round], runs: int, options: argparse.Namespace) -> int:
    print(f"\n{len(rounds)} rounds with {options.ranks} rank(s), seed {options.seed}, "
          f"{'background' if options.async_save else 'plain'} saves; {platform.machine()}, "
          f"{os.cpu_count()} cores, torch {torch.__version__}")  # fmt: skip
    counted = collections.Counter((r.fault, r.moment) for r in rounds)
    for (fault, moment), count in sorted(counted.items()):
        codes = collections.Counter(
            r.code for r in rounds if (r.fault, r.moment) == (fault, moment)
        )
        print(f"{fault:41} {moment:5} {count:4}   exit codes {dict(sorted(codes.items()))}")
    damaged = sum(r.damage != "none" for r in rounds)
    troubles = [r for r in rounds if r.trouble]
    print(f"checkpoints damaged in between: {damaged}; runs to the end: {runs}; "
          f"rounds with trouble: {len(troubles)}")  # fmt: skip
    for r in troubles:
        print(f"  {r.fault}, {r.moment}: {r.trouble}")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
