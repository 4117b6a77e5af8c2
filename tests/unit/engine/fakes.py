"""A model, batches and a trainer small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskformer.engine.trainer import Precision, Trainer


class Normalizers(NamedTuple):
    count: float = 0.0

    def plus(self, other: Normalizers) -> Normalizers:
        return Normalizers(self.count + other.count)


class Slope(nn.Module):
    """Loss: mean over the step's samples of (weight - image)²."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def loss_normalizers(self, samples: Sequence[Mapping[str, Any]]) -> Normalizers:
        return Normalizers(float(len(samples)))

    def forward(self, samples: Sequence[Mapping[str, Any]], normalizers: Normalizers) -> dict[str, Tensor]:
        images = torch.stack([sample["image"] for sample in samples])
        loss = ((self.weight - images) ** 2).sum() / normalizers.count
        return {"loss_a": 0.75 * loss, "loss_b": 0.25 * loss}


class Batches:
    """Batches of two images of the same value."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values
        self.position = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        value = self.values[self.position % len(self.values)]
        self.position += 1
        return [{"image": torch.tensor([value]), "file_name": f"{self.position}{letter}.png"} for letter in "ab"]

    def close(self) -> None:
        self.closed = True


def make_trainer(values: Sequence[float] = (1.0,), max_iterations: int = 4, **arguments: Any) -> Trainer:
    model = Slope()
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.25, "group_name": "head"}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 0.5**iteration)
    arguments.setdefault("precision", Precision(torch.device("cpu"), enabled=False))
    return Trainer(model, optimizer, scheduler, Batches(values), max_iterations=max_iterations, **arguments)
