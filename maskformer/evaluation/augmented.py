"""Test-time augmentation: semantic scores averaged over sizes of the image and its mirror image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskformer.data.recipes import resize_for_test
from maskformer.errors import UserError
from maskformer.modeling.meta_arch import MaskFormer, SemanticSegmentor


class AugmentedModel(nn.Module):
    """A model that looks at each image several times; gives semantic results only, as it does.

    The image as it was resized for testing is resized again to each size, and mirrored; the scores at the output size
    (of a per-pixel model its logits) are averaged. They are added up as they come, so that memory does not grow with
    their number. What panoptic segments or instances would mean here is not defined.

    Args:
        model: looks at all images of a call at once, in each of their forms.
        sizes: shorter sides in pixels, in this order.
        longest: limit of the longer side in pixels.
        mirror: also look at each size mirrored.
    """

    def __init__(
        self, model: MaskFormer | SemanticSegmentor, *, sizes: Sequence[int], longest: int, mirror: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.sizes = tuple(sizes)
        self.longest = longest
        self.mirror = mirror

    @torch.no_grad()
    def infer(self, samples: Sequence[Mapping[str, Any]], semantic: str = "scores") -> list[dict[str, Any]]:
        """Results of each image at its output size (``height``, ``width`` of the sample, else of the image).

        Args:
            samples: with ``image`` (3, H, W) uint8.
            semantic: "scores" returns ``sem_seg`` (K, H, W), "labels" ``sem_seg_labels`` (H, W) int64 instead.
        """
        if semantic not in ("scores", "labels"):
            raise ValueError(f"semantic must be 'scores' or 'labels', not {semantic!r}")
        totals: list[Tensor] = []
        with _semantic_only(self.model):
            for views, mirrored in self._views(samples):
                for index, result in enumerate(self.model.infer_each(views)):
                    _add(totals, index, result.pop("sem_seg"), mirrored)
        if semantic == "labels":  # a sum is largest where its mean is
            return [{"sem_seg_labels": total.argmax(0)} for total in totals]
        count = len(self.sizes) * (2 if self.mirror else 1)
        return [{"sem_seg": total.div_(count)} for total in totals]

    def _views(self, samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """All samples in one form after the other, and whether that is mirrored."""
        images = [sample["image"].permute(1, 2, 0).cpu().numpy() for sample in samples]
        outputs = [
            {side: int(sample.get(side, size)) for side, size in zip(("height", "width"), image.shape, strict=False)}
            for sample, image in zip(samples, images, strict=True)
        ]
        for size in self.sizes:
            resized = [resize_for_test(np.ascontiguousarray(image), size, self.longest) for image in images]
            tensors = [torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")) for image in resized]
            yield [{"image": tensor, **output} for tensor, output in zip(tensors, outputs, strict=True)], False
            if self.mirror:
                yield [{"image": t.flip(-1), **output} for t, output in zip(tensors, outputs, strict=True)], True


def _add(totals: list[Tensor], index: int, scores: Tensor, mirrored: bool) -> None:
    """Add the scores of one form of an image to its sum; they are let go of at once, which matters if K is large."""
    if mirrored:
        scores = scores.flip(-1)
    if index < len(totals):
        totals[index] += scores
    else:
        totals.append(scores.clone())


@contextmanager
def _semantic_only(model: Any) -> Iterator[None]:
    """Nothing but semantic scores is computed inside."""
    before = model.panoptic_on, model.instance_on
    model.panoptic_on = model.instance_on = False
    try:
        yield
    finally:
        model.panoptic_on, model.instance_on = before


def build_augmented_model(cfg: Any, model: Any) -> AugmentedModel:
    """The model as ``TEST.AUG`` wants it evaluated; shares its weights."""
    settings = cfg.TEST.AUG
    return AugmentedModel(model, sizes=settings.MIN_SIZES, longest=settings.MAX_SIZE, mirror=settings.FLIP)


def check_augmentation(cfg: Any, metadata: Any) -> None:
    """Refuse ``TEST.AUG.ENABLED`` where it would measure nothing.

    Args:
        cfg: of the run.
        metadata: of a test set.

    Raises:
        UserError: if the data set does not measure semantic segmentation.
    """
    if cfg.TEST.AUG.ENABLED and "sem_seg" not in metadata.evaluators:
        raise UserError(
            f"TEST.AUG.ENABLED is True, but test-time augmentation averages semantic scores and {metadata.name} "
            f"measures only {' and '.join(metadata.evaluators) or 'nothing'}; set it to False"
        )
