"""The lean mask losses equal the straightforward ones, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskformer.modeling import losses
from maskformer.modeling.losses import matched_mask_losses
from maskformer.modeling.reference_losses import upsampled_mask_losses


def make_case(size: tuple[int, int], full: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    count = 9
    logits = (torch.randn(count, *size, generator=generator, dtype=torch.float64) * 5).to(dtype).requires_grad_()
    ids = torch.randint(-1, 5, (3, *full), generator=generator).to(torch.int16)
    maps = torch.randint(0, 3, (count,), generator=generator)
    segments = torch.randint(0, 6, (count,), generator=generator)  # id 5 occurs nowhere: an empty mask
    return logits, ids, maps, segments


@pytest.mark.parametrize(("size", "full"), [((8, 8), (32, 32)), ((7, 5), (26, 19)), ((6, 6), (6, 6)), ((1, 3), (1, 9))])
@pytest.mark.parametrize("chunk", [1, 700, 1 << 18])
def test_equal_to_the_reference(
    size: tuple[int, int], full: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_PIXELS", chunk)
    logits, ids, maps, segments = make_case(size, full, torch.float64)
    ours = matched_mask_losses(logits, ids, maps, segments)
    # The reference computes in float32; double precision shows that the closed-form derivative is exact.
    truth = (ids[maps] == segments[:, None, None]).double()
    upsampled = torch.nn.functional.interpolate(logits[:, None], size=full, mode="bilinear")[:, 0].flatten(1)
    reference = exact_reference(upsampled, truth.flatten(1))
    weights = torch.rand(2, len(logits), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for focal, dice in (ours, reference):
        (gradient,) = torch.autograd.grad((weights[0] * focal + weights[1] * dice).sum(), logits, retain_graph=True)
        gradients.append(gradient)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-14)


def exact_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from maskformer.modeling.reference_losses import dice_loss, sigmoid_focal_loss

    return sigmoid_focal_loss(logits, targets), dice_loss(logits, targets)


def test_float32_error_is_at_most_twice_the_references() -> None:
    errors = {"ours": 0.0, "reference": 0.0}
    exact_inputs = make_case((32, 32), (128, 128), torch.float64)
    exact = matched_mask_losses(*exact_inputs)
    (exact_gradient,) = torch.autograd.grad(exact[0].sum() + exact[1].sum(), exact_inputs[0])
    logits, ids, maps, segments = make_case((32, 32), (128, 128), torch.float32)
    for name in errors:
        if name == "ours":
            focal, dice = matched_mask_losses(logits, ids, maps, segments)
        else:
            focal, dice = upsampled_mask_losses(logits, ids[maps] == segments[:, None, None])
        (gradient,) = torch.autograd.grad(focal.sum() + dice.sum(), logits)
        errors[name] = (gradient - exact_gradient).abs().max().item()
    assert errors["ours"] <= 2 * errors["reference"]


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4]]]).expand(2, 1, 2).clone().requires_grad_()
    ids = torch.tensor([[[0, 0]], [[-1, 0]]], dtype=torch.int16)
    focal, dice = matched_mask_losses(logits, ids, torch.tensor([0, 1]), torch.tensor([0, 0]))
    (focal.sum() + dice.sum()).backward()
    assert torch.isfinite(focal).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, ids, maps, segments = make_case((8, 8), (32, 32), torch.bfloat16)
    focal, _ = matched_mask_losses(logits, ids, maps, segments)
    assert focal.dtype == torch.float32
    focal.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_no_masks_still_depend_on_the_logits() -> None:
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    focal, dice = matched_mask_losses(logits, torch.zeros(1, 8, 8, dtype=torch.int16), empty, empty)
    assert (focal.sum() + dice.sum()).requires_grad


def test_adjoint_by_products_equals_the_kernel() -> None:
    full = torch.randn(2, 3, 26, 19, dtype=torch.float64)
    ours = losses._adjoint_by_products(full, 7, 5)
    torch.testing.assert_close(ours, losses._downsample_adjoint(full, 7, 5))
