"""An evaluation that is killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import dbae
from dbae.checkpoint import load_model, save_weights
from dbae.data import ImageDataset, open_dataset
from dbae.distributed import Context, join
from dbae.errors import UserError
from dbae.evaluation import latents, probing
from dbae.evaluation.classification import Classification, ClassificationConfig
from dbae.evaluation.latents import latents_of
from dbae.evaluation.reconstruction import ReconstructionConfig, run
from dbae.evaluation.unfinished import Unfinished
from dbae.lock import FolderLock

TESTS = Path(__file__).parent
SCRIPTS = TESTS.parent / "scripts"
CONFIG = ReconstructionConfig(num_samples=3, batch_size=1, steps=1, churn=0.3)


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder of results, by name, but for the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def records(folder: Path) -> set[str]:
    """The names of the pieces that a killed run has left."""
    return {path.stem for path in (folder / "unfinished").glob("*.done")}


@pytest.fixture(scope="module")
def demo() -> ImageDataset:
    return open_dataset("demo", None, 32, "test")


def evaluate(
    model: dbae.DBAE, data: ImageDataset, out: Path, config: ReconstructionConfig = CONFIG
) -> dict[str, bytes]:
    """The files of a reconstruction run."""
    assert run(model, data, config, Context(), out, progress=False)
    assert not (out / "unfinished").exists()
    return contents(out)


@contextlib.contextmanager
def calls_of(module: torch.nn.Module) -> Iterator[list[int]]:
    """Gets an entry for each call."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def interrupt(monkeypatch: pytest.MonkeyPatch, pieces: int, act: Callable[[], Any]) -> None:
    """Press Ctrl-C after so many pieces."""
    keep, kept = Unfinished.keep, []

    def keep_or_stop(self: Unfinished, *arguments: Any) -> None:
        if len(kept) == pieces:
            raise KeyboardInterrupt
        kept.append(1)
        keep(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Unfinished, "keep", keep_or_stop)
        act()


# Killed at every point ----------------------------------------------------------------------


def sweep_reconstruction(checkpoint: Path, base: Path) -> None:
    model, data = load_model(checkpoint, "cpu"), open_dataset("demo", None, 32, "test")

    def act(out: Path, count: int) -> None:
        config = dataclasses.replace(CONFIG, num_samples=count, churn=0)
        run(model, data, config, Context(), out, False, checkpoint=checkpoint)

    def left(out: Path, published: bool) -> int:
        return 2 - len(records(out))

    sweep(act, "metrics.json", left, model, base)


def sweep_latents(checkpoint: Path, base: Path) -> None:
    model, data = load_model(checkpoint, "cpu"), open_dataset("demo", None, 32, "test")
    latents._PART_IMAGES = 1

    def act(out: Path, count: int) -> None:
        latents_of(model, data, Context(), checkpoint, count=count, batch_size=1, folder=out)

    def left(out: Path, published: bool) -> int:
        return 0 if published else 2 - len(records(out))

    sweep(act, latents.NPZ, left, model, base)


def sweep(
    act: Callable[[Path, int], None],
    last: str,
    left: Callable[[Path, bool], int],
    model: dbae.DBAE,
    base: Path,
) -> None:
    """Kill an evaluation of two pieces before each change that it makes to a folder with earlier
    results, then run it again.

    To be called in a process of its own, which forks. `left`: how many pieces the second has to do,
    in the folder and where `last` is published or not.
    """
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a killed process needs none, and it takes half of the time
    act(base / "earlier", 1)
    act(base / "whole", 2)
    earlier, whole = contents(base / "earlier"), contents(base / "whole")
    kills = 0
    while True:
        out = base / f"killed_{kills}"
        shutil.copytree(base / "earlier", out)
        code = in_child(functools.partial(killed_before, kills, act, out))
        found = contents(out)
        if code == 0:
            assert found == whole
            break
        assert code == -signal.SIGKILL
        published = found.get(last) == whole[last]
        # What is there is of one run, and complete; else its publication has begun.
        if last in found:
            assert found == (whole if published else earlier), out
        else:
            assert (out / "unfinished" / "publishing.json").exists()
        to_do = left(out, published)
        assert in_child(functools.partial(counted, model, act, out)) == to_do, out
        assert contents(out) == whole, out
        assert not (out / "unfinished").exists() or not any((out / "unfinished").iterdir())
        shutil.rmtree(out)
        kills += 1
    print(f"{kills} kills")


