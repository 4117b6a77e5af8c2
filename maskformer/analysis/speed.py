"""How fast a model predicts, on noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from maskformer.analysis.inputs import random_samples
from maskformer.data.transforms import Size
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor

WARM_UP = 3


class Speed(NamedTuple):
    """Seconds of one batch, median over the iterations.

    Attributes:
        network: of the network alone, normalised images in, predictions out.
        end_to_end: of `infer`: images of 8 bits in, results at their output size out.
        batch: images in a batch.
    """

    network: float
    end_to_end: float
    batch: int

    @property
    def network_images_per_second(self) -> float:
        """Images a second through the network."""
        return self.batch / self.network

    @property
    def images_per_second(self) -> float:
        """Images a second from end to end."""
        return self.batch / self.end_to_end


def measure_speed(
    model: MaskFormer | SemanticSegmentor, size: Size, *, batch: int, iterations: int, warm_up: int = WARM_UP
) -> Speed:
    """Seconds of a batch of random images in evaluation mode; random weights and noise find few segments to merge.

    Args:
        model: on the device that is measured; left in evaluation mode.
        size: (H, W) of the images.
        batch: images in a batch.
        iterations: batches that are timed, one by one.
        warm_up: batches before, which are not.
    """
    model.eval()
    samples = random_samples(size, batch, classes=1)
    with torch.inference_mode():
        images = model.image_batch(samples)
        network = median_seconds(lambda: model.network(images), model.device, iterations, warm_up)
        end_to_end = median_seconds(lambda: model.infer(samples, "labels"), model.device, iterations, warm_up)
    return Speed(network, end_to_end, batch)


def median_seconds(work: Callable[[], object], device: torch.device, iterations: int, warm_up: int) -> float:
    """Median of the seconds that `work` takes; on CUDA until the device has done it, not only accepted it."""
    seconds = []
    for iteration in range(warm_up + iterations):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        if iteration >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
