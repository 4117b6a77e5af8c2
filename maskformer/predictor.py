"""Images in, results out: a model with everything that surrounds it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from maskformer.build import build_model_to_fill
from maskformer.checkpoint import checkpoint_metadata, load_weights
from maskformer.config import get_cfg
from maskformer.data.catalog import Metadata, get_metadata
from maskformer.data.dataset import distinct_colors
from maskformer.data.image_io import read_image
from maskformer.data.recipes import TestRecipe, build_recipe, resize_for_test
from maskformer.errors import UserError
from maskformer.visualization import draw_instances, draw_panoptic, draw_semantic

logger = logging.getLogger(__name__)

TASKS = {"panoptic": "panoptic_seg", "instance": "instances", "semantic": "sem_seg_labels"}
"""Task -> the key of its result, the richest task first."""

ImageLike = np.ndarray | str | Path


class Prediction(dict[str, Any]):
    """Results of one image, all at its size: a dict with the keys of a model's results, which can also be drawn.

    Keys, as far as the model gives them: ``sem_seg_labels`` (H, W) int64; ``panoptic_seg`` = (ids (H, W) int32, list of
    ``{id, category_id, isthing, score, area}``); ``instances`` = ``masks`` (N, H, W) bool, ``labels`` (N,) int64,
    ``scores`` (N,) in [0, 1]. Tensors are on the CPU; classes are indices into ``metadata.classes``.

    Args:
        results: the above.
        image: (H, W, 3) uint8 RGB.
        metadata: names, things and colours.
    """

    def __init__(self, results: Mapping[str, Any], image: np.ndarray, metadata: Metadata) -> None:
        super().__init__(results)
        self.image = image
        self.metadata = metadata

    @property
    def sem_seg_labels(self) -> Tensor | None:
        """(H, W) int64 class of each pixel, None if the model gives none."""
        return self.get("sem_seg_labels")

    @property
    def panoptic_seg(self) -> tuple[Tensor, list[dict[str, Any]]] | None:
        """Ids (H, W) int32 and segments, None if the model gives none."""
        return self.get("panoptic_seg")

    @property
    def instances(self) -> dict[str, Tensor] | None:
        """Masks, labels and scores, None if the model gives none."""
        return self.get("instances")

    @property
    def tasks(self) -> list[str]:
        """Which of ``panoptic``, ``instance``, ``semantic`` there are, the richest first."""
        return [task for task, key in TASKS.items() if key in self]

    def overlay(self, task: str = "auto") -> np.ndarray:
        """The results drawn over the image, with names and a legend.

        Args:
            task: ``panoptic``, ``semantic``, ``instance``, or ``auto`` for the richest there is.

        Returns:
            (H', W', 3) uint8 RGB, larger than the image if that is small.

        Raises:
            UserError: if the model does not give this.
        """
        chosen = next(iter(self.tasks), "") if task == "auto" else task
        if chosen not in self.tasks:
            raise UserError(f"there is no {task} result to draw, only {', '.join(self.tasks) or 'none at all'}")
        if chosen == "panoptic":
            ids, segments = self["panoptic_seg"]
            return draw_panoptic(self.image, ids, segments, self.metadata)
        if chosen == "instance":
            return draw_instances(self.image, self["instances"], self.metadata)
        return draw_semantic(self.image, self["sem_seg_labels"], self.metadata)


class Predictor:
    """A trained model that takes images and gives results at their sizes.

    Images are prepared as in testing (``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``, ``FORMAT``). The meaning of classes
    comes from the checkpoint, which knows its data set's names; for other weight files from the data set of the config.

    Args:
        config: a config file, or a config.
        weights: of any family that `maskformer.checkpoint.load_weights` reads; None takes ``MODEL.WEIGHTS``.
        device: ``cpu``, ``cuda``, …; ``auto`` leaves it to ``MODEL.DEVICE``.
        overrides: ``KEY, VALUE, …`` as on the command line.

    Raises:
        UserError: if config or weights cannot be used, or the weights do not fill the whole model.
    """

    def __init__(
        self,
        config: str | Path | CfgNode,
        weights: str | Path | None = None,
        device: str = "auto",
        overrides: Sequence[str] = (),
    ) -> None:
        if isinstance(config, CfgNode):
            cfg: Any = config.clone()
            cfg.defrost()
            if overrides:
                cfg.merge_from_list(list(overrides))
        else:
            cfg = get_cfg(str(config), list(overrides))
        if device != "auto":
            cfg.MODEL.DEVICE = device
        weights = weights or cfg.MODEL.WEIGHTS
        if not weights:
            raise UserError("a prediction needs weights but MODEL.WEIGHTS is empty; name a weight file")
        self.cfg = cfg
        self.metadata = class_names(cfg, weights)
        self.model = build_model_to_fill(cfg, self.metadata)
        self.report = load_weights(self.model, weights, strict=True)
        self.model.eval()
        recipe = build_recipe(cfg, self.metadata, training=False)
        assert isinstance(recipe, TestRecipe)
        self.recipe = recipe

    @overload
    def __call__(self, image: ImageLike) -> Prediction: ...
    @overload
    def __call__(self, image: list[ImageLike]) -> list[Prediction]: ...
    def __call__(self, image: ImageLike | list[ImageLike]) -> Prediction | list[Prediction]:
        """Predict one image or several.

        Args:
            image: (H, W, 3) uint8 RGB, or the path of a file, or a list of them.

        Returns:
            A `Prediction`, or for a list as many.

        Raises:
            UserError: if a file cannot be read, or an array is no RGB image.
        """
        if isinstance(image, list):
            return [self.predict(one) for one in image]
        return self.predict(image)

    def predict(self, image: ImageLike) -> Prediction:
        """One image: (H, W, 3) uint8 RGB, or a path."""
        picture = read_image(image) if isinstance(image, str | Path) else _checked(image)
        sample = {"image": self._prepared(picture), "height": picture.shape[0], "width": picture.shape[1]}
        with torch.inference_mode():
            results = self.model.infer([sample], semantic="labels")[0]
        return Prediction(_to_cpu(results), picture, self.metadata)

    def _prepared(self, picture: np.ndarray) -> Tensor:
        """(3, h, w) uint8 in the order of the config, resized as in testing."""
        resized = resize_for_test(picture, self.recipe.shorter, self.recipe.longest)
        if self.recipe.image_format == "BGR":
            resized = resized[..., ::-1]
        return torch.from_numpy(np.array(resized.transpose(2, 0, 1), order="C"))


def _checked(image: Any) -> np.ndarray:
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise UserError(f"an image must be a path or an (H, W, 3) uint8 RGB array, not {array.dtype} of {array.shape}")
    return array


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_cpu(item) for item in value)
    return value


# ------------------------------------------------------------------ weights
def class_names(cfg: Any, weights: str | Path) -> Metadata:
    """What the classes mean: from the checkpoint itself, else from the data set, else numbered.

    Raises:
        UserError: if the weights cannot be read, or nothing says which classes are things and the config needs it.
    """
    metadata = checkpoint_metadata(weights)
    if metadata is not None:
        return metadata
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    reason = "the config names no data set"
    if names:
        try:
            return get_metadata(names[0])
        except UserError as error:
            reason = str(error)
    test = cfg.MODEL.MASK_FORMER.TEST
    if test.PANOPTIC_ON or test.INSTANCE_ON:
        raise UserError(
            f"{weights} does not say which classes are things, and neither does a data set: {reason}; name one in "
            "DATASETS.TRAIN"
        )
    logger.warning("classes are only numbered, because %s does not name them and %s", weights, reason)
    return numbered_classes(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


def numbered_classes(count: int, ignore_label: int) -> Metadata:
    """Metadata for classes of which nothing is known; an ignore label that is a class gives way to one that is none."""
    return Metadata(
        name="unknown",
        classes=[f"class {i}" for i in range(count)],
        things=[False] * count,
        colors=distinct_colors(count),
        ignore_label=max(ignore_label, count),
        evaluators=(),
        dataset_ids=list(range(count)),
        truth=(),
    )
