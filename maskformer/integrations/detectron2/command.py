"""The command of `tools/train_net_detectron2.py`: Detectron2's command line on our recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

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


def run(arguments: argparse.Namespace) -> Any:
    """Train or evaluate in this process; Detectron2's launcher calls it in each.

    Raises:
        UserError: for every mistake in config, data or weights.
    """
    overrides = [*arguments.opts, *(("MODEL.DEVICE", "cpu") if arguments.num_gpus == 0 else ())]
    cfg = with_seed(build_config(arguments.config_file, overrides))
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
        launch(
            run,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return USER_ERROR
    return 0
