"""Detectron2's launcher with several processes on the CPU, where its data parallelism expects GPUs.

Called by `test_detectron2_command`: ``python tests/integration/detectron2_processes.py PROCESSES WORD ...``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from detectron2.engine import default_argument_parser, defaults, launch

from maskformer.data.datasets import shapes
from maskformer.integrations.detectron2 import command


def work(arguments: argparse.Namespace) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    shapes.COUNTS.update(train=1000, val=5)
    defaults.create_ddp_model = partial(defaults.create_ddp_model, device_ids=None)
    command.run(arguments)


if __name__ == "__main__":
    processes, *words = sys.argv[1:]
    given = default_argument_parser().parse_args(words)
    launch(work, int(processes), dist_url="auto", args=(given,))
