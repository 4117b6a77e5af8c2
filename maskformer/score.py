"""The command that scores prediction files without a model: ``maskformer score``, ``tools/evaluate_predictions.py``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from maskformer.errors import UserError
from maskformer.writing import check_writable

INTERRUPTED = 130  # what shells report for Ctrl-C
TASKS = ("sem_seg", "panoptic_seg", "instances")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Score prediction files as evaluation does, without a model.",
        epilog="example: %(prog)s --task panoptic_seg --predictions output/inference/predictions.json "
        "--dataset coco_2017_val_panoptic",
    )
    parser.add_argument("--task", required=True, choices=TASKS, help="what the file predicts")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="JSON of predictions")
    parser.add_argument(
        "--pred-folder", type=Path, metavar="DIR", help="PNGs of panoptic predictions; default: FILE without .json"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="data set to compare with, such as ade20k_sem_seg_val or folder:data:val"
    )
    parser.add_argument(
        "--truth", type=Path, metavar="FILE", help="instead of --dataset: COCO panoptic or instances JSON"
    )
    parser.add_argument(
        "--truth-folder", type=Path, metavar="DIR", help="PNGs of panoptic truth; default: FILE without .json"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one for each core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was found")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, or 2 after a mistake of the user's, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
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


def run(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Score, print tables, and write the JSON that was asked for.

    Raises:
        UserError: for every mistake in arguments, predictions or truth.
    """
    check_arguments(arguments)
    # Here, so that --help and a mistake in the arguments need not wait for PyTorch.
    from maskformer.evaluation.report import flatten_results, format_results

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    results = score(arguments)
    name = arguments.dataset or str(arguments.truth)
    print(format_results(results, SimpleNamespace(name=name)))  # noqa: T201
    if arguments.json is not None:
        write_scores(arguments, flatten_results(results))
    return results


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, and a file that cannot be written.

    Raises:
        UserError: naming the argument and the remedy.
    """
    if (arguments.dataset is None) == (arguments.truth is None):
        given = "both" if arguments.dataset else "neither"
        raise UserError(f"give --dataset NAME or --truth FILE to compare with, not {given}")
    if arguments.task == "sem_seg" and arguments.truth is not None:
        raise UserError("--truth is a COCO JSON, which has no semantic truth; give --dataset NAME with --task sem_seg")
    if arguments.task != "panoptic_seg":
        for option in ("pred_folder", "truth_folder"):
            if getattr(arguments, option) is not None:
                flag = option.replace("_", "-")
                raise UserError(f"--{flag} is for --task panoptic_seg; leave it out with --task {arguments.task}")
    if arguments.truth_folder is not None and arguments.truth is None:
        raise UserError("--truth-folder goes with --truth; leave it out with --dataset, which knows its folder")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}, but must be 1 or more")
    if arguments.json is not None:
        check_writable(arguments.json)  # now, not after all the work


def score(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Metrics by task, as evaluation gives them.

    Raises:
        UserError: if predictions or truth cannot be used.
    """
    from maskformer.data.catalog import get_dataset
    from maskformer.evaluation import scoring, truth

    workers = arguments.workers or cores()
    dataset = None if arguments.dataset is None else get_dataset(arguments.dataset)
    if arguments.task == "sem_seg":
        assert dataset is not None  # see `check_arguments`
        return scoring.score_semantic(arguments.predictions, dataset, workers)
    if arguments.task == "panoptic_seg":
        folder = arguments.pred_folder or arguments.predictions.with_suffix("")
        if dataset is not None:
            expected = truth.panoptic_truth_of(dataset)
        else:
            true_folder = arguments.truth_folder or arguments.truth.with_suffix("")
            expected = truth.read_panoptic_truth(arguments.truth, true_folder)
        return scoring.score_panoptic(arguments.predictions, folder, expected, workers)
    objects = truth.read_instance_truth(arguments.truth) if dataset is None else truth.instance_truth_of(dataset)
    return scoring.score_instances(arguments.predictions, objects, workers)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_scores(arguments: argparse.Namespace, scores: Mapping[str, float]) -> None:
    """The scores as JSON, null where a class has none."""
    from maskformer.checkpoint.files import write_text

    content = {
        "task": arguments.task,
        "predictions": str(arguments.predictions),
        "truth": arguments.dataset or str(arguments.truth),
        "scores": {name: value if math.isfinite(value) else None for name, value in scores.items()},
    }
    write_text(arguments.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
