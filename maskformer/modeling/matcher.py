"""Which query explains which ground-truth segment: bipartite (Hungarian) and fixed matching.

Both are called as ``matcher(predictions, segments)`` and return ``matches[layer][image]`` = (queries, segments), two
int64 CPU tensors of equal length, queries ascending.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskformer.errors import UserError
from maskformer.modeling.losses import pairwise_dice_cost, pairwise_focal_cost
from maskformer.structures import MaskPredictions, SegmentMap

Match = tuple[Tensor, Tensor]
# Stands in for costs that are not finite, so that one bad query does not stop the assignment of the others; the loss
# itself stays non-finite and is reported by the training loop.
HUGE_COST = 1e6


class HungarianMatcher:
    """Optimal one-to-one assignment per image and layer (paper, section 3.2).

    The cost of query q for segment s is ``class_weight · (-softmax(class)[label_s]) + mask_weight · focal +
    dice_weight · dice``, at the size of the predicted masks with the ground truth resampled to it by nearest. With
    more segments than queries, as many segments as there are queries are matched.

    Args:
        class_weight: weight of the class probability.
        mask_weight: weight of the focal cost.
        dice_weight: weight of the dice cost.
    """

    def __init__(self, *, class_weight: float = 1.0, mask_weight: float = 20.0, dice_weight: float = 1.0) -> None:
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight

    @torch.no_grad()
    def costs(self, class_logits: Tensor, mask_logits: Tensor, segments: SegmentMap) -> Tensor:
        """Costs of one image, all layers at once.

        Args:
            class_logits: (L, Q, K+1).
            mask_logits: (L, Q, h, w).
            segments: M segments at H×W.

        Returns:
            (L, Q, M) costs in float32.
        """
        probability = class_logits.float().softmax(-1)
        # A float copy of the masks at h×w only; the full-size masks are never made for matching.
        targets = segments.resize_nearest(*mask_logits.shape[-2:]).masks().flatten(1).float()
        flat = mask_logits.float().flatten(2)
        cost = -self.class_weight * probability[..., segments.labels]
        cost = cost + self.mask_weight * pairwise_focal_cost(flat, targets)
        return cost + self.dice_weight * pairwise_dice_cost(flat, targets)

    @torch.no_grad()
    def __call__(self, predictions: MaskPredictions, segments: Sequence[SegmentMap]) -> list[list[Match]]:
        """Match all layers and images.

        Args:
            predictions: class logits (L, B, Q, K+1) and mask logits (L, B, Q, h, w).
            segments: the segments of each of the B images.
        """
        layers, _, queries = predictions.class_logits.shape[:3]
        with torch.autocast(predictions.class_logits.device.type, enabled=False):
            costs = [
                self.costs(predictions.class_logits[:, b], predictions.mask_logits[:, b], image)
                for b, image in enumerate(segments)
            ]
        # One copy to the host for the whole batch.
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        flat = np.nan_to_num(flat, nan=HUGE_COST, posinf=HUGE_COST, neginf=-HUGE_COST)
        sizes = [layers * queries * len(image) for image in segments]
        per_image = [
            part.reshape(layers, queries, len(image))
            for part, image in zip(np.split(flat, np.cumsum(sizes)[:-1]), segments, strict=True)
        ]
        return [[_assign(image[layer]) for image in per_image] for layer in range(layers)]


def _assign(cost: np.ndarray) -> Match:
    rows, columns = linear_sum_assignment(cost)
    return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(columns.astype(np.int64))


class FixedMatcher:
    """Query i always explains class i: the paper's MaskFormer-fixed (section 4.3), for semantic segments and Q = K."""

    def __call__(self, predictions: MaskPredictions, segments: Sequence[SegmentMap]) -> list[list[Match]]:
        """Match all layers and images, as `HungarianMatcher` does.

        Raises:
            UserError: if an image has two segments of one class.
        """
        matches = []
        for image in segments:
            queries, order = torch.sort(image.labels.cpu())
            if (queries[1:] == queries[:-1]).any():
                raise UserError(
                    "MODEL.MASK_FORMER.MATCHER is 'fixed' but an image has several segments of one class; "
                    "use semantic labels or set it to 'hungarian'"
                )
            matches.append((queries, order))
        return [matches] * predictions.class_logits.shape[0]
