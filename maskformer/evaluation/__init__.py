"""Evaluation: metrics, the evaluators that report them, and the loop over a data set."""

from maskformer.evaluation.augmented import AugmentedModel, build_augmented_model, check_augmentation
from maskformer.evaluation.base import DatasetEvaluator
from maskformer.evaluation.instance import InstanceEvaluator
from maskformer.evaluation.loop import build_evaluators, inference_on_dataset
from maskformer.evaluation.panoptic import PanopticEvaluator
from maskformer.evaluation.panoptic_quality import PanopticQuality, semantic_segments
from maskformer.evaluation.pictures import PictureSaver
from maskformer.evaluation.report import flatten_results, format_results, metric_names
from maskformer.evaluation.semantic import SemanticQuality, SemSegEvaluator

__all__ = [
    "AugmentedModel",
    "DatasetEvaluator",
    "InstanceEvaluator",
    "PanopticEvaluator",
    "PanopticQuality",
    "PictureSaver",
    "SemSegEvaluator",
    "SemanticQuality",
    "build_augmented_model",
    "build_evaluators",
    "check_augmentation",
    "flatten_results",
    "format_results",
    "inference_on_dataset",
    "metric_names",
    "semantic_segments",
]
