"""The order in which training meets the images: a pure function of (length, seed, position)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..random import fold


class BatchOrder:
    """An endless walk over a data set of `length` images, each epoch in its own random order.

    Position p lies in epoch p // length. No image is left out or met twice within an epoch, and
    a batch may span two epochs. Raises ValueError for a length below 1.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"a data order needs at least one image, got length {length}")
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def indices(self, start: int, count: int) -> list[int]:
        """The data-set indices (0..length-1) at global positions start, …, start + count - 1."""
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), self.length)
            found += self._order_of(epoch)[offset : offset + count - len(found)].tolist()
        return found

    def _order_of(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(fold(self.seed, "data order", epoch))
            self._permutation = torch.randperm(self.length, generator=generator)
            self._epoch = epoch
        return self._permutation


class RankBatches:
    """One rank's share of the global batches at positions start, …, stop - 1 of a `BatchOrder`.

    Iterating gives, for each step, the data-set indices of this rank: a list of `batch_size`, the
    rank-th slice of the batch_size · world_size positions of that step; a `batch_sampler` for
    torch's DataLoader. Raises ValueError when the positions do not make whole global batches.
    """

    def __init__(
        self,
        order: BatchOrder,
        start_position: int,
        stop_position: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        global_batch = batch_size * world_size
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(f"rank {rank} of {world_size} with batch size {batch_size}")
        if stop_position < start_position or (stop_position - start_position) % global_batch:
            raise ValueError(
                f"positions {start_position} to {stop_position} are not a whole number of "
                f"global batches of {global_batch}"
            )
        self.order = order
        self.batch_size = batch_size
        self._starts = range(start_position + rank * batch_size, stop_position, global_batch)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield self.order.indices(start, self.batch_size)
