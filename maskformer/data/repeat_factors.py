"""How often each image comes in an epoch so that rare classes are seen more often (Gupta et al., LVIS, 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from yacs.config import CfgNode

from maskformer import distributed
from maskformer.data.class_presence import build_class_presence
from maskformer.data.dataset import Dataset, Record
from maskformer.errors import UserError


def repeat_factors(pairs: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """The repeat factor of each image, r(I) = max r(c) over its classes c, r(c) = max(1, sqrt(t / f(c))).

    f(c) is the share of images that hold class c; an image without any class has factor 1.

    Args:
        pairs: (M, 2) int, a row (image, class) for each class in each image.
        count: N, number of images.
        threshold: t, in [0, 1]; classes that fewer images hold are repeated.

    Returns:
        (N,) float64, at least 1.
    """
    images, classes = pairs.T
    shares = np.bincount(classes) / count
    of_classes = np.ones(len(shares))
    present = shares > 0
    of_classes[present] = np.maximum(1, np.sqrt(threshold / shares[present]))
    factors = np.ones(count)
    np.maximum.at(factors, images, of_classes[classes])
    return factors


def build_repeat_factors(
    cfg: CfgNode, datasets: Sequence[Dataset], records: Sequence[Sequence[Record]]
) -> np.ndarray | None:
    """The repeat factors of the training images, with class frequencies over all data sets together.

    Only the main process looks at the data; the others are told.

    Args:
        cfg: reads ``DATALOADER.SAMPLER_TRAIN, DATALOADER.REPEAT_THRESHOLD``, and what `build_class_presence` reads.
        datasets: to train on, all with the same classes.
        records: those of each data set that are trained on.

    Returns:
        (N,) float64 for all records, one data set after another; None if the sampler repeats nothing.

    Raises:
        UserError: if a label file cannot be used, or a data set is drawn on the fly.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "RepeatFactorTrainingSampler":
        return None
    for dataset in datasets:
        if dataset.uniform:
            raise UserError(
                f"DATALOADER.SAMPLER_TRAIN is 'RepeatFactorTrainingSampler', but the images of data set "
                f"{dataset.metadata.name!r} are drawn on the fly, so that none need be repeated: set it to "
                "TrainingSampler, and DATALOADER.REPEAT_THRESHOLD to 0"
            )

    def compute() -> np.ndarray:
        presence = build_class_presence(cfg, datasets, records)
        starts = np.cumsum([0, *map(len, records)])
        pairs = np.concatenate([part + np.array([start, 0]) for part, start in zip(presence, starts[:-1], strict=True)])
        return repeat_factors(pairs, int(starts[-1]), float(cfg.DATALOADER.REPEAT_THRESHOLD))

    return distributed.on_main(compute)
