"""The processes of a run: started here through torchrun's own API, or by torchrun or SLURM and only recognised here."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import maskformer
from maskformer.errors import UserError

USER_ERROR = 2
SLURM_PORTS = range(20000, 30000)


class Place(NamedTuple):
    """Where a process stands among those of its run.

    Attributes:
        rank: its number, from 0.
        world_size: number of processes of the run.
        local_rank: its number on this machine, from 0.
        local_world_size: number of processes on this machine.
        restarts: how often the run was started anew after a failure.
        max_restarts: how often it may be.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restarts: int = 0
    max_restarts: int = 0


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun (or whoever sets the same variables) gave this process; None if nobody did.

    Raises:
        UserError: if the variables contradict each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    names += ["TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"]
    defaults = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
    texts = {name: environment.get(name, defaults.get(name, "0")) for name in names}
    for name, text in texts.items():
        if not text.isdigit():
            raise UserError(f"the environment variable {name} is {text!r} but must be a number: start with torchrun")
    place = Place(*(int(texts[name]) for name in names))
    if place.rank >= place.world_size or place.local_rank >= place.local_world_size:
        raise UserError(
            f"the environment says RANK {place.rank} of WORLD_SIZE {place.world_size} and LOCAL_RANK "
            f"{place.local_rank} of LOCAL_WORLD_SIZE {place.local_world_size}: start with torchrun, or unset them"
        )
    return place


def adopt_slurm(environment: MutableMapping[str, str], num_machines: int) -> bool:
    """Translate the variables of a SLURM step of several tasks (``srun``) into torchrun's.

    A batch script outside ``srun`` has no step of several tasks, so it is left alone.

    Args:
        environment: changed in place.
        num_machines: of the command line; above 1, every task is to start the processes of its machine itself.

    Returns:
        Whether there was something to translate.

    Raises:
        UserError: if SLURM's tasks and the command line do not fit together.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "RANK" in environment:
        return False
    if num_machines > 1:
        if tasks != num_machines:
            raise UserError(
                f"SLURM started {tasks} tasks but --num-machines is {num_machines}: start one task per machine "
                "(srun --ntasks-per-node 1), or drop --num-gpus and --num-machines so that every task is a process"
            )
        return False
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # Steps of one job may run at the same time.
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_WORLD_SIZE"] = str(tasks_on_this_node(environment))
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(SLURM_PORTS[job % len(SLURM_PORTS)]))
    return True


def tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """Number of tasks of the SLURM step on this node, from a list such as ``8(x2),4``."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]).split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def first_host(nodes: str) -> str:
    """First host of a SLURM node list such as ``gpu[07-09,12],login1``.

    Raises:
        UserError: if the list cannot be read.
    """
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    if match is None:
        raise UserError(
            f"SLURM's node list {nodes!r} cannot be read: set MASTER_ADDR to the first node's name yourself"
        )
    return "".join(part or "" for part in match.groups())


