"""Evaluators in Detectron2: our own behind its interface, and its own with the arguments that our data sets need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from detectron2.structures import Instances
from torch import Tensor, nn

from maskformer.data import labels
from maskformer.data.dataset import Metadata
from maskformer.errors import UserError
from maskformer.evaluation import build_evaluators
from maskformer.evaluation.augmented import AugmentedModel, build_augmented_model
from maskformer.evaluation.base import DatasetEvaluator as OwnEvaluator
from maskformer.evaluation.loop import SWITCHES
from maskformer.integrations.detectron2 import catalog


class MaskFormerEvaluator(DatasetEvaluator):
    """Our evaluators behind Detectron2's interface; before Detectron2's own in a list of evaluators.

    Args:
        evaluators: of one data set.
        records: of that data set, whose images all have to come.
    """

    def __init__(self, evaluators: Sequence[OwnEvaluator], records: Sequence[Mapping[str, Any]]) -> None:
        self.evaluators = list(evaluators)
        self._ids = [catalog.with_image_id(record)["image_id"] for record in records]
        self._file_names = [str(record["file_name"]) for record in records]

    def reset(self) -> None:
        """Forget everything counted so far."""
        for evaluator in self.evaluators:
            evaluator.reset(self._ids, self._file_names)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Count a batch.

        Args:
            inputs: samples of `MaskFormerMapper`, which hold the truth.
            outputs: results of Detectron2's types.

        Raises:
            UserError: naming the image whose truth or result cannot be used.
        """
        results = [own_result(output) for output in outputs]
        for evaluator in self.evaluators:
            evaluator.process(inputs, results)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Metrics by task, such as ``{"sem_seg": {"mIoU": ...}}``; on every process those of the whole data set.

        Raises:
            UserError: if images came twice or not at all.
        """
        found = {evaluator.name: evaluator.evaluate() for evaluator in self.evaluators}
        return {task: metrics for task, metrics in found.items() if metrics}


def own_result(output: Mapping[str, Any]) -> dict[str, Any]:
    """A result of Detectron2's types in ours, as our evaluators take it; shares memory, segments' dicts are copied."""
    result = dict(output)
    instances = result.get("instances")
    if isinstance(instances, Instances):
        result["instances"] = {
            "masks": instances.pred_masks,
            "labels": instances.pred_classes,
            "scores": instances.scores,
        }
    if "sem_seg" in result:  # pictures want labels too, and the scores of an image are large
        result["sem_seg_labels"] = result.pop("sem_seg").argmax(0)
    if "panoptic_seg" in result:
        ids, segments = result["panoptic_seg"]
        # Detectron2's evaluator of it writes into these dicts; in a list of evaluators it has to come after ours.
        result["panoptic_seg"] = (ids, [dict(segment) for segment in segments])
    return result


# ------------------------------------------------------------------ from the config
def build_evaluator(
    cfg: Any, dataset_name: str, *, folder_name: str = "inference", tasks: Sequence[str] | None = None
) -> MaskFormerEvaluator:
    """Our evaluators of a data set: what its protocol names, as far as the model gives it.

    Args:
        cfg: see `maskformer.evaluation.build_evaluators`.
        dataset_name: in Detectron2's catalogs or ours.
        folder_name: of the folder in ``OUTPUT_DIR`` that files go to.
        tasks: only these, of ``sem_seg``, ``panoptic_seg``, ``instances``; None for all.

    Raises:
        UserError: if there is nothing to measure.
    """
    dataset = catalog.get_dataset(dataset_name)
    evaluators = build_evaluators(cfg, dataset.metadata, cfg.OUTPUT_DIR, folder_name=folder_name, tasks=tasks)
    return MaskFormerEvaluator(evaluators, dataset.records)


def build_detectron2_evaluator(cfg: Any, dataset_name: str, output_dir: str | Path | None = None) -> DatasetEvaluators:
    """Detectron2's own evaluators of a data set, for numbers to be compared with those of other projects there.

    Args:
        cfg: reads ``MODEL.MASK_FORMER.TEST``.
        dataset_name: in Detectron2's catalogs or ours.
        output_dir: where predictions go; None writes none.

    Raises:
        UserError: if Detectron2 has no evaluator that could read the truth.
    """
    metadata = catalog.get_metadata(dataset_name)
    tasks = [task for task in metadata.evaluators if cfg.MODEL.MASK_FORMER.TEST[SWITCHES[task]]]
    if not tasks:
        needed = " or ".join(f"MODEL.MASK_FORMER.TEST.{SWITCHES[task]}" for task in metadata.evaluators)
        raise UserError(f"nothing can be measured on {dataset_name} with this config; switch on {needed}")
    folder = None if output_dir is None else str(output_dir)
    return DatasetEvaluators([_build_detectron2_evaluator(task, metadata, folder) for task in tasks])


def _build_detectron2_evaluator(task: str, metadata: Metadata, folder: str | None) -> DatasetEvaluator:
    if task == "sem_seg":
        records = catalog.get_dataset(metadata.name).records
        _check_files(metadata, "sem_seg_file_name", records[0].get("sem_seg_file_name"))
        name = catalog.name_of_records(metadata.name)
        return Detectron2SemSegEvaluator(
            name, output_dir=folder, sem_seg_loading_fn=partial(read_label_map, metadata=metadata)
        )
    found = MetadataCatalog.get(metadata.name)
    if task == "panoptic_seg":
        _check_files(metadata, "panoptic_json", found.get("panoptic_json"))
        return COCOPanopticEvaluator(metadata.name, folder)
    _check_files(metadata, "json_file", found.get("json_file"))
    return COCOEvaluator(metadata.name, tasks=("segm",), output_dir=folder)


def _check_files(metadata: Metadata, field: str, value: str | None) -> None:
    if value is None or "://" in str(value):
        raise UserError(
            f"data set {metadata.name!r} has no {field} on disk, which Detectron2's own evaluators read the truth "
            "from; use those of build_evaluator"
        )


def read_label_map(file_name: str, dtype: Any = int, *, metadata: Metadata) -> np.ndarray:
    """(H, W) contiguous labels of a label file, with the ignore label, whatever values the file holds.

    For Detectron2's evaluator, which by itself takes the values of the file for labels.

    Raises:
        UserError: if the file cannot be read or holds an unknown value.
    """
    return labels.read_semantic({"sem_seg_file_name": file_name}, metadata).astype(dtype)


# ------------------------------------------------------------------ test-time augmentation
class AugmentedEvaluation(nn.Module):
    """A model of ours that looks at each image several times, called as Detectron2 calls models.

    Args:
        augmented: of a model that Detectron2 has built.
    """

    def __init__(self, augmented: AugmentedModel) -> None:
        super().__init__()
        self.augmented = augmented

    def forward(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """``sem_seg`` (K, H, W) of each sample, averaged over sizes and mirror images."""
        return self.augmented.infer(samples)


class _AsOurs(nn.Module):
    """A model of Detectron2's own with what `AugmentedModel` asks of one.

    Args:
        model: gives ``sem_seg``.
    """

    panoptic_on = False
    instance_on = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def infer_each(self, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The result of one image after the other."""
        yield from self.model(samples)


def build_augmented_evaluation(cfg: Any, model: nn.Module) -> AugmentedEvaluation:
    """The model as ``TEST.AUG`` wants it evaluated; shares its weights."""
    ours = model if hasattr(model, "infer_each") else _AsOurs(model)
    return AugmentedEvaluation(build_augmented_model(cfg, ours))
