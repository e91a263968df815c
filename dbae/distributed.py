"""Join torchrun, mpiexec or SLURM, or stay one process: all that knows about launchers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import GroupError, UserError, in_words

DEVICES = ("auto", "cuda", "mps", "cpu")

_LEAVE_S = 10.0
_LONG = 60  # characters of a value in a message

T = TypeVar("T")
S = TypeVar("S", bound=dist.Store)


class LostContact(UserError):
    """Another rank died or does not answer. Each rank that is left notices by itself.

    `code` is the exit code that tells launchers that a restart helps (EX_TEMPFAIL of sysexits.h).
    """

    code = 75


@dataclasses.dataclass(frozen=True)
class Context:
    """This process's place among all processes of the run.

    `Context()` is a single CPU process. All methods but `print` are collectives: all ranks must
    call them, in the same order. All but `all_reduce_sum` talk over the CPU, and so do not wait
    for what the GPU has still to do. Where another rank is gone they raise a RuntimeError, which
    `join` makes a LostContact.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank among the processes of this machine
    device: torch.device = dataclasses.field(default=torch.device("cpu"))
    launcher: str = "none"  # torchrun, mpi, slurm or none

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Is the flag true on any rank?"""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def gather_objects(self, obj: T) -> list[T]:
        """Every rank's (picklable) object, in rank order, on every rank."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj)
        return gathered

    def ranks_here(self) -> int:
        """How many ranks share this machine with this one."""
        return self.gather_objects(platform.node()).count(platform.node())

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's tensor as a new tensor on the input's device; the input is kept."""
        if self.world_size == 1:
            return tensor.clone()
        total = tensor.detach().to(self.device, copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What each rank does on its own inside fails on all ranks, or on none.

        Where it raises UserError or OSError on any rank, all raise GroupError on leaving, with
        the message of the lowest such rank. Other exceptions (and what a single process raises)
        pass through unchanged.
        """
        problem: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            if self.world_size == 1:
                raise
            problem = error
        messages = self.gather_objects(None if problem is None else in_words(problem))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            alike = len(set(messages)) == 1
            who = "" if alike or failed[0] == 0 else f"rank {failed[0]}: "
            raise GroupError(f"{who}{messages[failed[0]]}") from problem

    def require_same(self, what: Mapping[str, Any]) -> None:
        """Raise GroupError on all ranks unless every rank gives the same `what`.

        `what` maps names for people ("flag --lr", "data") to values that JSON can hold.
        """
        texts = {name: json.dumps(value, sort_keys=True) for name, value in what.items()}
        sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        all_sums = self.gather_objects(sums)
        if all(theirs == all_sums[0] for theirs in all_sums):
            return
        shown = self.gather_objects({name: _shorten(texts[name], sums[name]) for name in texts})
        rank = next(rank for rank, theirs in enumerate(all_sums) if theirs != all_sums[0])
        names = sorted(all_sums[0].keys() | all_sums[rank].keys())
        different = "; ".join(
            f"{name} {shown[rank].get(name, 'missing')} instead of {shown[0].get(name, 'missing')}"
            for name in names
            if all_sums[0].get(name) != all_sums[rank].get(name)
        )
        raise GroupError(
            f"rank {rank} differs from rank 0: {different}; start all ranks with the same "
            "command, data and packages"
        )

    def print(self, *args: object) -> None:
        """Print a line, on rank 0 only."""
        if self.is_main:
            print(*args, flush=True)


