"""The command that trains and evaluates: ``tools/train_net.py``, ``maskformer train`` and ``maskformer eval``."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskformer.errors import UserError

logger = logging.getLogger(__name__)

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
        "--num-gpus", type=int, metavar="N", help="0: the CPU, 1: one GPU; default: as MODEL.DEVICE says"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="number of machines; only 1 so far")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="where several processes meet; unused by one")
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
        Exit code: 0, or 2 after a mistake of the user's, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_intermixed_args(argv)
    try:
        run(arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def check_device_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what one process on one device cannot do.

    Raises:
        UserError: naming the argument.
    """
    if arguments.num_gpus is not None and arguments.num_gpus not in (0, 1):
        raise UserError(f"--num-gpus is {arguments.num_gpus} but only one device is supported so far; use 0 (CPU) or 1")
    if arguments.num_machines != 1:
        raise UserError(f"--num-machines is {arguments.num_machines} but only one machine is supported so far; use 1")
    if arguments.machine_rank != 0:
        raise UserError(f"--machine-rank is {arguments.machine_rank} but there is only machine 0; leave it out")


def run(arguments: argparse.Namespace) -> None:
    """Train or evaluate as the arguments say.

    Raises:
        UserError: for every mistake in config, data or weights.
    """
    check_device_arguments(arguments)
    # Here, so that --help and a mistake in arguments or config need not wait for PyTorch.
    from maskformer.config import dump, get_cfg

    cfg: Any = get_cfg(arguments.config_file, arguments.opts)

    from maskformer.engine.device import choose_device, seed_everything
    from maskformer.engine.evaluating import evaluate_only
    from maskformer.engine.startup import logging_to
    from maskformer.engine.training import find_resumption, train

    device = choose_device(cfg.MODEL.DEVICE, arguments.num_gpus)
    folder = Path(cfg.OUTPUT_DIR)
    with logging_to(folder):
        logger.info("config: %s", " ".join([arguments.config_file, *arguments.opts]))
        resumption = find_resumption(folder) if arguments.resume else None
        if cfg.SEED < 0:
            cfg.SEED = resumption.seed if resumption else random.SystemRandom().randint(0, MAX_SEED)
        config_text = dump(cfg)  # with MODEL.DEVICE as the user has it: files move between machines
        cfg.MODEL.DEVICE = str(device)
        seed_everything(cfg.SEED, cfg.DETERMINISTIC, cfg.CUDNN_BENCHMARK)
        try:
            if arguments.eval_only:
                evaluate_only(cfg, config_text, resumption)
            else:
                train(cfg, config_text, resumption)
        except KeyboardInterrupt:
            logger.warning("stopped by Ctrl-C; %s", how_to_continue(folder))
            raise


def how_to_continue(folder: Path) -> str:
    """What is left of an interrupted run."""
    last = folder / "last_checkpoint"
    if not last.is_file():
        return "there is no checkpoint yet"
    return f"the last checkpoint is {folder / last.read_text().strip()}, --resume continues from it"
