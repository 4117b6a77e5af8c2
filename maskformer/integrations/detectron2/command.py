"""The command of `tools/train_net_detectron2.py`: Detectron2's command line on our recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from maskformer.config.loading import find_config
from maskformer.device import resolve_device
from maskformer.engine.device import seed_everything
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import catalog
from maskformer.integrations.detectron2.config import add_maskformer_config
from maskformer.integrations.detectron2.training import Trainer, check_test_data, with_seed
from maskformer.integrations.detectron2.validation import check_values
from maskformer.integrations.detectron2.weights import MaskFormerCheckpointer

USER_ERROR = 2
EPILOG = """
example: %(prog)s --config-file configs/ade20k-150/maskformer_R50_bs16_160k.yaml --num-gpus 8 OUTPUT_DIR output/r50

--num-gpus 0 runs one process on the CPU. --eval-only evaluates MODEL.WEIGHTS, with --resume the newest checkpoint.
"""


def build_config(config_file: str, overrides: Sequence[str] = ()) -> Any:
    """A recipe of ours as a config of Detectron2, in which it means what it means natively.

    Args:
        config_file: YAML file, or the path of one that comes with the package.
        overrides: ``KEY, VALUE, ...`` as on the command line.

    Returns:
        A config that is not frozen; data sets of ours that it names are in Detectron2's catalogs.

    Raises:
        UserError: if the file, a key, a device or a data set is not there, or a value cannot work.
    """
    cfg = get_cfg()
    add_maskformer_config(cfg, our_defaults=True)
    try:
        cfg.merge_from_file(str(find_config(config_file)))
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{config_file} or the keys after it do not fit Detectron2's config: {error}") from error
    check_values(cfg)
    cfg.MODEL.DEVICE = str(resolve_device(cfg.MODEL.DEVICE))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        catalog.ensure_registered(name)
    return cfg


def read_config(arguments: argparse.Namespace) -> Any:
    """`build_config` of the arguments.

    Raises:
        UserError: see there; also if no file is named.
    """
    if not arguments.config_file:
        raise UserError("--config-file is missing: name a recipe, such as configs/quickstart/shapes_panoptic.yaml")
    return build_config(
        arguments.config_file, [*arguments.opts, *(("MODEL.DEVICE", "cpu") if arguments.num_gpus == 0 else ())]
    )


def check_start(cfg: Any, arguments: argparse.Namespace) -> None:
    """Refuse processes that could not run, and a folder that cannot be written, before anything is started.

    Raises:
        UserError: naming the argument or key.
    """
    processes, machines, gpus = arguments.num_gpus, arguments.num_machines, torch.cuda.device_count()
    if processes < 0:
        raise UserError(f"--num-gpus is {processes}: give the number of GPUs of this machine, or 0 for the CPU")
    if machines > 1 and processes == 0:
        raise UserError(
            f"--num-machines is {machines}, but --num-gpus 0 is one process on the CPU: leave one of them out"
        )
    several = processes * machines > 1
    if several and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            f"--num-gpus is {processes} on {machines} machine(s), but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, and "
            "Detectron2 runs several processes on CUDA alone: use --num-gpus 0, or tools/train_net.py"
        )
    if several and processes > gpus:
        raise UserError(f"--num-gpus is {processes}, but this machine has {gpus}: give {gpus} at most")
    if "://" not in cfg.OUTPUT_DIR:
        try:
            Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made ({error.strerror}): name another folder"
            ) from error


def run(arguments: argparse.Namespace) -> Any:
    """Train or evaluate in this process; Detectron2's launcher calls it in each.

    Raises:
        UserError: for every mistake in config, data or weights.
    """
    cfg = with_seed(read_config(arguments))
    arguments.config_file = str(find_config(arguments.config_file))  # which Detectron2 copies into its log
    cfg.freeze()
    default_setup(cfg, arguments)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="maskformer")
    if cfg.DETERMINISTIC:
        seed_everything(cfg.SEED + comm.get_rank(), True, cfg.CUDNN_BENCHMARK)
    if arguments.eval_only:
        return evaluate(cfg, arguments.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    return trainer.train()


def evaluate(cfg: Any, resume: bool) -> Any:
    """Metrics of ``MODEL.WEIGHTS``, or of the newest checkpoint in ``OUTPUT_DIR``.

    Raises:
        UserError: if there are no weights, or no data set to evaluate on.
    """
    newest = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    if not cfg.MODEL.WEIGHTS and not (resume and newest.is_file()):
        raise UserError(
            "--eval-only needs weights but MODEL.WEIGHTS is empty; set it to a weight file, or add --resume for the "
            "newest checkpoint in OUTPUT_DIR"
        )
    if not cfg.DATASETS.TEST:
        raise UserError("--eval-only needs a data set but DATASETS.TEST is empty; name one like ('folder:data:val',)")
    check_test_data(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = MaskFormerCheckpointer(model, save_dir=cfg.OUTPUT_DIR, strict=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, or 2 after a mistake of the user's.
    """
    arguments = default_argument_parser(EPILOG).parse_args(argv)
    try:
        # Each process reads it again; mistakes are found in this one.
        check_start(read_config(arguments), arguments)
        launch(
            run,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except UserError as error:
        return report(str(error))
    except ProcessRaisedException as error:
        sentence = user_error_in(str(error))
        if sentence is None:
            raise
        return report(sentence)
    return 0


def user_error_in(traceback: str) -> str | None:
    """The sentence of a `UserError` that ended a process, whose traceback alone is handed on; None for others."""
    name, _, sentence = traceback.strip().splitlines()[-1].partition(": ")
    # One sentence, so one line. All classes of such errors are ours and end like this.
    return sentence if name.startswith("maskformer.") and name.endswith("UserError") else None


def report(sentence: str) -> int:
    """Print what the user has to mend; returns the exit code."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)  # noqa: T201
    return USER_ERROR