@contextlib.contextmanager
def join(device: str = "auto", timeout_s: float = 600) -> Iterator[Context]:
    """Join the processes that torchrun, mpiexec or srun started, and leave them on every way out.

    One process needs no launcher and makes no process group. `device` is auto, cuda, mps or cpu;
    auto is the GPU of this process's local rank where there is CUDA, MPS for a single process
    on a Mac, else the CPU. Several processes talk over gloo, and over NCCL about what lies on GPUs.
    `timeout_s` bounds the wait for the others, at the start and in each collective.

    Raises UserError when the launcher's variables are incomplete, when this machine has fewer
    GPUs than processes, when rank 0 cannot be reached or its port is in use; LostContact when
    inside, in a collective, another rank has died or does not answer within `timeout_s`. Under
    mpiexec a process can join once.
    """
    place = _find_place(os.environ)
    context = Context(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        device=_pick_device(device, place, os.environ),
        launcher=place.launcher,
    )
    if place.launcher == "torchrun":
        _end_with_parent()
    with _threads(context.device, place), _process_group(context.device, place, timeout_s):
        yield context


def _end_with_parent() -> None:
    """Have Linux send SIGTERM when the launcher is killed, which then cannot end its ranks."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


# --- Which launcher started this process, and as which rank? -------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"


def _find_place(env: Mapping[str, str]) -> _Place:
    """What the launcher's environment variables say. The innermost launcher wins: torchrun and
    mpiexec may run inside a SLURM step, whose variables then describe their helper processes."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return _place(env, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "OMPI_COMM_WORLD_SIZE" in env:
        prefix = "OMPI_COMM_WORLD_"
        names = [prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _place(env, "mpi", *names)
    # PMI_* alone may also come from `srun --mpi=pmi2`; MPI_LOCALRANKID is Hydra's own (MPICH).
    if "PMI_SIZE" in env and "MPI_LOCALRANKID" in env:
        return _place(env, "mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    # A plain python in an sbatch script or on an interactive node has no step or a step of 1 task.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if "SLURM_STEP_ID" in env and _integer(env, tasks, default=1) > 1:
        place = _place(env, "slurm", "SLURM_PROCID", tasks, "SLURM_LOCALID", "")
        return dataclasses.replace(place, local_size=max(place.local_size, _slurm_local_size(env)))
    for have, lack in (("WORLD_SIZE", "RANK"), ("RANK", "WORLD_SIZE")):
        if have in env:
            raise UserError(
                f"the environment has {have}={env[have]} but no {lack}: start with torchrun, "
                f"mpiexec or srun, which set both, or unset {have} to run one process"
            )
    return _Place()


def _place(
    env: Mapping[str, str],
    launcher: str,
    rank_name: str,
    size_name: str,
    local_rank_name: str,
    local_size_name: str,
) -> _Place:
    """Read one launcher's variables; those about this machine may be missing."""
    rank, size = _integer(env, rank_name), _integer(env, size_name)
    if not 0 <= rank < size:
        raise UserError(f"{rank_name}={rank} does not lie in 0 … {size_name} − 1 = {size - 1}")
    local_index = _integer(env, local_rank_name, default=rank)
    if local_index < 0:
        raise UserError(f"{local_rank_name}={local_index} must not be negative")
    local_size = max(_integer(env, local_size_name, default=1), local_index + 1)
    return _Place(rank, size, local_index, local_size, launcher)


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        found = "is missing from the environment" if text is None else f"is {text!r}"
        raise UserError(
            f"{name} {found}; the launcher (torchrun, mpiexec or srun) should have set it "
            "to an integer"
        ) from None


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from a list such as `4(x2),1`; 1 when SLURM does not say."""
    listed = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        counts += [int(count)] * int(repeat or 1)
    node = _integer(env, "SLURM_NODEID", default=0)
    return counts[node] if 0 <= node < len(counts) else 1


# --- Device and threads --------------------------------------------------------------------------


def _pick_device(name: str, place: _Place, env: Mapping[str, str]) -> torch.device:
    if name not in DEVICES:
        raise UserError(f"--device {name!r} is unknown; choose one of {', '.join(DEVICES)}")
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif place.world_size == 1 and torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    if name == "cuda":
        return _cuda_device(place, env)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine has no usable MPS device; use --device cpu")
        if place.world_size > 1:
            raise UserError(f"--device mps works with one process, not {place.world_size}")
    return torch.device(name)


def _cuda_device(place: _Place, env: Mapping[str, str]) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UserError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    index = place.local_rank
    if place.local_size > count:
        # SLURM may bind each task to GPUs of its own: then every task sees only a part of them.
        on_node = _integer(env, "SLURM_GPUS_ON_NODE", default=0)
        if place.launcher != "slurm" or on_node < place.local_size:
            raise UserError(
                f"{place.local_size} processes on this machine but only {count} "
                f"GPU{'s' if count > 1 else ''}: start fewer, or use --device cpu"
            )
        index %= count
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def _threads(device: torch.device, place: _Place) -> Iterator[None]:
    """Share the cores among the CPU processes of a machine, unless the user decided otherwise."""
    before = torch.get_num_threads()
    if device.type == "cpu" and place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        share = (os.cpu_count() or 1) // place.local_size
        torch.set_num_threads(max(1, min(before, share)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- The process group ---------------------------------------------------------------------------


@contextlib.contextmanager
def _process_group(device: torch.device, place: _Place, timeout_s: float) -> Iterator[None]:
    if place.world_size == 1:
        yield
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    on_cuda = device.type == "cuda"
    lost_contact = False
    try:
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                timeout=timeout,
                device_id=device if on_cuda else None,
                store=_rendezvous(place, os.environ, timeout),
                rank=place.rank,
                world_size=place.world_size,
            )
        except RuntimeError as error:
            message = _why_not_joined(error, place, timeout_s)
            if message is None:
                raise
            raise UserError(message) from error
        try:
            yield
        except RuntimeError as error:
            if not _tells_of_lost_contact(error):
                raise
            reason = "the connection broke"
            if re.search("timed? ?out", str(error), re.IGNORECASE):
                reason = f"no answer within {timeout_s:g} s"
            raise LostContact(
                f"lost contact with another rank ({reason}): it died or hangs; the same command "
                "again goes on from the last checkpoint"
            ) from error
    except LostContact:
        lost_contact = True
        raise
    finally:
        _leave(lost_contact)


# What gloo and NCCL say when a peer is gone. What they say of a wrong call (shapes that differ
# between ranks, say) is a RuntimeError as well, but a defect that needs its traceback.
_LOST_CONTACT = re.compile(
    r"gloo.*(closed by peer|Read error|writev|Timed out|pair closure|Socket closed)"
    r"|NCCL.*(remote process|network error|communicator was aborted|timeout)",
    re.DOTALL,
)


def _tells_of_lost_contact(error: RuntimeError) -> bool:
    return _LOST_CONTACT.search(str(error)) is not None


def _why_not_joined(error: RuntimeError, place: _Place, timeout_s: float) -> str | None:
    """The message for the user; None where it is not about the other ranks."""
    text = str(error)
    if "EADDRINUSE" in text:
        port = re.search(r"port: (\d+)", text)
        return (
            f"port {port[1] if port else ''} of this machine, where the ranks are to meet, is in "
            "use: set MASTER_PORT to a free one"
        )
    from_network = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
    if not from_network and not _tells_of_lost_contact(error):
        return None
    return (
        f"rank {place.rank} of {place.world_size} ({place.launcher}) could not join the "
        f"others within {timeout_s:g} s; are all started, is MASTER_ADDR right? "
        f"({text.splitlines()[0]})"
    )


def _leave(lost_contact: bool) -> None:
    """Destroy the process group. NCCL may wait for a peer that is gone, so not for ever."""

    group = dist.group.WORLD

    def leave() -> None:
        with contextlib.suppress(RuntimeError):
            if lost_contact and group is not None:
                group.abort()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    if group is not None:
        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(_LEAVE_S)


def _shorten(text: str, checksum: str) -> str:
    """A value for a message; two long values that differ look different."""
    return text if len(text) <= _LONG else f"{text[:_LONG]}… (sha256 {checksum[:8]})"


def _rendezvous(place: _Place, env: Mapping[str, str], timeout: datetime.timedelta) -> dist.Store:
    """The key-value store over which the ranks find each other."""
    if place.launcher == "torchrun":
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise UserError(
                    f"the environment has RANK and WORLD_SIZE but no {name}; torchrun sets it"
                )
        _integer(env, "MASTER_PORT")
        store = _connect(lambda: next(dist.rendezvous("env://", timeout=timeout))[0], timeout)
        # torchrun's store outlives a restart, and with it the addresses of ranks that are gone.
        return dist.PrefixStore(f"start {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if place.launcher == "slurm":
        return _store(_slurm_host(env), _slurm_port(env), place, timeout)
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return _store(env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), place, timeout)
    return _mpi_store(place, env, timeout)


def _store(host: str, port: int, place: _Place, timeout: datetime.timedelta) -> dist.TCPStore:
    """A store that rank 0 serves (port 0: at any free port)."""
    serves = place.rank == 0
    return _connect(
        lambda: dist.TCPStore(
            host, port, is_master=serves, timeout=timeout, wait_for_workers=False
        ),
        timeout,
    )


_SLACK_S = 10  # a busy machine is late


def _connect(make: Callable[[], S], timeout: datetime.timedelta) -> S:
    """The store that `make` returns, or raises DistNetworkError after the timeout.

    Of itself torch waits without a limit where something else took the port and keeps silent.
    """
    made: Future[S] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        # The slack: torch's own timeouts are to come first, since they say what they waited for.
        return made.result(timeout.total_seconds() + _SLACK_S)
    except FutureTimeout:
        raise dist.DistNetworkError(
            "what listens there is no rank 0: does another program use the port?"
        ) from None


def _slurm_host(env: Mapping[str, str]) -> str:
    """MASTER_ADDR, or the first host of the step, whose first task is rank 0."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("SLURM_JOB_NODELIST is missing; set MASTER_ADDR to the host of rank 0")
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return _first_host(nodes)


def _first_host(nodes: str) -> str:
    """The first name in a SLURM host list: `gpu[03-05,9],cpu1` → `gpu03`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _slurm_port(env: Mapping[str, str]) -> int:
    """MASTER_PORT, or a port that all tasks of a step agree on and other steps hardly use."""
    if "MASTER_PORT" in env:
        return _integer(env, "MASTER_PORT")
    job, step = _integer(env, "SLURM_JOB_ID", default=0), _integer(env, "SLURM_STEP_ID")
    return 20_000 + (job + 1009 * step) % 12_000  # below 32768, where systems hand out ports


def _mpi_store(place: _Place, env: Mapping[str, str], timeout: datetime.timedelta) -> dist.Store:
    """MPI tells the ranks where rank 0 listens; everything else goes through the process group.

    MPI is left again at once: in a later MPI_Finalize, a rank that failed would wait for the
    others, and the job would hang instead of ending. (It also makes forking safe.)
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpiexec started {place.world_size} processes, but mpi4py does not load "
            f"({str(error).splitlines()[0]}): install an MPI library, or set LAUNCHER=torchrun"
        ) from error
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        world = MPI.COMM_WORLD
        if world.Get_size() != place.world_size:
            raise UserError(
                f"mpiexec started {place.world_size} processes, but mpi4py's MPI library sees "
                f"{world.Get_size()}: they are of two MPI installations; set LAUNCHER=torchrun, "
                "or use the mpiexec that belongs to mpi4py's library"
            )
        if place.rank == 0:
            store = _store("127.0.0.1", 0, place, timeout)
            world.bcast((_own_host(place, env), store.port))
            return store
        host, port = world.bcast(None)
        return _store(host, port, place, timeout)
    finally:
        if ours:
            MPI.Finalize()


def _own_host(place: _Place, env: Mapping[str, str]) -> str:
    """The name under which the other ranks reach this process."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if place.local_size == place.world_size:
        return "127.0.0.1"  # works whatever the machine believes its own name to be
    return socket.gethostname()
