"""Batches of training images for one process, in the order that `BatchOrder` fixes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .datasets import ImageDataset, Item, user_error_from_worker


class Batch(NamedTuple):
    """images: uint8 (N, 3, S, S); replaced: how many stand in for unreadable ones."""

    images: Tensor
    replaced: int


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
    dataset: ImageDataset, batches: Iterable[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield one Batch per index list. A bad image in a worker raises the UserError it is."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        collate_fn=_collate,
    )
    try:
        yield from loader
    except Exception as error:
        mistake = user_error_from_worker(error)
        if mistake is None:
            raise
        raise mistake from error


def _collate(items: list[Item]) -> Batch:
    return Batch(torch.stack([i.image for i in items]), sum(i.replaced for i in items))
