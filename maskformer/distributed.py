"""The processes of a run: which one this is, and what they tell each other. With one process all of it is trivial.

A thin layer over `torch.distributed`. Numbers and objects travel between the hosts (gloo), so that none of it waits
for a GPU; gradients travel between the devices (NCCL), which is DistributedDataParallel's business.
"""

from __future__ import annotations

import datetime
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from maskformer.errors import UserError

T = TypeVar("T")


class SharedUserError(UserError):
    """A mistake that every process reports in the same words, so that one of them is enough to print it."""


BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}


def is_initialized() -> bool:
    """Whether several processes have met."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Number of processes of the run, on all machines."""
    return distributed.get_world_size() if is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes logs and files."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device, seconds: float) -> Iterator[None]:
    """Meet the other processes, which the environment names as torchrun does; part from them at the end.

    Args:
        device: of this process.
        seconds: how long a process waits for the others before it gives up.

    Raises:
        UserError: if they cannot meet.
    """
    timeout = datetime.timedelta(seconds=seconds)
    try:
        distributed.init_process_group(BACKENDS.get(device.type, "gloo"), timeout=timeout, **_meeting_place(timeout))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not meet the others at {where} "
            f"({str(error).splitlines()[0]}); check that all of them were started and that this address is reachable "
            "from all machines, or name their network interface in GLOO_SOCKET_IFNAME"
        ) from error
    yield
    # Not after an error: the others are still waiting for this process, which ends to let them know.
    # In older versions of PyTorch (2.6 is one) gloo's threads may still let go of the last message while holding what
    # destroying the group waits for, which then never ends; a moment later they are done.
    time.sleep(0.1)
    distributed.destroy_process_group()


def _meeting_place(timeout: datetime.timedelta) -> dict[str, Any]:
    """A store of this attempt alone, where torchrun lends the one that it keeps over restarts.

    In that one, processes that were started anew would find the addresses of those that died. Processes of one machine
    count restarts alike, so the number tells attempts apart; for several machines see docs/distributed.md.
    """
    get = os.environ.get
    if get("TORCHELASTIC_USE_AGENT_STORE") != "True" or get("LOCAL_WORLD_SIZE") != get("WORLD_SIZE"):
        return {}
    size, number = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    shared = distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False, timeout=timeout
    )
    store = distributed.PrefixStore(f"attempt_{get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    return {"store": store, "rank": number, "world_size": size}


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        gather(None)  # over gloo, whatever the device: NCCL's own barrier would take up memory on the GPU


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """The sums of `values` over all processes, added up as float64; every process gets them."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    sums: list[float] = total.tolist()
    return sums


def gather(value: T) -> list[T]:
    """`value` of every process in the order of their ranks; every process gets the list.

    Args:
        value: can be pickled; keep it small, large ones are for `gather_to_main`.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_to_main(value: T) -> list[T]:
    """`value` of every process in the order of their ranks on the main process; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    distributed.gather_object(value, values)
    return values or []


def broadcast(value: T) -> T:
    """`value` of the main process, on every process."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    received: T = values[0]
    return received


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on the main process alone.

    Returns:
        Its result, on every process.

    Raises:
        SharedUserError: on every process, if it raised a `UserError`.
    """
    if world_size() == 1:
        return function()
    outcome: tuple[Any, str | None] = (None, None)
    if is_main():
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, problem = broadcast(outcome)
    if problem is not None:
        raise SharedUserError(problem)
    answer: T = result
    return answer


def agree(problem: str | None) -> None:
    """Stop every process if one of them has a problem.

    Raises:
        SharedUserError: with the problem of the first process that has one.
    """
    problems = [text for text in gather(problem) if text]
    if problems:
        raise SharedUserError(problems[0])


@contextmanager
def agreeing() -> Iterator[None]:
    """What every process does alike and without talking to the others: a mistake of one is that of all.

    Raises:
        SharedUserError: on every process, if one of them raises a `UserError` inside.
    """
    problem = None
    try:
        yield
    except UserError as error:
        if world_size() == 1:
            raise
        problem = str(error)
    agree(problem)


def lost_others(error: BaseException) -> str | None:
    """In a few words, if an error says that talking to another process failed; None if it says something else."""
    text = str(error)
    if not is_initialized() or not isinstance(error, RuntimeError):
        return None
    if any(words in text for words in ("Connection closed by peer", "Connection reset", "Broken pipe", "Read error")):
        return "another process ended"
    if "imed out" in text or "imeout" in text:
        return "another process did not answer within DISTRIBUTED_TIMEOUT"
    return None


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The model with gradients averaged over all processes; None if there is one process.

    Parameters and buffers become those of the main process. Every parameter must have a gradient in every step.
    """
    if world_size() == 1:
        return None
    # Buffers are broadcast before they are evaluated or saved, not in every step; newer versions renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    broadcast_buffers(model)  # where the option is off, older versions leave them as they are
    options: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def broadcast_buffers(model: nn.Module) -> None:
    """Give the buffers of every process (running statistics of batch norms) the main process's values."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
