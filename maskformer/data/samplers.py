"""Which record comes when: an endless stream whose only state is one integer.

Position p of the stream is place p mod T of epoch p div T, so record and randomness of a sample are functions of
(seed, p), whatever the number of processes and workers. Without repeat factors an epoch is a permutation of the
records; with them a record comes several times. Every epoch has the same length T, and of each group the same number
of places, so that where a batch lies in the stream can be counted instead of replayed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maskformer.errors import UserError

Key = tuple[int, int]
"""(index of the record, position in the stream)."""

GROUPS = 2
"""Batches are of landscape images or of others."""

_ORDER, _SAMPLE = 0, 1  # separate streams of randomness under one seed
_UNIT = 1 << 16
"""Repeat factors are counted in whole parts of this: sums are exact, and the same everywhere; T may be 10^7."""


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: the permutation of the records in one epoch."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(count)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The source of chance of the sample at one position."""
    return np.random.default_rng((seed, _SAMPLE, position))


def check_even_split(batch_size: int, world_size: int) -> None:
    """Refuses a number of processes that the global batch cannot be dealt to in equal shares.

    Args:
        batch_size: ``SOLVER.IMS_PER_BATCH``.
        world_size: number of processes.

    Raises:
        UserError: naming the numbers of processes that are possible.
    """
    if batch_size % world_size == 0:
        return
    *others, largest = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0]
    possible = f"{', '.join(others)} or {largest} processes" if others else "1 process"
    raise UserError(
        f"SOLVER.IMS_PER_BATCH {batch_size} cannot be split evenly over {world_size} processes: use {possible}, "
        f"or make SOLVER.IMS_PER_BATCH a multiple of {world_size}"
    )


class Epochs:
    """The records of each epoch in their order.

    With repeat factors, each epoch draws by systematic resampling: the records of a group, in a random order, lie as
    intervals of length r on a line, which is read off at equal steps from one random offset. A record of factor r so
    comes floor(r) or ceil(r) times, r times on average, and the length of the epoch never changes; for this, r is
    stretched until the sum over the group is a whole number.

    Attributes:
        length: T, places of an epoch.
        places: how many of them each group has.

    Args:
        groups: (N,) int8, the group of each record.
        seed: not negative.
        repeat_factors: (N,) float, at least 1: how often a record comes in an epoch, on average; None: once.
    """

    def __init__(self, groups: np.ndarray, seed: int, repeat_factors: np.ndarray | None = None) -> None:
        self.groups, self.seed = groups, seed
        self._weights = None
        sums = np.bincount(groups, minlength=GROUPS)
        if repeat_factors is not None:
            self._weights = np.rint(repeat_factors * _UNIT).astype(np.int64)
            sums = np.array([self._weights[groups == group].sum() for group in range(GROUPS)])
            sums = -(-sums // _UNIT)
        self.places: list[int] = sums.tolist()
        self.length = sum(self.places)

    def order(self, epoch: int) -> np.ndarray:
        """(T,) int64: the record at each place of one epoch."""
        if self._weights is None:
            return epoch_order(self.seed, epoch, len(self.groups))
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        order = rng.permutation(len(self.groups))
        parts = []
        for group, places in enumerate(self.places):
            members = order[self.groups[order] == group]
            if not len(members):
                continue
            ends = np.cumsum(self._weights[members])
            total = ends[-1]
            steps = (ends * places + rng.integers(total)) // total  # places up to the end of each interval
            parts.append(np.repeat(members, np.diff(steps, prepend=0)))
        return rng.permutation(np.concatenate(parts))


class BatchStream:
    """Endless batches of `Key`; with two groups a batch holds records of one group only.

    Positions are dealt in order into one bucket a group; a full bucket is a batch. Grouping comes before
    sharding: rank r takes every world-size-th element of each global batch.

    Attributes:
        epochs: the order of the records.

    Args:
        count: N, number of records.
        batch_size: of the global batch.
        seed: not negative.
        landscape: (N,) bool, the group of each record; None for one group.
        start_batch: number of global batches to skip; they are counted, not replayed.
        rank: of this process.
        world_size: number of processes.
        repeat_factors: (N,) float, at least 1: how often a record comes in an epoch, on average; None: once.

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
        repeat_factors: np.ndarray | None = None,
    ) -> None:
        check_even_split(batch_size, world_size)
        groups = np.zeros(count, np.int8) if landscape is None else landscape.astype(np.int8)
        self.epochs = Epochs(groups, seed, repeat_factors)
        self.batch_size, self.start_batch, self.rank, self.world_size = batch_size, start_batch, rank, world_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, skip, buckets = self._start()
        while True:
            order = self.epochs.order(epoch)
            groups = self.epochs.groups[order].tolist()
            position = epoch * self.epochs.length
            for index, group in zip(order.tolist(), groups, strict=True):
                bucket = buckets[group]
                bucket.append((index, position))
                position += 1
                if len(bucket) == self.batch_size:
                    if skip == 0:
                        yield bucket[self.rank :: self.world_size]
                    else:
                        skip -= 1
                    bucket.clear()
            epoch += 1

    def _start(self) -> tuple[int, int, list[list[Key]]]:
        """The epoch to start in, batches to skip in it, and what the buckets hold when it begins.

        Every epoch has the same number of places of each group, so how many batches are complete before it follows.
        """
        epoch = self.start_batch * self.batch_size // self.epochs.length
        seen = [places * epoch for places in self.epochs.places]
        done = sum(total // self.batch_size for total in seen)
        missing = [total % self.batch_size for total in seen]
        buckets: list[list[Key]] = [[] for _ in missing]
        earlier = epoch
        while any(missing):
            earlier -= 1
            order = self.epochs.order(earlier)
            groups, first = self.epochs.groups[order], earlier * self.epochs.length
            for group, bucket in enumerate(buckets):
                offsets = np.flatnonzero(groups == group)
                offsets = offsets[max(0, len(offsets) - missing[group]) :]
                bucket[:0] = zip(order[offsets].tolist(), (first + offsets).tolist(), strict=True)
                missing[group] -= len(offsets)
        return epoch, self.start_batch - done, buckets
