from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest

from maskformer.data.samplers import BatchStream, Epochs, Key, epoch_order, sample_rng
from maskformer.errors import UserError


def plain_stream(orders: Callable[[int], np.ndarray], batch: int, landscape: list[bool]) -> Iterator[list[Key]]:
    """The rule, word for word, from the order of each epoch."""
    buckets: dict[bool, list[Key]] = {False: [], True: []}
    position, length = 0, len(orders(0))
    while True:
        index = int(orders(position // length)[position % length])
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
    expected = list(islice(plain_stream(lambda epoch: epoch_order(3, epoch, count), batch, landscape.tolist()), 60))
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


# ------------------------------------------------------------------ several processes
@pytest.mark.parametrize("factors", [None, np.linspace(1, 3.3, 13)], ids=["once", "repeated"])
@pytest.mark.parametrize("landscape", [None, np.arange(13) % 3 == 0], ids=["mixed", "grouped"])
@pytest.mark.parametrize(("batch", "sizes"), [(8, (1, 2, 4, 8)), (6, (2, 3, 6)), (1, (1,))])
def test_the_stream_is_the_same_over_any_processes_from_any_start(
    batch: int, sizes: tuple[int, ...], landscape: np.ndarray | None, factors: np.ndarray | None
) -> None:
    whole = list(islice(BatchStream(13, batch, 1, landscape, repeat_factors=factors), 40))
    assert all(len({position for _, position in b}) == batch for b in whole)
    for start in (0, 1, 3, 7, 19, 38):
        for size in sizes:
            streams = [BatchStream(13, batch, 1, landscape, start, rank, size, factors) for rank in range(size)]
            shares = zip(*(islice(stream, 40 - start) for stream in streams), strict=True)
            dealt = [[key for round_ in zip(*share, strict=True) for key in round_] for share in shares]
            assert dealt == whole[start:]


@pytest.mark.parametrize(
    ("batch", "size", "remedy"),
    [
        (16, 3, "use 1, 2, 4, 8 or 16 processes, or make SOLVER.IMS_PER_BATCH a multiple of 3"),
        (6, 4, "use 1, 2, 3 or 6 processes, or make SOLVER.IMS_PER_BATCH a multiple of 4"),
        (7, 2, "use 1 or 7 processes, or make SOLVER.IMS_PER_BATCH a multiple of 2"),
        (1, 8, "use 1 process, or make SOLVER.IMS_PER_BATCH a multiple of 8"),
    ],
)
def test_batch_that_cannot_be_split(batch: int, size: int, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        BatchStream(10, batch, 0, world_size=size)
    assert str(error.value) == f"SOLVER.IMS_PER_BATCH {batch} cannot be split evenly over {size} processes: {remedy}"


# ------------------------------------------------------------------ repeat factors
def mixed_factors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors from 1 to about 4, half of them 1, and groups."""
    rng = np.random.default_rng(5)
    factors = np.where(rng.random(count) < 0.5, 1.0, 1 + 3 * rng.random(count))
    return factors, rng.random(count) < 0.7


@pytest.mark.parametrize("grouped", [False, True])
def test_records_come_as_often_as_their_factors_say(grouped: bool) -> None:
    factors, landscape = mixed_factors(40)
    groups = landscape.astype(np.int8) if grouped else np.zeros(40, np.int8)
    epochs, rounds = Epochs(groups, 11, factors), 600
    expected = factors.copy()
    for group in range(2):
        total = factors[groups == group].sum()
        assert epochs.places[group] == np.ceil(total)
        expected[groups == group] *= np.ceil(total) / max(total, 1)
    assert epochs.length == sum(epochs.places)
    uses = np.stack([np.bincount(epochs.order(epoch), minlength=40) for epoch in range(rounds)])
    for group in range(2):
        assert (uses[:, groups == group].sum(1) == epochs.places[group]).all()
    # Factors are rounded to 2^-16; 1e-3 leaves room for it where a stretched factor is almost a whole number.
    assert (uses >= np.floor(expected - 1e-3)).all()
    assert (uses <= np.ceil(expected + 1e-3)).all()
    assert uses.min() == 1
    # A count that is one of two neighbouring numbers varies by 1/2 at most; 5 standard deviations.
    assert np.abs(uses.mean(0) - expected).max() < 5 * 0.5 / np.sqrt(rounds)
    assert (uses.std(0)[np.abs(expected - np.rint(expected)) > 0.1] > 0).all()  # by chance, not always the same ones


def test_factors_of_one_change_nothing_but_the_order() -> None:
    epochs = Epochs((np.arange(50) % 4 == 0).astype(np.int8), 0, np.ones(50))
    orders = [epochs.order(epoch) for epoch in range(30)]
    assert all(np.array_equal(np.sort(order), np.arange(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 30


def test_a_group_may_be_empty_and_its_sum_whole() -> None:
    factors = np.array([1.5, 1.5, 2.0, 1.0])
    for landscape in (np.zeros(4, np.int8), np.ones(4, np.int8)):
        epochs = Epochs(landscape, 0, factors)
        assert epochs.length == 6  # the sum as it is, not one more for a rounding error
        assert all(np.bincount(epochs.order(epoch))[2:].tolist() == [2, 1] for epoch in range(50))


def test_repeats_are_spread_over_the_epoch() -> None:
    factors = np.where(np.arange(100) == 7, 20.0, 1.0)
    gaps = np.concatenate(
        [np.diff(np.flatnonzero(Epochs(np.zeros(100, np.int8), s, factors).order(0) == 7)) for s in range(50)]
    )
    assert (gaps == 1).mean() < 0.4  # 20/119 by chance


def test_which_records_come_twice_does_not_hang_on_their_neighbours() -> None:
    epochs = Epochs(np.zeros(4, np.int8), 0, np.full(4, 1.5))
    uses = np.stack([np.bincount(epochs.order(epoch)) for epoch in range(200)])
    for other in (1, 2, 3):  # in an unchanging order, records 0 and 1 would never come twice in the same epoch
        assert set((uses[:, 0] + uses[:, other]).tolist()) == {2, 3, 4}


def test_epochs_are_functions_of_seed_and_number() -> None:
    factors, landscape = mixed_factors(30)
    one, other = (Epochs(landscape.astype(np.int8), 4, factors) for _ in range(2))
    forwards = [one.order(epoch).tolist() for epoch in range(6)]
    backwards = [other.order(epoch).tolist() for epoch in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert len({tuple(order) for order in forwards}) == 6
    assert forwards[0] != Epochs(landscape.astype(np.int8), 5, factors).order(0).tolist()


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("wide", [0.0, 0.1, 0.6])
def test_repeating_stream_follows_the_rule_from_any_start(batch: int, wide: float) -> None:
    landscape = np.arange(9) < round(wide * 9)
    factors = 1 + np.arange(9) ** 2 / 20
    orders = Epochs(landscape.astype(np.int8), 3, factors).order
    expected = list(islice(plain_stream(orders, batch, landscape.tolist()), 60))
    assert all(len({bool(landscape[index]) for index, _ in b}) == 1 for b in expected)
    for start in (0, 1, 2, 3, 10, 31, 47):
        stream = BatchStream(9, batch, 3, landscape, start_batch=start, repeat_factors=factors)
        assert list(islice(stream, 60 - start)) == expected[start:]


# ------------------------------------------------------------------ chance
def test_chance_depends_on_seed_and_position_only() -> None:
    draws = {(s, p): float(sample_rng(s, p).random()) for s in range(5) for p in range(200)}
    assert len(set(draws.values())) == 1000
    assert draws[3, 17] == float(sample_rng(3, 17).random())
    assert not np.array_equal(epoch_order(0, 0, 100), epoch_order(1, 0, 100))
    first = np.bincount([int(epoch_order(s, 0, 4)[0]) for s in range(4000)], minlength=4)
    assert abs(first - 1000).max() < 5 * np.sqrt(1000)
