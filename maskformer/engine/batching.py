"""How one effective batch is spread over processes and micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from maskformer.data.samplers import check_even_split
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BatchSplit(NamedTuple):
    """A batch, evenly on processes, each in micro-batches whose gradients are accumulated.

    Attributes:
        images: of an iteration, over all processes: the effective batch.
        processes: number of processes.
        micro_batches: images of each forward pass of a process, their sum is ``images / processes``.
    """

    images: int
    processes: int
    micro_batches: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.images} images per iteration"
        if self.processes == 1 and len(self.micro_batches) == 1:
            return text
        sizes = "+".join(str(size) for size in self.micro_batches)
        if len(set(self.micro_batches)) == 1 and len(self.micro_batches) > 1:
            sizes = f"{len(self.micro_batches)} micro-batches x {self.micro_batches[0]}"
        return f"{text} = {self.processes} processes x {sizes}" if self.processes > 1 else f"{text} = {sizes}"

    def cut(self, batch: Sequence[T]) -> list[Sequence[T]]:
        """The samples of a process in an iteration, cut into its micro-batches."""
        parts, start = [], 0
        for size in self.micro_batches:
            parts.append(batch[start : start + size])
            start += size
        return parts


def split_batch(images: int, processes: int, limit: int = 0) -> BatchSplit:
    """Spread a batch: as few micro-batches as `limit` allows, of sizes that differ by one at most.

    Args:
        images: ``SOLVER.IMS_PER_BATCH``.
        processes: number of processes.
        limit: ``SOLVER.MAX_IMS_PER_DEVICE``; 0 for none.

    Raises:
        UserError: if the processes cannot get equal shares.
    """
    check_even_split(images, processes)
    share = images // processes
    count = -(-share // limit) if limit else 1
    sizes = tuple(share // count + (i < share % count) for i in range(count))
    return BatchSplit(images, processes, sizes)


def build_batch_split(cfg: Any, processes: int) -> BatchSplit:
    """The split that the config asks for on so many processes.

    Raises:
        UserError: if the processes cannot get equal shares.
    """
    return split_batch(cfg.SOLVER.IMS_PER_BATCH, processes, cfg.SOLVER.MAX_IMS_PER_DEVICE)


def scale_to_processes(cfg: Any, processes: int) -> None:
    """Scale batch, learning rate and lengths from ``SOLVER.REFERENCE_WORLD_SIZE`` processes to `processes`, in place.

    Batch and learning rate are multiplied by the ratio (linear scaling, Goyal et al., 2017), iterations, periods and
    warm-up divided by it; the reference becomes `processes`. Nothing happens where it is 0 or equal already.

    Raises:
        UserError: if the scaled batch is no whole number.
    """
    solver, reference = cfg.SOLVER, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return
    if solver.IMS_PER_BATCH * processes % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference} and SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: scaled to "
            f"{processes} processes that is no whole batch; set the reference to 0 to keep the batch as it is"
        )

    def shorter(iterations: int) -> int:
        return max(1, round(iterations * reference / processes)) if iterations > 0 else iterations

    solver.IMS_PER_BATCH = solver.IMS_PER_BATCH * processes // reference
    solver.BASE_LR = solver.BASE_LR * processes / reference
    solver.MAX_ITER = shorter(solver.MAX_ITER)
    solver.WARMUP_ITERS = shorter(solver.WARMUP_ITERS)
    solver.STEPS = tuple(shorter(step) for step in solver.STEPS)
    solver.CHECKPOINT_PERIOD = shorter(solver.CHECKPOINT_PERIOD)
    cfg.TEST.EVAL_PERIOD = shorter(cfg.TEST.EVAL_PERIOD)
    solver.REFERENCE_WORLD_SIZE = processes
    logger.info(
        "scaled from %d to %d processes: batch %d, lr %g, %d iterations, steps %s, warm-up %d",
        reference, processes, solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS,
    )  # fmt: skip
