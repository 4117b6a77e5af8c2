"""The command that trains and evaluates: ``tools/train_net.py``, ``maskformer train`` and ``maskformer eval``."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from maskformer.engine.launch import USER_ERROR, Place, adopt_slurm, check_arguments, check_place, find_place, launch
from maskformer.errors import UserError

# Not __name__, which is __main__ in processes that are started: their lines would miss the log.
logger = logging.getLogger("maskformer.engine.main")

INTERRUPTED = 130  # what shells report for Ctrl-C
MAX_SEED = 2**31 - 1


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's command line."""
    parser = argparse.ArgumentParser(
        description="Train the model of a config file and evaluate it, or only evaluate weights.",
        epilog="example: %(prog)s --config-file configs/quickstart/shapes_panoptic.yaml SOLVER.MAX_ITER 200 SEED 1",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or a shipped configs/... path")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (with --resume the newest checkpoint)"
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes on this machine, each with a GPU of its own (on the CPU with MODEL.DEVICE cpu); 0: one process "
        "on the CPU; default: one process on MODEL.DEVICE",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="machines, each runs this command")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="where several machines meet: tcp://machine-0:port"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="K",
        help="when a process dies, start all anew from the newest checkpoint, so often at most",
    )
    parser.add_argument(
        "--profile", metavar="A:B", help="trace iterations A to B-1 into OUTPUT_DIR/profile, such as 20:30"
    )
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was found")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys to override, such as SOLVER.BASE_LR 1e-4"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, or 2 after a mistake of the user's, or 130 after Ctrl-C; of a run of several processes, that of
        the one that failed first.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_intermixed_args(words)
    try:
        return run(arguments, words)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        report(error)
        return leave(USER_ERROR)
    except RuntimeError as error:
        if arguments.debug or not report_loss(error):
            raise
        return leave(1)
    except KeyboardInterrupt:
        return leave(INTERRUPTED)


def leave(code: int) -> int:
    """The exit code; a process that has met others and failed ends here and now.

    The others may be gone, so it cannot part from them, and gloo's threads, if the interpreter ended as usual, would
    sometimes abort it with an exit code that says nothing.
    """
    if "torch" in sys.modules:
        from maskformer.distributed import is_initialized

        if is_initialized():
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def report(error: UserError) -> None:
    """Print the one sentence; what all processes say in the same words, the main one prints."""
    rank = int(os.environ.get("RANK", "0"))
    shared = type(error).__name__ == "SharedUserError"  # by name: --help and mistakes in a config need no PyTorch
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    elif not shared:
        print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)  # noqa: T201
    if shared:
        from maskformer.distributed import barrier

        # The first process that ends takes the others with it, so all wait until the main one has said why.
        with suppress(RuntimeError):
            barrier()


def report_loss(error: RuntimeError) -> bool:
    """Say in one sentence that another process is gone, if that is what an error means; else False."""
    from maskformer import distributed

    reason = distributed.lost_others(error)
    if reason is not None:
        first_line = str(error).splitlines()[0]
        print(  # noqa: T201
            f"error: process {distributed.rank()} stopped because {reason}, which says itself why: see above and "
            f"OUTPUT_DIR/log.txt.rank* ({first_line})",
            file=sys.stderr,
        )
    return reason is not None


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Train or evaluate as the arguments say, in this process or in as many as are asked for.

    Args:
        arguments: parsed.
        words: the same as they came, for the processes that are started.

    Returns:
        Exit code.

    Raises:
        UserError: for every mistake in arguments, config, data or weights.
    """
    check_arguments(arguments)
    # Here, so that --help and a mistake in arguments or config need not wait for PyTorch.
    from maskformer.config import get_cfg

    cfg: Any = get_cfg(arguments.config_file, arguments.opts)
    adopt_slurm(os.environ, arguments.num_machines)
    place = find_place(os.environ)
    if place is None:
        processes = max(1, arguments.num_gpus or 1)
        if processes * arguments.num_machines > 1 or arguments.max_restarts:
            check_launch(cfg, arguments, processes)
            return launch(words, arguments, processes, Path(cfg.OUTPUT_DIR))
        place = Place()
    else:
        check_place(arguments, place)

    import torch

    from maskformer.distributed import process_group
    from maskformer.engine.device import choose_device

    device = choose_device(cfg.MODEL.DEVICE, arguments.num_gpus, place.local_rank, place.local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL and everything else without a device of its own uses this one
    together = process_group(device, cfg.DISTRIBUTED_TIMEOUT) if place.world_size > 1 else nullcontext()
    with together:
        run_process(cfg, arguments, place, device)
    return 0


def check_launch(cfg: Any, arguments: argparse.Namespace, processes: int) -> None:
    """Find what no process could do before any is started, so that it is said once.

    Raises:
        UserError: about the devices, or a batch that the processes cannot share.
    """
    from maskformer.engine.batching import build_batch_split, scale_to_processes
    from maskformer.engine.device import check_devices, choose_device

    world = processes * arguments.num_machines
    device = choose_device(cfg.MODEL.DEVICE, arguments.num_gpus, processes - 1, processes)
    if device.type == "cuda":
        check_devices(processes)
    cfg = cfg.clone()
    if not arguments.eval_only:
        scale_to_processes(cfg, world)
        build_batch_split(cfg, world)


def run_process(cfg: Any, arguments: argparse.Namespace, place: Place, device: Any) -> None:
    """What every process of a run does, once they have met.

    Args:
        cfg: of the run.
        arguments: of the command line.
        place: of this process.
        device: of this process.

    Raises:
        UserError: for every mistake in config, data or weights.
    """
    from maskformer import distributed
    from maskformer.config import dump
    from maskformer.engine.batching import scale_to_processes
    from maskformer.engine.device import seed_everything
    from maskformer.engine.evaluating import evaluate_only
    from maskformer.engine.startup import check_agreement, logging_to
    from maskformer.engine.training import find_start, train

    folder = Path(cfg.OUTPUT_DIR)
    with logging_to(folder):
        logger.info("config: %s", " ".join([arguments.config_file, *arguments.opts]))
        options = {f"--{name}": getattr(arguments, name) for name in ("resume", "eval_only", "profile")}
        check_agreement(dump(cfg), options, device, folder)
        # torchrun counts restarts for each machine; one that only took part in another's restart counts none.
        restarts = max(distributed.gather(place.restarts))
        resumption = find_start(folder, resume=arguments.resume, restarted=restarts > 0 and not arguments.eval_only)
        if cfg.SEED < 0:
            drawn = resumption.seed if resumption else random.SystemRandom().randint(0, MAX_SEED)
            cfg.SEED = distributed.broadcast(drawn)
        if not arguments.eval_only:
            with distributed.agreeing():
                scale_to_processes(cfg, place.world_size)
        config_text = dump(cfg)  # with MODEL.DEVICE as the user has it: files move between machines
        cfg.MODEL.DEVICE = str(device)
        seed_everything(cfg.SEED, cfg.DETERMINISTIC, cfg.CUDNN_BENCHMARK)
        try:
            if arguments.eval_only:
                evaluate_only(cfg, config_text, resumption)
            else:
                train(cfg, config_text, resumption, arguments.profile)
        except KeyboardInterrupt:
            logger.warning("stopped by Ctrl-C; %s", how_to_continue(folder))
            raise


def how_to_continue(folder: Path) -> str:
    """What is left of an interrupted run."""
    last = folder / "last_checkpoint"
    if not last.is_file():
        return "there is no checkpoint yet"
    return f"the last checkpoint is {folder / last.read_text().strip()}, --resume continues from it"


if __name__ == "__main__":
    sys.exit(main())