def check_place(arguments: argparse.Namespace, place: Place) -> None:
    """Refuse a command line that asks for other processes than were started.

    Raises:
        UserError: naming the argument.
    """
    asked = 1 if arguments.num_gpus == 0 else arguments.num_gpus  # 0: one process, on the CPU
    if asked not in (None, place.local_world_size):
        raise UserError(
            f"--num-gpus is {arguments.num_gpus} but torchrun or srun started {place.local_world_size} processes on "
            "this machine: leave it out, or let one process per machine start the others with --num-machines, "
            "--machine-rank and --dist-url"
        )
    if arguments.max_restarts and arguments.max_restarts != place.max_restarts:
        raise UserError(
            f"--max-restarts is {arguments.max_restarts} but the processes were started by another launcher, which "
            f"allows {place.max_restarts}: give it to torchrun, or start without it"
        )
    if arguments.num_machines > 1 and arguments.num_machines * place.local_world_size != place.world_size:
        raise UserError(
            f"--num-machines is {arguments.num_machines} but {place.world_size} processes were started, "
            f"{place.local_world_size} of them on this machine: leave it out, the launcher decides"
        )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse numbers of processes and machines that cannot be meant.

    Raises:
        UserError: naming the argument.
    """
    if arguments.num_gpus is not None and arguments.num_gpus < 0:
        raise UserError(f"--num-gpus is {arguments.num_gpus}; give 0 for the CPU, or the number of GPUs")
    if arguments.num_machines < 1:
        raise UserError(f"--num-machines is {arguments.num_machines}; give 1 or more")
    if not 0 <= arguments.machine_rank < arguments.num_machines:
        raise UserError(
            f"--machine-rank is {arguments.machine_rank} but there are machines 0 to {arguments.num_machines - 1}; "
            "give each machine its own number, and all of them the same --num-machines"
        )
    if arguments.profile and arguments.eval_only:
        raise UserError(
            f"--profile {arguments.profile} traces training, but --eval-only does not train; drop one of them"
        )
    if arguments.max_restarts < 0:
        raise UserError(f"--max-restarts is {arguments.max_restarts}; give 0 or more")
    endpoint(arguments)


def endpoint(arguments: argparse.Namespace) -> str:
    """``host:port`` where the machines meet; on one machine any free port.

    Raises:
        UserError: if ``--dist-url`` is missing or is no such address.
    """
    if arguments.num_machines == 1 and arguments.dist_url == "auto":
        return "localhost:0"
    if arguments.dist_url == "auto":
        raise UserError(
            "--dist-url is missing: several machines meet at one address, such as tcp://first-machine:29500"
        )
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/\[\]]+):(\d+)/?", arguments.dist_url)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(
            f"--dist-url is {arguments.dist_url!r}, which is no address; write tcp://host:port with the name of "
            "machine 0, or start with torchrun, which has its own options"
        )
    return f"{match[1]}:{match[2]}"


def launch(argv: Sequence[str], arguments: argparse.Namespace, processes: int, folder: Path) -> int:
    """Start `processes` processes of this command on this machine and wait for them.

    Args:
        argv: the command's arguments, given to each process.
        arguments: the same, parsed.
        processes: number of processes on this machine.
        folder: ``OUTPUT_DIR``, where a hint at the cause of a failure can point to.

    Returns:
        Exit code: 0; that of the process that failed first, 1 if a signal ended it, or 128 + n if this process got
        signal n (Ctrl-C, or a scheduler's).

    Raises:
        UserError: if the machines cannot meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    several = arguments.num_machines > 1
    config = LaunchConfig(
        min_nodes=arguments.num_machines,
        max_nodes=arguments.num_machines,
        nproc_per_node=processes,
        rdzv_backend="c10d" if arguments.max_restarts or not several else "static",
        rdzv_endpoint=endpoint(arguments),
        rdzv_configs=rendezvous_options(arguments),
        run_id="maskformer",
        max_restarts=arguments.max_restarts,
        local_addr=None if several else "localhost",
    )
    share_cores(os.environ, processes)
    # In torchrun's own store, processes that were started anew find the addresses of those that died.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if several:
        print(f"machine {arguments.machine_rank}: waiting at {config.rdzv_endpoint} for the others", file=sys.stderr)  # noqa: T201
    packages = str(Path(maskformer.__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    try:
        elastic_launch(config, sys.executable)("-m", "maskformer.engine.main", *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return report_failure(rank, failure, folder)
    except RendezvousError as error:
        raise UserError(
            f"machine {arguments.machine_rank} could not meet the others at {config.rdzv_endpoint} ({error}); start "
            "the command on all of them, machine 0 at that address"
        ) from error
    except SignalException as signal:
        return 128 + int(signal.sigval)  # what shells report; the processes have got it too, and said what is left
    return 0


def rendezvous_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What torchrun's rendezvous needs besides the address; only machine 0 can be the host of it."""
    if arguments.num_machines == 1:
        return {}
    if arguments.max_restarts:
        return {"is_host": "1" if arguments.machine_rank == 0 else "0"}
    return {"rank": arguments.machine_rank}


def share_cores(environment: MutableMapping[str, str], processes: int) -> None:
    """Give each process its share of the cores as threads, unless the user said how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def report_failure(rank: int, failure: Any, folder: Path) -> int:
    """Say in one sentence which process failed first, unless it said why itself; returns the exit code."""
    code = int(failure.exitcode)
    if code == USER_ERROR:
        return code
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    print(f"error: process {rank} {how}; see above and {folder / name}", file=sys.stderr)  # noqa: T201
    return max(1, code)