def alone(function: str, checkpoint: Path, base: Path) -> str:
    """Call a function of this module with these paths in a process of its own; its output."""
    code = (
        f"import sys; from pathlib import Path; from test_evaluation_resume import {function}\n"
        f"{function}(*map(Path, sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(base)],
        cwd=TESTS, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def in_child(act: Callable[[], int]) -> int:
    """The exit code of a fork that ends with what `act` returns."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(act), 0)[1])


def fork(act: Callable[[], int]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = act()
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def killed_before(change: int, act: Callable[[Path, int], None], out: Path) -> int:
    """Die before the given file is moved or deleted; 0 where there are not so many changes."""
    seen: list[str] = []

    def watched(change_disk: Callable[..., Any]) -> Callable[..., Any]:
        def change_or_die(path: Any, *arguments: Any, **options: Any) -> Any:
            deletes_nothing = not arguments and str(path).endswith(".tmp")
            if not deletes_nothing:
                if len(seen) == change:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.append(str(path))
            return change_disk(path, *arguments, **options)

        return change_or_die

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    act(out, 2)
    return 0


def counted(model: dbae.DBAE, act: Callable[[Path, int], None], out: Path) -> int:
    """How many images were encoded."""
    with calls_of(model.encoder) as calls:
        act(out, 2)
    return len(calls)


@pytest.mark.parametrize(("kind", "at_least"), [("reconstruction", 30), ("latents", 15)])
def test_killed_before_any_change_of_the_disk_it_ends_the_same_and_mixes_nothing(
    kind: str, at_least: int, checkpoint: Path, tmp_path: Path
) -> None:
    said = alone(f"sweep_{kind}", checkpoint, tmp_path)
    assert int(said.split()[-2]) >= at_least


# Real commands ------------------------------------------------------------------------------

# Before the n-th piece of this process is recorded.
SIGNALLED = """
from dbae.evaluation.unfinished import Unfinished
keep, kept = Unfinished.keep, []
def keep_or_die(self, *arguments):
    if len(kept) == {pieces}:
        {act}
    kept.append(1)
    keep(self, *arguments)
Unfinished.keep = keep_or_die
"""


def dies(pieces: int, number: signal.Signals) -> str:
    return SIGNALLED.format(pieces=pieces, act=f"os.kill(os.getpid(), {number:d})")


def start(script: str, *flags: str, fault: str = "") -> subprocess.Popen[str]:
    """An entry point in a process of its own, after a Python snippet that will harm it."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(SCRIPTS)!r}); import {script}\n{fault}\n"
        f"from dbae import cli; cli.run({script}.main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(*processes: subprocess.Popen[str]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and complaints."""
    said = [process.communicate(timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    return codes, [out for out, _ in said], [err for _, err in said]


@pytest.fixture
def reconstruct(checkpoint: Path) -> list[str]:
    """The command: six batches."""
    return [
        "dbae_reconstruction", "--checkpoint", str(checkpoint), "--num_samples", "11",
        "--batch_size", "2", "--steps", "2", "--churn", "0.33", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own of 1 MB, where this user may mount one, else a folder."""
    disk = tmp_path_factory.mktemp("disk, à côté")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield disk
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_second_evaluation_of_a_folder_is_refused_and_stopped_ones_end_as_the_first(
    reconstruct: list[str],
    model: dbae.DBAE,
    demo: ImageDataset,
    small_disk: Path,
    tmp_path: Path,
) -> None:
    whole, out = tmp_path / "whole", small_disk / "out"
    unfinished = out / "unfinished"
    waits = SIGNALLED.format(pieces=1, act="print('here', flush=True); sys.stdin.readline()")
    first = start(*reconstruct, "--output_dir", str(whole), fault=waits)
    assert first.stdout is not None and any(line == "here\n" for line in first.stdout)
    with pytest.raises(UserError, match=f"is in use by pid {first.pid} on host"):
        evaluate(model, demo, whole)
    assert end(first)[0] == [0]

    ways = [
        (dies(1, signal.SIGKILL), [-signal.SIGKILL]),
        (dies(1, signal.SIGTERM), [143]),
        (dies(1, signal.SIGINT), [130]),
    ]
    ballast = small_disk / "ballast"
    if os.path.ismount(small_disk):
        fills = f"open({str(ballast)!r}, 'wb', 0).write(bytes(2**20))"
        ways.append((SIGNALLED.format(pieces=1, act=fills), [2]))
    for before, (fault, codes) in enumerate(ways):
        (code,), (said,), (complaint,) = end(
            start(*reconstruct, "--output_dir", str(out), fault=fault)
        )
        assert code in codes and complaint.count("\n") <= 1, complaint
        resumed = f"resuming: {before} of 6 batches are done ({unfinished})\n"
        assert (resumed in said) == (before > 0) and "done again" not in said
        assert len(records(out)) == before + 1
    if ballast.exists():
        assert complaint.startswith("error: cannot write ") and complaint.endswith(" full\n")
        ballast.unlink()
    (code,), (said,), complaints = end(start(*reconstruct, "--output_dir", str(out)))
    assert code == 0, complaints
    assert f"resuming: {len(ways)} of 6 batches are done" in said
    assert f"reconstructed {2 * (6 - len(ways)) - 1}/{2 * (6 - len(ways)) - 1} images" in said
    assert contents(out) == contents(whole)


# Two ranks, a probe -------------------------------------------------------------------------


def two_ranks(
    act: Callable[[Context], Any], base: Path, pieces: tuple[int, int] = (99, 99)
) -> tuple[list[int], list[str]]:
    """Fork two ranks, each of which is killed after so many pieces; exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def be(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        sys.stdout = open(base / f"said_by_{rank}", "w")  # noqa: SIM115
        exec(dies(pieces[rank], signal.SIGKILL), {"os": os})
        with join("cpu", timeout_s=60) as context:
            act(context)
        sys.stdout.flush()
        return 0

    children = [fork(functools.partial(be, rank)) for rank in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, [(base / f"said_by_{rank}").read_text() for rank in (0, 1)]


def ranks_reconstruct(checkpoint: Path, base: Path) -> None:
    """To be called in a process of its own, which forks."""
    torch.set_num_threads(1)
    model, data = load_model(checkpoint, "cpu"), open_dataset("demo", None, 32, "test")
    config = dataclasses.replace(CONFIG, num_samples=11, batch_size=2)

    def act(out: str, context: Context) -> None:
        run(model, data, config, context, base / out, False, checkpoint=checkpoint)

    codes, _ = two_ranks(functools.partial(act, "out"), base, (99, 1))
    assert codes[0] not in (0, -signal.SIGKILL) and codes[1] == -signal.SIGKILL
    assert records(base / "out") == {f"batch_{b}" for b in (0, 1, 2, 4)}
    shutil.copytree(base / "out", base / "other")
    codes, said = two_ranks(functools.partial(act, "out"), base)
    assert codes == [0, 0] and said[1] == ""
    assert "resuming: 4 of 6 batches are done" in said[0]
    assert two_ranks(functools.partial(act, "whole"), base)[0] == [0, 0]
    assert contents(base / "out") == contents(base / "whole")
    act("other", Context())
    assert not [name for name in contents(base / "other") if name.startswith("1_")]


def ranks_encode(checkpoint: Path, base: Path) -> None:
    """To be called in a process of its own, which forks."""
    torch.set_num_threads(1)
    model, data = load_model(checkpoint, "cpu"), open_dataset("demo", None, 32, "test")
    latents._PART_IMAGES = 2

    def act(out: str, context: Context) -> None:
        latents_of(
            model, data, context, checkpoint,
            count=11, flip=True, batch_size=1, folder=base / out,
        )  # fmt: skip

    codes, _ = two_ranks(functools.partial(act, "out"), base, (1, 2))
    assert -signal.SIGKILL in codes and 0 not in codes
    assert records(base / "out") == {"part_0_0", "part_1_0", "part_1_1"}
    codes, said = two_ranks(functools.partial(act, "out"), base)
    assert codes == [0, 0] and said[1] == ""
    assert "resuming: 3 of 6 parts are done" in said[0] and "encoded 5/5 images" in said[0]
    assert not (base / "out" / "unfinished").exists()
    act("whole", Context())  # one image at a time, one rank computes the same
    assert contents(base / "out") == contents(base / "whole")


def test_two_ranks_of_which_one_dies_go_on_and_one_alone_starts_afresh(
    checkpoint: Path, tmp_path: Path
) -> None:
    said = alone("ranks_reconstruct", checkpoint, tmp_path)
    assert "of a run with another world_size: starting afresh" in said and "resuming" not in said


def test_two_ranks_go_on_encoding(checkpoint: Path, tmp_path: Path) -> None:
    alone("ranks_encode", checkpoint, tmp_path)


def probe_killed_in_its_fit(checkpoint: Path, base: Path) -> None:
    """To be called in a process of its own, which forks: importing takes most of the time."""
    torch.set_num_threads(1)
    model = load_model(checkpoint, "cpu")
    config = ClassificationConfig(
        probe_data="demo", protocol="paper", epochs=2, resamples=20, num_train=60, num_test=30
    )

    def probe(place: str, task: Classification) -> int:
        found = probing.run(model, config, task, Context(), base / place / checkpoint.name)
        return 0 if found else 1

    class Killed(Classification):
        def fit(self, *_: Any) -> NoReturn:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    for place in ("killed", "whole"):
        (base / place).mkdir()
        shutil.copy(checkpoint, base / place)
    assert probe("whole", Classification()) == 0  # here, so that all is imported for the forks
    assert in_child(lambda: probe("killed", Killed())) == -signal.SIGKILL
    assert not list((base / "killed").rglob("metrics.json"))

    def resumed() -> int:
        with calls_of(model.encoder) as calls:
            probe("killed", Classification())
        return len(calls)

    assert in_child(resumed) == 0
    (found,), (whole,) = ((base / p).rglob("metrics.json") for p in ("killed", "whole"))
    assert contents(found.parent) == contents(whole.parent)

    def killed_while_it_writes() -> int:
        probing._save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return probe("whole", Classification())

    # A metrics.json is never beside the probes of another run, or none.
    assert in_child(killed_while_it_writes) == -signal.SIGKILL
    assert not whole.exists()


def test_a_probe_killed_while_it_fits_encodes_nothing_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    alone("probe_killed_in_its_fit", checkpoint, tmp_path)


# What is kept, and what is not --------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


RECORD, IMAGES = "batch_0.done", "0_fake_sample_0.npz"


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        (RECORD, flip_a_bit),
        (RECORD, truncate),
        (RECORD, Path.unlink),
        ("0_real_sample_0.npz", flip_a_bit),
        (IMAGES, flip_a_bit),
        (IMAGES, Path.unlink),
        ("0_x_0.png", flip_a_bit),
        ("0_sample_0.png", lambda path: path.write_bytes(b"")),
        ("x_T_sample_0.png", truncate),
    ],
)
def test_a_batch_that_is_not_as_it_was_written_is_named_and_done_again(
    model: dbae.DBAE,
    demo: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    harm: Callable[[Path], None],
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, 2, lambda: evaluate(model, demo, out))
    harm(out / "unfinished" / file)
    capsys.readouterr()
    with calls_of(model.unet) as calls:
        found = evaluate(model, demo, out)
    said = capsys.readouterr().out
    assert "resuming: 1 of 3 batches are done" in said
    if (file, harm) != (RECORD, Path.unlink):  # without a record it was never done
        assert "batch_0 is done again: " in said and file in said
    assert "batch_1 is done again" not in said
    assert found == evaluate(model, demo, tmp_path / "whole")
    assert len(calls) == 2 * 2  # the damaged and the missing one, of two calls each


def test_a_part_of_the_latents_that_is_not_as_it_was_written_is_encoded_again(
    model: dbae.DBAE,
    demo: ImageDataset,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(latents, "_PART_IMAGES", 2)

    def encode(name: str) -> latents.Latents | None:
        return latents_of(
            model, demo, Context(), checkpoint,
            count=7, flip=True, batch_size=1, folder=tmp_path / name,
        )  # fmt: skip

    interrupt(monkeypatch, 3, lambda: encode("out"))
    flip_a_bit(tmp_path / "out" / "unfinished" / "part_0_1.done")
    capsys.readouterr()
    with calls_of(model.encoder) as calls:
        found = encode("out")
    said = capsys.readouterr().out
    assert "part_0_1 is done again: " in said and "resuming: 2 of 4 parts are done" in said
    assert "encoded 3/3 images" in said and len(calls) == 3 * 2
    whole = encode("whole")
    assert found is not None and whole is not None
    for name in ("mean", "log_sigma", "flipped_mean", "flipped_log_sigma", "index"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 2}, "steps"),
        ({"num_samples": 2}, "num_samples, n"),
        ({"batch_size": 3}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"latent": "mean"}, "latent"),
        ({"reference_compat": True}, "reference_compat"),
        ({"bad_images": "skip"}, "bad_images"),
        ("weights", "weights"),
        ("images", "dataset"),
    ],
)
def test_what_another_run_has_left_is_told_and_not_used(
    model: dbae.DBAE,
    demo: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any] | str,
    named: str,
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, 2, lambda: evaluate(model, demo, out))
    config = CONFIG
    if change == "weights":
        torch.manual_seed(1)
        model = dbae.create_model("demo", latent_dim=4, stochastic=True).eval()
    elif change == "images":
        demo = demo.subset([5, 6, 7])
    else:
        config = dataclasses.replace(CONFIG, **change)
    capsys.readouterr()
    found = evaluate(model, demo, out, config)
    said = capsys.readouterr().out
    assert "holds unfinished results of a run with another " in said and named in said
    assert "starting afresh" in said and "resuming" not in said
    assert found == evaluate(model, demo, tmp_path / "whole", config)


