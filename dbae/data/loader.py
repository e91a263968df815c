"""Batches of images for one process, in the order that the caller gives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from .datasets import ImageDataset, Item, user_error_from_worker

_POLL_S = 1.0  # how long to wait for a batch before looking whether its worker lives


class Batch(NamedTuple):
    """images: uint8 (N, 3, S, S); replaced: how many stand in for unreadable ones."""

    images: Tensor
    replaced: int


class WorkerLost(UserError):
    """A data-loading process was killed, hangs, or ran out of memory: loading anew may help."""


def default_workers(dataset: ImageDataset, processes_here: int) -> int:
    """Loader processes per rank: one core is left to the rank itself; drawing needs none."""
    if dataset.kind == "demo":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(8, (cores or 1) // processes_here - 1))


def in_batches(positions: Sequence[int], size: int) -> list[list[int]]:
    """The positions, `size` at a time; the last batch may be smaller."""
    return [list(positions[i : i + size]) for i in range(0, len(positions), size)]


def load_batches(
    dataset: ImageDataset,
    batches: Iterable[list[int]],
    num_workers: int,
    pin_memory: bool,
    timeout_s: float = 0,
) -> Iterator[Batch]:
    """Yield one Batch per index list.

    A bad image in a worker raises the UserError it is. A worker that was killed, or gives nothing
    for `timeout_s` seconds (0: for ever), raises WorkerLost, and only here: what was yielded before
    stands.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        collate_fn=collate,
        worker_init_fn=_apart if num_workers else None,
        timeout=_POLL_S if num_workers else 0,
    )
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    try:
        if num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise when a worker dies, wherever the main thread is: in the
            # midst of an optimizer's update, say. Waiting for a batch finds out as well.
            signal.signal(signal.SIGCHLD, before)
        yield from _patiently(iterator, timeout_s)
    except Exception as error:
        mistake = user_error_from_worker(error) or (_lost(error) if num_workers else None)
        if mistake is None:
            raise
        if isinstance(mistake, WorkerLost):
            # torch asks workers to end, which one that hangs does not do; Python would then wait
            # for it when this process ends.
            for worker in getattr(iterator, "_workers", ()):
                worker.kill()
        raise mistake from error


def _patiently(iterator: Iterator[Batch], timeout_s: float) -> Iterator[Batch]:
    """The iterator's batches. It looks for workers that died whenever it times out."""
    waited = 0.0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            waited += _POLL_S
            if timeout_s and waited >= timeout_s:
                raise WorkerLost(
                    f"a data-loading worker gave nothing for {waited:g} s (--timeout_s, a slow or "
                    "dead disk)"
                ) from error
            continue
        waited = 0
        yield batch


def _lost(error: Exception) -> WorkerLost | None:
    """The WorkerLost that an exception of the DataLoader amounts to, if it does."""
    text = str(error)
    if isinstance(error, MemoryError):
        return WorkerLost("data loading ran out of memory; use fewer --num_workers")
    if isinstance(error, (OSError, EOFError)) and not text.startswith("Caught "):
        # Not of the data, but of the connection over which a batch was being handed over.
        return WorkerLost(f"a data-loading worker went away ({text or type(error).__name__})")
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return WorkerLost(
            f"{' '.join(text.split())}: killed, perhaps for memory (--num_workers, /dev/shm)"
        )
    return None


def _apart(_: int) -> None:
    """In a worker: leave the process group, whose signals are for the trainer, which then stops."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def collate(items: list[Item]) -> Batch:
    """Items as one Batch."""
    return Batch(torch.stack([i.image for i in items]), sum(i.replaced for i in items))
