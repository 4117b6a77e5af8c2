from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from maskformer.data.samplers import BatchStream, Key, epoch_order, sample_rng
from maskformer.errors import UserError


def plain_stream(count: int, batch: int, seed: int, landscape: list[bool]) -> Iterator[list[Key]]:
    """The rule, word for word."""
    buckets: dict[bool, list[Key]] = {False: [], True: []}
    position = 0
    while True:
        index = int(epoch_order(seed, position // count, count)[position % count])
        bucket = buckets[landscape[index]]
        bucket.append((index, position))
        position += 1
        if len(bucket) == batch:
            yield list(bucket)
            bucket.clear()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("wide", [0.0, 0.3, 0.9, 1.0])
def test_stream_follows_the_rule_from_any_start(count: int, batch: int, wide: float) -> None:
    landscape = np.arange(count) < round(wide * count)
    expected = list(islice(plain_stream(count, batch, 3, landscape.tolist()), 60))
    for start in (0, 1, 2, 3, 10, 31, 47):
        stream = BatchStream(count, batch, 3, landscape, start_batch=start)
        assert list(islice(stream, 60 - start)) == expected[start:]


def test_every_record_once_an_epoch() -> None:
    keys = [key for batch in islice(BatchStream(10, 5, 0), 6) for key in batch]
    assert [position for _, position in keys] == list(range(30))
    orders = [[index for index, _ in keys[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_groups_do_not_mix_and_nothing_is_lost() -> None:
    landscape = np.random.default_rng(0).random(50) < 0.7
    batches = list(islice(BatchStream(50, 4, 0, landscape), 400))
    assert all(len({bool(landscape[index]) for index, _ in batch}) == 1 for batch in batches)
    uses = np.bincount([index for batch in batches for index, _ in batch], minlength=50)
    assert uses.max() - uses.min() <= 1  # 32 epochs


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(world_size: int) -> None:
    landscape = np.arange(13) % 3 == 0
    whole = list(islice(BatchStream(13, 8, 1, landscape, 5), 20))
    shares = [
        list(islice(BatchStream(13, 8, 1, landscape, 5, rank=r, world_size=world_size), 20)) for r in range(world_size)
    ]
    for i, batch in enumerate(whole):
        assert all(len(share[i]) == 8 // world_size for share in shares)
        assert sorted(key for share in shares for key in share[i]) == sorted(batch)
        assert shares[1][i] == batch[1::world_size]


def test_batch_that_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH 6 cannot be split evenly over 4 processes"):
        BatchStream(10, 6, 0, world_size=4)


def test_chance_depends_on_seed_and_position_only() -> None:
    draws = {(s, p): float(sample_rng(s, p).random()) for s in range(5) for p in range(200)}
    assert len(set(draws.values())) == 1000
    assert draws[3, 17] == float(sample_rng(3, 17).random())
    assert not np.array_equal(epoch_order(0, 0, 100), epoch_order(1, 0, 100))
    first = np.bincount([int(epoch_order(s, 0, 4)[0]) for s in range(4000)], minlength=4)
    assert abs(first - 1000).max() < 5 * np.sqrt(1000)