def test_results_whose_publication_was_interrupted_are_there_before_another_run_starts(
    model: dbae.DBAE, demo: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    replace = os.replace

    def stop_at_the_last(source: Path, target: Path) -> None:
        if target == out / "metrics.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop_at_the_last)
        evaluate(model, demo, out)
    other = dataclasses.replace(CONFIG, seed=1)
    interrupt(monkeypatch, 0, lambda: evaluate(model, demo, out, other))
    assert contents(out) == evaluate(model, demo, tmp_path / "whole")
    assert evaluate(model, demo, out, other) != contents(tmp_path / "whole")


def test_what_a_lost_rank_of_another_run_still_writes_is_not_used(
    model: dbae.DBAE,
    demo: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, other = tmp_path / "out", dataclasses.replace(CONFIG, seed=1)
    interrupt(monkeypatch, 2, lambda: evaluate(model, demo, tmp_path / "other", other))
    interrupt(monkeypatch, 1, lambda: evaluate(model, demo, out))
    for path in (tmp_path / "other" / "unfinished").glob("*_1.*"):
        shutil.copy(path, out / "unfinished")
    (out / "unfinished" / ".batch_1.done.7.tmp").write_bytes(bytes(1000))
    interrupt(monkeypatch, 1, lambda: evaluate(model, demo, out))
    said = capsys.readouterr().out
    assert "batch_1 is done again: " in said and "is of another run" in said
    assert not list((out / "unfinished").glob(".*.tmp"))  # a killed process's, which cost space
    assert evaluate(model, demo, out) == evaluate(model, demo, tmp_path / "whole")


def test_another_checkpoint_batch_size_or_number_of_images_starts_encoding_afresh(
    model: dbae.DBAE,
    demo: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(latents, "_PART_IMAGES", 1)
    path = tmp_path / "ema_0.9999_000001.pt"
    save_weights(path, model)

    def encode(model: dbae.DBAE, count: int, batch_size: int = 1) -> None:
        latents_of(
            model, demo, Context(), path,
            count=count, batch_size=batch_size, folder=tmp_path / "out",
        )  # fmt: skip

    interrupt(monkeypatch, 2, lambda: encode(model, 3))
    interrupt(monkeypatch, 1, lambda: encode(model, 4, batch_size=2))
    assert "of a run with another n, batch_size: starting afresh" in capsys.readouterr().out
    interrupt(monkeypatch, 2, lambda: encode(model, 4))
    assert "of a run with another batch_size: starting afresh" in capsys.readouterr().out
    torch.manual_seed(1)
    other = dbae.create_model("demo", latent_dim=4, stochastic=True).eval()
    save_weights(path, other)
    with calls_of(other.encoder) as calls:
        encode(other, 4)
    said = capsys.readouterr().out
    assert "of a run with another checkpoint_sha256: starting afresh" in said and len(calls) == 4


def test_a_run_that_cannot_tell_whose_the_pieces_are_starts_afresh(
    model: dbae.DBAE,
    demo: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, 2, lambda: evaluate(model, demo, out))
    flip_a_bit(out / "unfinished" / "run.json")
    found = evaluate(model, demo, out)
    assert "of an unknown run: starting afresh" in capsys.readouterr().out
    assert found == evaluate(model, demo, tmp_path / "whole")


def test_a_file_of_the_users_in_the_way_stays(
    model: dbae.DBAE, demo: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 1, lambda: evaluate(model, demo, tmp_path))
    mine = tmp_path / "unfinished" / "notes.txt"
    mine.write_text("mine")
    assert run(model, demo, CONFIG, Context(), tmp_path, progress=False)
    assert mine.read_text() == "mine" and [*mine.parent.iterdir()] == [mine]


def test_a_cache_that_another_process_makes_is_refused_and_one_that_is_made_is_read(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path, tmp_path: Path
) -> None:
    def encode() -> None:
        latents_of(model, demo, Context(), checkpoint, count=2, folder=tmp_path)

    with FolderLock(tmp_path), pytest.raises(UserError, match=f"in use by pid {os.getpid()}"):
        encode()
    encode()
    with FolderLock(tmp_path):
        encode()
