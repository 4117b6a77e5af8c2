"""Binary focal and soft dice loss, exact and memory-lean: of matched pairs, and as costs of all pairs.

`matched_mask_losses` equals `reference_losses.upsampled_mask_losses` in value and gradient. It walks over the masks
in chunks that fit the processor's cache: a chunk is upsampled, compared with the id map, summed, differentiated in
closed form and reduced to a gradient at the resolution of the prediction, before the next one begins. No full-size
mask survives its chunk.

With z = (1 - 2t)·x, q = sigmoid(z) is the probability of the wrong answer, and
focal = α_t·q²·softplus(z), d focal/dx = (1 - 2t)·α_t·q²·(2(1 - q)·softplus(z) + q);
dice = 1 - n/d with n = 2Σpt + 1 and d = Σp + Σt + 1, d dice/dx = q(1 - q)·(n/d² - 2t/d).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
# Full-size pixels handled at once; about ten float32 arrays of this length are alive.
CHUNK_PIXELS = 1 << 19


def pairwise_focal_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """`sigmoid_focal_loss` of every prediction against every target, as two matrix products.

    Args:
        logits: (..., Q, H·W) mask logits.
        targets: (M, H·W) 0 or 1, floating point.

    Returns:
        (..., Q, M) mean focal losses.
    """
    probability = logits.sigmoid()
    foreground = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * F.softplus(-logits)
    background = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * F.softplus(logits)
    cost = (foreground - background) @ targets.T + background.sum(-1, keepdim=True)
    return cost / logits.shape[-1]


def pairwise_dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """`dice_loss` of every prediction against every target.

    Args:
        logits: (..., Q, H·W) mask logits.
        targets: (M, H·W) 0 or 1, floating point.

    Returns:
        (..., Q, M) dice losses in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = 2 * probability @ targets.T
    return 1 - (overlap + 1) / (probability.sum(-1, keepdim=True) + targets.sum(-1) + 1)


class _MatchedMaskLosses(torch.autograd.Function):
    """Focal and dice loss of (N, h, w) logits against N segments of id maps; see `matched_mask_losses`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, maps: Tensor, segments: Tensor, need_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """(N, h, w) logits, (R, H, W) id maps, (N,) map of each mask, (N,) id of each mask -> (N,) focal, (N,) dice."""
        count, pixels = len(logits), ids.shape[-2] * ids.shape[-1]
        focal, dice = logits.new_empty(count), logits.new_empty(count)
        gradients = logits.new_empty((2, *logits.shape)) if need_gradient else None
        step = max(1, CHUNK_PIXELS // pixels)
        for start in range(0, count, step):
            part = slice(start, start + step)
            truth = ids[maps[part]] == segments[part, None, None]
            focal[part], dice[part], both = _chunk_losses(logits[part], truth, need_gradient)
            if gradients is not None and both is not None:
                gradients[:, part] = both
        ctx.save_for_backward(*([] if gradients is None else [gradients]))
        return focal, dice

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(N,) gradients of focal and dice -> (N, h, w) gradient of the logits."""
        (gradients,) = ctx.saved_tensors
        focal, dice = upstream
        return gradients[0] * focal[:, None, None] + gradients[1] * dice[:, None, None], None, None, None, None


def _chunk_losses(logits: Tensor, truth: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal (n,), dice (n,) and their (2, n, h, w) gradients, for (n, h, w) logits and (n, H, W) bool truth."""
    size, pixels = truth.shape[-2:], truth[0].numel()
    x = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    t = truth.to(x.dtype)
    sign = 1 - 2 * t
    z = x.mul_(sign)
    softplus = F.softplus(z)
    q = z.sigmoid_()
    weighted = q.square().mul_(t.mul(2 * FOCAL_ALPHA - 1).add_(1 - FOCAL_ALPHA))  # α_t·q²
    focal = torch.linalg.vecdot(weighted.flatten(1), softplus.flatten(1)) / pixels
    area = t.flatten(1).sum(1)
    wrong_inside = torch.linalg.vecdot(q.flatten(1), t.flatten(1))
    overlap = area - wrong_inside  # Σpt, since p = 1 - q inside the segment
    numerator = 2 * overlap + 1
    denominator = overlap + (q.flatten(1).sum(1) - wrong_inside) + area + 1
    dice = 1 - numerator / denominator
    if not need_gradient:
        return focal, dice, None
    right = 1 - q
    focal_gradient = softplus.mul_(right).mul_(2).add_(q).mul_(weighted).mul_(sign).div_(pixels)
    inside, outside = -2 / denominator, numerator / denominator.square()
    dice_gradient = t.mul_(inside[:, None, None]).add_(outside[:, None, None]).mul_(q).mul_(right)
    full = torch.stack((focal_gradient, dice_gradient))
    return focal, dice, _downsample_adjoint(full, logits.shape[1], logits.shape[2])


def _downsample_adjoint(full: Tensor, height: int, width: int) -> Tensor:
    """The adjoint of bilinear upsampling: (..., n, H, W) gradients of the upsampled maps -> (..., n, h, w)."""
    if full.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _adjoint_by_products(full, height, width)
    shape = [full.shape[0], full.shape[1], height, width]
    return torch.ops.aten.upsample_bilinear2d_backward(full, list(full.shape[-2:]), shape, False)


def _adjoint_by_products(full: Tensor, height: int, width: int) -> Tensor:
    """The same with one matrix product for the rows and one for the columns: CUDA's own kernel is not deterministic."""
    rows, columns = (
        F.interpolate(
            torch.eye(low, dtype=full.dtype, device=full.device)[None, None], size=(high, low), mode="bilinear"
        )[0, 0]
        for low, high in ((height, full.shape[-2]), (width, full.shape[-1]))
    )
    return rows.T @ full @ columns


def matched_mask_losses(logits: Tensor, ids: Tensor, maps: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice losses of N matched masks, predictions upsampled bilinearly to the size of the id maps.

    Args:
        logits: (N, h, w) matched mask logits of any floating type; computed in float32 (float64 stays).
        ids: (R, H, W) integer id maps, one per image and plane.
        maps: (N,) int64, the map that holds the segment of each mask.
        segments: (N,) id of the segment in its map.

    Returns:
        Focal and dice loss, (N,) each.
    """
    if len(logits) == 0:  # still depends on the logits, so that every parameter takes part in every loss
        empty = logits.float().flatten(1).sum(1)
        return empty, empty
    exact = logits if logits.dtype == torch.float64 else logits.float()
    need_gradient = torch.is_grad_enabled() and logits.requires_grad
    focal, dice = _MatchedMaskLosses.apply(exact, ids, maps, segments.to(ids.dtype), need_gradient)
    return focal, dice
