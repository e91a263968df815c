"""Ranks that disagree, die, hang or never come: what the others do. Real processes and signals."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from group_processes import REPO, Ranks, clean_environment, free_port, rank_script

from dbae.distributed import Context

# --- Ranks that disagree -------------------------------------------------------------------------


def test_what_one_rank_cannot_do_fails_on_all_with_one_message(tmp_path: Path) -> None:
    ranks = Ranks(
        tmp_path,
        """
        def attempt(failing, error):
            try:
                with context.together():
                    if rank in failing:
                        raise error
                return "done"
            except GroupError as error:
                return f"GroupError: {error}"

        full = OSError(28, "No space left on device", "/out/a.pt")
        show([
            attempt([], UserError("x")),
            attempt([2, 1], UserError(f"no file {rank}")),
            attempt([0, 1], UserError(f"no file {rank}")),
            attempt([0, 1, 2], UserError("no file")),
            attempt([1], full),
        ])
        try:
            with context.together():
                raise Stopped("on request", 143)
        except Stopped as stopped:
            show(stopped.code)
        show(context.gather_objects(rank))
        """,
        size=3,
    )
    for rank in range(3):
        code, shown, err = ranks.end(rank)
        assert (code, err) == (0, "")
        assert shown == [
            [
                "done",
                "GroupError: rank 1: no file 1",
                "GroupError: no file 0",
                "GroupError: no file",
                "GroupError: rank 1: No space left on device: /out/a.pt",
            ],
            143,
            [0, 1, 2],
            {"left": True},
        ]


def test_a_shared_mistake_is_told_by_rank_0_alone(tmp_path: Path) -> None:
    ranks = Ranks(
        tmp_path,
        """
        with context.together():
            if rank == 1:
                raise UserError("--data_dir is empty")
        """,
    )
    assert ranks.end(0) == (2, [{"left": True}], "error: rank 1: --data_dir is empty\n")
    assert ranks.end(1) == (2, [{"left": True}], "")


def test_ranks_with_other_flags_data_or_packages_are_refused(tmp_path: Path) -> None:
    ranks = Ranks(
        tmp_path,
        """
        def compare(**what):
            try:
                context.require_same({name.replace("_", " "): what[name] for name in what})
                return "same"
            except GroupError as error:
                return str(error)

        show([
            compare(flag_lr=1e-4, data={"images": 3, "split": None}),
            compare(flag_lr=1e-4 if rank == 0 else 1e-3, data=1),
            compare(torch_version="2.14" if rank == 0 else "2.6", flag_seed=rank),
            compare(data="x" * 10**6 + str(rank)),
            compare(**({"flag_new": 1} if rank == 1 else {})),
        ])
        """,
    )
    advice = "; start all ranks with the same command, data and packages"
    for rank in (0, 1):
        code, [found, left], err = ranks.end(rank)
        assert (code, left, err) == (0, {"left": True}, "")
        assert found[0] == "same"
        assert found[1] == f"rank 1 differs from rank 0: flag lr 0.001 instead of 0.0001{advice}"
        assert found[2] == (
            "rank 1 differs from rank 0: flag seed 1 instead of 0; "
            f'torch version "2.6" instead of "2.14"{advice}'
        )
        first, second = re.findall(r"x{50,60}… \(sha256 (\w{8})\)", found[3])
        assert first != second and len(found[3]) < 300
        assert found[4] == f"rank 1 differs from rank 0: flag new 1 instead of missing{advice}"


def test_a_flag_on_any_rank_is_seen_by_all(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "show([context.any(r == rank) for r in (0, 1, 2)])")
    for rank in (0, 1):
        assert ranks.end(rank)[1][0] == [True, True, False]


def test_one_process_agrees_with_itself() -> None:
    context = Context()
    assert [context.any(flag) for flag in (True, False)] == [True, False]
    context.require_same({"data": [1, 2]})
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError) as caught, context.together():
        raise full
    assert caught.value is full


# --- Ranks that die or hang ----------------------------------------------------------------------

CONTROL = "context.any(False)"
TRAINING_STEP = "wrapped(torch.randn(4, 8)).sum().backward()"


@pytest.mark.parametrize(
    ("number", "step", "reason"),
    [
        (signal.SIGKILL, CONTROL, "the connection broke"),
        (signal.SIGKILL, TRAINING_STEP, "the connection broke"),
        (signal.SIGSTOP, CONTROL, "no answer within 3 s"),
        (signal.SIGSTOP, TRAINING_STEP, "no answer within 3 s"),
    ],
)
def test_ranks_that_are_left_end_within_the_timeout(
    tmp_path: Path, number: signal.Signals, step: str, reason: str
) -> None:
    ranks = Ranks(
        tmp_path,
        f"""
        wrapped = DistributedDataParallel(torch.nn.Linear(8, 8))
        for step in range(10**9):
            {step}
            if step == 20:
                show("running")
        """,
        timeout_s=3,
    )
    assert ranks.line(0) == ranks.line(1) == "running"
    ranks.processes[1].send_signal(number)
    try:
        # The 10 s on top are for a busy machine; without the timeout it would be for ever.
        code, shown, err = ranks.end(0, within_s=3 + 10)
    finally:
        ranks.processes[1].kill()
        ranks.end(1)
    assert code not in (0, -signal.SIGKILL)
    assert shown == [{"left": True}]
    assert err == (
        f"error: lost contact with another rank ({reason}): it died or hangs; "
        "the same command again goes on from the last checkpoint\n"
    )


def test_a_programming_error_keeps_its_traceback(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "torch.ones(2) @ torch.ones(3 - rank); context.barrier()")
    code, _, err = ranks.end(0)
    assert code == 1 and "Traceback" in err and "lost contact" not in err
    code, _, err = ranks.end(1)
    assert code != 0 and err.startswith("error: rank 1: lost contact") and err.count("\n") == 1


def test_a_port_in_use_is_named_and_holds_nobody_up(tmp_path: Path) -> None:
    with socket.socket() as other:  # takes connections and says nothing
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = Ranks(tmp_path, "show('joined')", timeout_s=2, port=port)
        assert ranks.end(0, within_s=30) == (
            2,
            [{"left": True}],
            f"error: port {port} of this machine, where the ranks are to meet, is in use: "
            "set MASTER_PORT to a free one\n",
        )
        code, shown, err = ranks.end(1, within_s=30)
    assert (code, shown) == (2, [{"left": True}])
    assert "could not join the others within 2 s" in err and err.count("\n") == 1


# --- Every way out -------------------------------------------------------------------------------


def test_the_group_is_destroyed_on_every_way_out(tmp_path: Path) -> None:
    ranks = Ranks(
        tmp_path,
        f"""
        ports = {[free_port() for _ in range(7)]}
        ways = [None, UserError("x"), GroupError("x"), ValueError("x"), KeyboardInterrupt(),
                SystemExit(143), Stopped("x", 143)]
        context.__class__.barrier(context)
        dist.destroy_process_group()
        for port, way in zip(ports, ways, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            ended = None
            try:
                with join("cpu", timeout_s=20) as inner:
                    assert inner.gather_objects(rank) == [0, 1]
                    if way is not None:
                        raise way
            except BaseException as error:
                ended = error
            show([ended is way, dist.is_initialized(), threading.active_count()])
        """,
    )
    for rank in (0, 1):
        code, shown, err = ranks.end(rank)
        assert (code, err) == (0, "")
        assert shown == [[True, False, 1]] * 7 + [{"left": True}]


# --- torchrun: restarts and its port -------------------------------------------------------------


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPO / "scripts" / "torchrun.py", "--nproc_per_node=2", *arguments]
    env = clean_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_killed_rank_restarts_the_group_which_goes_on_from_what_was_saved(
    tmp_path: Path,
) -> None:
    saved = tmp_path / "saved"
    script = rank_script(
        tmp_path,
        f"""
        import pathlib
        saved = pathlib.Path({str(saved)!r})
        first = int(saved.read_text()) if saved.exists() else 0
        context.barrier()
        for step in range(first, 20):
            context.barrier()
            if rank == 1 and step == 12 and not first:
                os.kill(os.getpid(), signal.SIGKILL)
            if context.is_main and (step + 1) % 5 == 0:
                saved.write_text(str(step + 1))
        context.print(f"from {{first}} to {{step + 1}}")
        """,
    )
    done = torchrun("--standalone", "--max_restarts=2", script)
    assert done.returncode == 0, done.stderr
    assert "from 10 to 20\n" in done.stdout
    assert saved.read_text() == "20"
    told = [line for line in done.stderr.splitlines() if "lost contact" not in line]
    assert told == ["rank 1 was killed by signal 9; restart 1 of 2"]


@pytest.mark.parametrize(
    ("code", "starts", "told"),
    [
        (2, 1, []),
        (143, 1, []),
        (7, 2, ["rank 1 ended with exit code 7; restart 1 of 1"]),
    ],
)
def test_only_what_a_restart_can_help_is_restarted(
    tmp_path: Path, code: int, starts: int, told: list[str]
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys\n"
        f"if os.environ['RANK'] == '1': print('started'); sys.exit({code})\n"
        "signal.pause()\n"  # until torchrun ends it
    )
    done = torchrun("--standalone", "--max_restarts=1", script)
    assert done.returncode == code
    assert done.stdout.count("started") == starts
    assert done.stderr.splitlines() == told


def test_torchrun_names_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        done = torchrun(f"--master_port={port}", tmp_path / "never started.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: port {port} of this machine")
    assert done.stderr.count("\n") == 1
