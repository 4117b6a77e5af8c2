"""The training loop: batches in, weights changed; everything else happens in hooks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskformer import distributed
from maskformer.engine.batching import BatchSplit
from maskformer.engine.metrics_log import LossWindow
from maskformer.engine.optimizer import Clipper
from maskformer.timing import StopWatch, section

Batch = Sequence[Mapping[str, Any]]


class Hook:
    """What happens around the steps: logging, saving, evaluating. The loop knows none of it."""

    def before_train(self, trainer: Trainer) -> None:
        """Called once, before the first step."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after every step; `trainer.iteration` is that step's number, from 0."""

    def after_train(self, trainer: Trainer) -> None:
        """Called once, after the last step, only if training came that far."""

    def close(self) -> None:
        """Called at the very end, also after an error: give back files and terminals."""


class BatchStream(Protocol):
    """An endless iterator of batches that knows where it stands, and how many images an epoch has."""

    position: int
    epoch_length: int

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""

    def __next__(self) -> Batch:
        """The next batch."""

    def close(self) -> None:
        """Give back what it holds, such as worker processes."""


class Precision:
    """Mixed precision: what the forward pass computes in, and the loss scaling that float16 needs.

    Args:
        device: where the model is.
        enabled: off means float32 throughout.
        dtype: what autocast computes in; None for float16 on CUDA and bfloat16 elsewhere.
    """

    def __init__(self, device: torch.device, enabled: bool, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.enabled = enabled
        self.dtype = dtype or (torch.float16 if device.type == "cuda" else torch.bfloat16)
        self.scaler = torch.amp.GradScaler(device.type, enabled=enabled and self.dtype is torch.float16)

    def autocast(self) -> torch.autocast:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)

    def __str__(self) -> str:
        return f"mixed {str(self.dtype).removeprefix('torch.')}" if self.enabled else "float32"


class Trainer:
    """Trains a meta-architecture; hooks do the rest.

    Args:
        model: called with samples and normalisers, returns scalar losses by name; what is evaluated and saved.
        optimizer: see `build_optimizer`.
        scheduler: stepped after every optimizer step.
        batches: endless.
        max_iterations: the run is over after that many steps, those before a resume included.
        start_iteration: number of steps done before.
        clip: gradient clipping, or None.
        precision: mixed precision; None for float32.
        split: cuts what `batches` gives into micro-batches; None for one.
        parallel: `model` inside DistributedDataParallel, if there are several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        batches: BatchStream,
        *,
        max_iterations: int,
        start_iteration: int = 0,
        clip: Clipper | None = None,
        precision: Precision | None = None,
        split: BatchSplit | None = None,
        parallel: DistributedDataParallel | None = None,
    ) -> None:
        self.model = model
        self.parallel = parallel
        self.split = split
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.max_iterations = max_iterations
        self.start_iteration = start_iteration
        self.iteration = start_iteration - 1
        self.clip = clip
        self.precision = precision or Precision(torch.device("cpu"), enabled=False)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.learning_rates: list[float] = []  # of the step just done, by group
        self.losses = LossWindow()
        self.watch = StopWatch(self.precision.device)
        self.stopping = False
        self._ahead: Batch | None = None  # read by `rehearse`, for the step to come
        self.step_time = 0.0
        self.data_time = 0.0

    @property
    def finished_iterations(self) -> int:
        """Number of steps done so far, those before a resume included."""
        return self.iteration + 1

    @property
    def is_last(self) -> bool:
        """Whether the step just done is the last one."""
        return self.stopping or self.finished_iterations >= self.max_iterations

    def stop(self) -> None:
        """Make the step just done the last one."""
        self.stopping = True

    def train(self, hooks: Sequence[Hook] = ()) -> None:
        """Run the remaining steps.

        Args:
            hooks: called in this order at each of their moments.
        """
        try:
            self.model.train()
            for hook in hooks:
                hook.before_train(self)
            for iteration in range(self.start_iteration, self.max_iterations):
                if self.stopping:  # before the first step: a run that had stopped early is resumed
                    break
                self.iteration = iteration
                self.step()
                for hook in hooks:
                    hook.after_step(self)
            for hook in hooks:
                hook.after_train(self)
        finally:
            self.batches.close()
            for hook in reversed(hooks):
                hook.close()

    def rehearse(self) -> None:
        """Forward and backward pass of the next step without consequences, for several processes that resume.

        After its first step DistributedDataParallel arranges the gradients anew, in the order in which they come, and
        with it the order in which three or more processes are summed. So it is before the first step of a resumed run,
        whose sums are then those of a run that never stopped, to the last bit. Draws random numbers.
        """
        if self.parallel is None or self.is_last:
            return
        self.model.train()
        self._ahead = next(self.batches)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.backward(self.micro_batches(self._ahead))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def micro_batches(self, batch: Batch) -> Sequence[Batch]:
        """This process's share of a step's batch, cut as the split says."""
        return [batch] if self.split is None else self.split.cut(batch)

    def step(self) -> None:
        """One optimizer step."""
        start = time.perf_counter()
        with self.watch.measuring():
            with section("data"):
                batch, self._ahead = self._ahead or next(self.batches), None
            self.data_time = time.perf_counter() - start
            losses = self.backward(self.micro_batches(batch))
            self.losses.add(self.iteration, losses, [str(sample.get("file_name", "?")) for sample in batch])
            with section("optimizer"):
                self.update()
        self.step_time = time.perf_counter() - start

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Accumulate the gradients of a step.

        Args:
            batches: the micro-batches of this process.

        Returns:
            Detached scalar losses by name, summed over the micro-batches of this process: their normalisers are those
            of the whole step, so that the step's losses are the sums over all processes.
        """
        with section("data"):  # of which processes that are ready wait for those that still read
            normalizers = self.normalizers(batches)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            with self.gradient_exchange(number == len(batches) - 1):
                with section("forward"), self.precision.autocast():
                    losses: dict[str, Tensor] = (self.parallel or self.model)(batch, normalizers=normalizers)
                    total = torch.stack(list(losses.values())).sum()
                    if self.parallel is not None:
                        # It averages gradients over the processes, but the losses are shares of the whole already.
                        total = total * distributed.world_size()
                with section("backward"):
                    self.precision.scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        return sums

    def normalizers(self, batches: Sequence[Batch]) -> Any:
        """The divisors of the step's losses, summed over micro-batches and processes."""
        model: Any = self.model
        own = reduce(lambda a, b: a.plus(b), (model.loss_normalizers(batch) for batch in batches))
        return own._make(distributed.sum_over_ranks(own))

    @contextmanager
    def gradient_exchange(self, now: bool) -> Iterator[None]:
        """Forward and backward passes whose gradients the processes exchange, or only keep for the last micro-batch."""
        if self.parallel is None or now:
            yield
        else:
            with self.parallel.no_sync():
                yield

    def update(self) -> None:
        """Clip, step the optimizer and the schedule, forget the gradients."""
        scaler = self.precision.scaler
        if self.clip is not None:
            scaler.unscale_(self.optimizer)
            self.clip(self.parameters)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler.step()
