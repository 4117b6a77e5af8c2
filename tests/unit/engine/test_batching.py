"""The effective batch, whatever the number of processes."""

from __future__ import annotations

import pytest

from maskformer.config import get_cfg
from maskformer.engine.batching import build_batch_split, scale_to_processes, split_batch
from maskformer.errors import UserError


@pytest.mark.parametrize(
    ("images", "processes", "limit", "sizes"),
    [
        (16, 1, 0, (16,)),
        (16, 8, 0, (2,)),
        (16, 2, 4, (4, 4)),
        (16, 1, 16, (16,)),
        (16, 1, 100, (16,)),
        (5, 1, 2, (2, 2, 1)),
        (14, 2, 4, (4, 3)),  # as few as the limit allows, as equal as possible
        (3, 1, 1, (1, 1, 1)),
    ],
)
def test_a_batch_is_split_evenly(images: int, processes: int, limit: int, sizes: tuple[int, ...]) -> None:
    split = split_batch(images, processes, limit)
    assert split.micro_batches == sizes
    assert sum(sizes) * processes == images
    samples = list(range(sum(sizes)))
    parts = split.cut(samples)
    assert [len(part) for part in parts] == list(sizes)
    assert [sample for part in parts for sample in part] == samples


def test_an_impossible_split_names_the_possible_ones() -> None:
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 16 .* 3 processes: use 1, 2, 4, 8 or 16 processes, or make"):
        split_batch(16, 3)


def test_a_split_is_told_in_words() -> None:
    assert str(split_batch(16, 1)) == "16 images per iteration"
    assert str(split_batch(16, 8)) == "16 images per iteration = 8 processes x 2"
    assert str(split_batch(16, 2, 4)) == "16 images per iteration = 2 processes x 2 micro-batches x 4"
    assert str(split_batch(5, 1, 2)) == "5 images per iteration = 2+2+1"


def test_the_config_gives_batch_and_limit() -> None:
    cfg = get_cfg(None, ["SOLVER.IMS_PER_BATCH", 12, "SOLVER.MAX_IMS_PER_DEVICE", 2])
    assert build_batch_split(cfg, 3).micro_batches == (2, 2)


def test_nothing_is_scaled_unless_asked_for() -> None:
    for reference in (0, 4):
        cfg = get_cfg(None, ["SOLVER.REFERENCE_WORLD_SIZE", reference])
        before = cfg.dump()
        scale_to_processes(cfg, 4)
        assert cfg.dump() == before


def test_a_reference_scales_batch_rate_and_lengths() -> None:
    words = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.BASE_LR", 1e-4]
    words += ["SOLVER.MAX_ITER", 1000, "SOLVER.STEPS", (600, 900), "SOLVER.WARMUP_ITERS", 10]
    cfg = get_cfg(None, [*words, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 0])
    scale_to_processes(cfg, 2)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD) == (4, 4000, 40, 400)
    assert solver.BASE_LR == pytest.approx(2.5e-5)
    assert tuple(solver.STEPS) == (2400, 3600)
    assert cfg.TEST.EVAL_PERIOD == 0
    assert solver.REFERENCE_WORLD_SIZE == 2


def test_a_reference_that_gives_no_whole_batch_is_refused() -> None:
    cfg = get_cfg(None, ["SOLVER.REFERENCE_WORLD_SIZE", 3, "SOLVER.IMS_PER_BATCH", 16])
    with pytest.raises(UserError, match="no whole batch"):
        scale_to_processes(cfg, 2)
