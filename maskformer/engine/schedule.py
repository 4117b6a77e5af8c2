"""Learning-rate schedules: closed formulas of the iteration, so that a resumed run needs nothing but its number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from maskformer.errors import UserError

Factor = Callable[[int], float]


def warmup(*, method: str, factor: float, iterations: int) -> Factor:
    """Factor of the first `iterations`: rising linearly from `factor` to 1, or constantly `factor`; 1 afterwards.

    Raises:
        UserError: if `method` is neither ``linear`` nor ``constant``.
    """
    if method not in ("linear", "constant"):
        raise UserError(f"SOLVER.WARMUP_METHOD is {method!r}, which is not known; use linear or constant")

    def at(iteration: int) -> float:
        if iteration >= iterations:
            return 1.0
        if method == "constant":
            return factor
        progress = iteration / iterations
        return factor * (1 - progress) + progress

    return at


def poly(*, max_iterations: int, power: float, constant_ending: float, warmup_at: Factor) -> Factor:
    """``WarmupPolyLR``: w(it) · (1 - it/max)^power; once warm-up is over never below `constant_ending`, if positive."""

    def at(iteration: int) -> float:
        decayed = (1.0 - min(iteration, max_iterations) / max_iterations) ** power
        warm = warmup_at(iteration)
        if constant_ending > 0 and warm == 1.0:
            return max(decayed, constant_ending)
        return warm * decayed

    return at


def multi_step(*, steps: Sequence[int], gamma: float, warmup_at: Factor) -> Factor:
    """``WarmupMultiStepLR``: w(it) · gamma for every step with it ≥ step."""
    ordered = sorted(steps)
    return lambda iteration: warmup_at(iteration) * gamma ** bisect_right(ordered, iteration)


def build_schedule(cfg: Any) -> Factor:
    """Iteration (from 0) → factor of the base learning rates, as ``SOLVER.LR_SCHEDULER_NAME`` says.

    Raises:
        UserError: for an unknown name or method.
    """
    solver = cfg.SOLVER
    warmup_at = warmup(method=solver.WARMUP_METHOD, factor=solver.WARMUP_FACTOR, iterations=solver.WARMUP_ITERS)
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return poly(
            max_iterations=solver.MAX_ITER,
            power=solver.POLY_LR_POWER,
            constant_ending=solver.POLY_LR_CONSTANT_ENDING,
            warmup_at=warmup_at,
        )
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        return multi_step(steps=solver.STEPS, gamma=solver.GAMMA, warmup_at=warmup_at)
    raise UserError(
        f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}, which is not known; "
        "use WarmupPolyLR or WarmupMultiStepLR"
    )


def build_scheduler(cfg: Any, optimizer: Optimizer, start_iteration: int = 0) -> LambdaLR:
    """A scheduler that stands at `start_iteration`; stepped once after every optimizer step."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # what LambdaLR starts from in the middle of a run
    return LambdaLR(optimizer, build_schedule(cfg), last_epoch=start_iteration - 1)
