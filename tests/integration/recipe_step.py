"""One training iteration and one evaluation step of a recipe, as a program of its own whose memory is limited.

Called by `test_every_recipe`: ``python -m tests.integration.recipe_step CONFIG OUTPUT LIMIT_IN_GIB``; prints JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch

from maskformer.config import get_cfg
from maskformer.data.catalog import get_dataset
from maskformer.engine.batching import build_batch_split
from maskformer.engine.evaluating import evaluate_dataset
from maskformer.engine.training import build_trainer

# Everything else is as published.
OVERRIDES = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "1"),
    *("DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
]


def peak_gib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(config: str, output: str, limit: str) -> None:
    size = int(float(limit) * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    torch.manual_seed(1)
    cfg = get_cfg(config, [*OVERRIDES, "OUTPUT_DIR", output])
    trainer, _, _ = build_trainer(cfg, [get_dataset(cfg.DATASETS.TRAIN[0])], None, build_batch_split(cfg, 1))
    start = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    numbers = {
        "training seconds": round(trained - start, 1),
        "training peak GiB": round(peak_gib(), 2),
        "finite": all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters()),
    }
    trainer.optimizer.state.clear()
    results, _ = evaluate_dataset(cfg, trainer.model, get_dataset(cfg.DATASETS.TEST[0]))
    numbers["evaluation seconds"] = round(time.perf_counter() - trained, 1)
    numbers["peak GiB"] = round(peak_gib(), 2)
    files = sorted(path.name for path in (Path(output) / "inference").iterdir())
    print(json.dumps(numbers | {"metrics": sorted(f"{k}/{m}" for k, v in results.items() for m in v), "files": files}))


if __name__ == "__main__":
    main(*sys.argv[1:])
