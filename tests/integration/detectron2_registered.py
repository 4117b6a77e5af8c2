"""What a process of its own evaluates on a data set that Detectron2 has registered itself.

Called by `test_detectron2_evaluation`: ``python tests/integration/detectron2_registered.py DATASET OUTPUT_DIR``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from torch import Tensor, nn

from maskformer.integrations.detectron2 import catalog, data, evaluation
from maskformer.integrations.detectron2.command import build_config

ADE20K = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"


class Shifted(nn.Module):
    """Predicts the truth, moved to the right.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        labels = [torch.roll(sample["sem_seg"].long(), 5, dims=1) for sample in samples]
        kept = [torch.where(each < self.classes, each, 0) for each in labels]
        return [{"sem_seg": nn.functional.one_hot(each, self.classes).permute(2, 0, 1).float()} for each in kept]


def main(name: str, output: str) -> None:
    """Asserts that loader, evaluators and training read the same, and that both kinds of evaluators agree."""
    assert not isinstance(DatasetCatalog[name], catalog._Records), "Detectron2 has not registered it"
    files = [record["file_name"] for record in catalog.get_dataset(name).records]
    cfg = build_config(ADE20K, ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", output])
    loader = data.build_test_loader(cfg, name)
    assert [sample["file_name"] for (sample,) in loader] == files
    ours, theirs = evaluation.build_evaluator(cfg, name), evaluation.build_detectron2_evaluator(cfg, name)
    assert ours._file_names == files
    model = Shifted(catalog.get_metadata(name).num_classes)
    found, expected = (inference_on_dataset(model, loader, each)["sem_seg"] for each in (ours, theirs))
    assert 5 < found["mIoU"] < 95, found["mIoU"]
    for metric in ("mIoU", "fwIoU", "mACC", "pACC"):
        assert abs(found[metric] - expected[metric]) < 1e-9, metric


if __name__ == "__main__":
    main(*sys.argv[1:])
