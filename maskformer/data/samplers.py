"""Which record comes when: an endless stream whose only state is one integer.

Position p of the stream is place p mod N of the permutation of epoch p div N, so record and randomness of a sample
are functions of (seed, p), whatever the number of processes and workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maskformer.errors import UserError

Key = tuple[int, int]
"""(index of the record, position in the stream)."""

_ORDER, _SAMPLE = 0, 1  # separate streams of randomness under one seed


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: the permutation of the records in one epoch."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(count)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The source of chance of the sample at one position."""
    return np.random.default_rng((seed, _SAMPLE, position))


class BatchStream:
    """Endless batches of `Key`; with two groups a batch holds records of one group only.

    Positions are dealt in order into one bucket a group; a full bucket is a batch. Grouping comes before
    sharding: rank r takes every world-size-th element of each global batch.

    Args:
        count: N, number of records.
        batch_size: of the global batch.
        seed: not negative.
        landscape: (N,) bool, the group of each record; None for one group.
        start_batch: number of global batches to skip; they are counted, not replayed.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: if the batch cannot be split evenly.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        landscape: np.ndarray | None = None,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {batch_size} cannot be split evenly over {world_size} processes: "
                f"make it a multiple of {world_size}"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.landscape = np.zeros(count, np.int8) if landscape is None else landscape.astype(np.int8)
        self.start_batch, self.rank, self.world_size = start_batch, rank, world_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, skip, buckets = self._start()
        while True:
            order = epoch_order(self.seed, epoch, self.count)
            groups = self.landscape[order]
            first = epoch * self.count
            for offset in range(self.count):
                bucket = buckets[groups[offset]]
                bucket.append((int(order[offset]), first + offset))
                if len(bucket) == self.batch_size:
                    if skip == 0:
                        yield bucket[self.rank :: self.world_size]
                    else:
                        skip -= 1
                    bucket.clear()
            epoch += 1

    def _start(self) -> tuple[int, int, tuple[list[Key], list[Key]]]:
        """The epoch to start in, batches to skip in it, and what the buckets hold when it begins.

        An epoch holds every record once, so how many batches are complete before it follows from the group sizes.
        """
        epoch = self.start_batch * self.batch_size // self.count
        wide = int(self.landscape.sum())
        seen = ((self.count - wide) * epoch, wide * epoch)
        done = sum(total // self.batch_size for total in seen)
        missing = [total % self.batch_size for total in seen]
        buckets: tuple[list[Key], list[Key]] = ([], [])
        earlier = epoch
        while any(missing):
            earlier -= 1
            order = epoch_order(self.seed, earlier, self.count)
            for offset in range(self.count - 1, -1, -1):
                group = self.landscape[order[offset]]
                if missing[group]:
                    missing[group] -= 1
                    buckets[group].append((int(order[offset]), earlier * self.count + offset))
        for bucket in buckets:
            bucket.reverse()
        return epoch, self.start_batch - done, buckets
