"""Focal and dice loss of matched masks, transcribed straightforwardly from the formulas: the oracle of `losses`.

Focal loss: Lin et al. 2017; dice: Milletari et al. 2016; their use: paper, section 3.3. Every faster version has to
equal these, in value and gradient; training does not use them, since they keep several full-size copies of every mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer.modeling.losses import FOCAL_ALPHA, FOCAL_GAMMA


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary focal loss of each mask, α = 0.25 on the foreground, γ = 2.

    Args:
        logits: (N, H·W) mask logits.
        targets: (N, H·W) 0 or 1, floating point.

    Returns:
        (N,) losses ≥ 0.
    """
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability_of_truth = probability * targets + (1 - probability) * (1 - targets)
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return (alpha * (1 - probability_of_truth) ** FOCAL_GAMMA * cross_entropy).mean(1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft dice loss of each mask, 1 - (2Σpt + 1) / (Σp + Σt + 1).

    Args:
        logits: (N, H·W) mask logits.
        targets: (N, H·W) 0 or 1, floating point.

    Returns:
        (N,) losses in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = 2 * (probability * targets).sum(1)
    return 1 - (overlap + 1) / (probability.sum(1) + targets.sum(1) + 1)


def upsampled_mask_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice losses of N masks, predictions upsampled bilinearly to the size of the targets.

    Args:
        logits: (N, h, w) matched mask logits.
        targets: (N, H, W) bool masks of their segments.

    Returns:
        Focal and dice loss, (N,) each, in float32.
    """
    if len(logits) == 0:  # still depends on the logits, so that every parameter takes part in every loss
        empty = logits.float().flatten(1).sum(1)
        return empty, empty
    full = F.interpolate(logits.float()[:, None], size=targets.shape[-2:], mode="bilinear", align_corners=False)
    flat, truth = full.flatten(1), targets.flatten(1).to(torch.float32)
    return sigmoid_focal_loss(flat, truth), dice_loss(flat, truth)
