"""From a config to a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from maskformer import build_model, get_cfg
from maskformer.build import build_matcher, count_parameters
from maskformer.device import resolve_device
from maskformer.errors import UserError
from maskformer.modeling.matcher import FixedMatcher, HungarianMatcher
from maskformer.modeling.meta_arch import SemanticSegmentor

QUICKSTART = "configs/quickstart/shapes_panoptic.yaml"


def build(config: str = QUICKSTART, overrides: Sequence[str] = ()) -> torch.nn.Module:
    return build_model(get_cfg(config, ["MODEL.DEVICE", "cpu", *overrides]))


def test_options_reach_the_model() -> None:
    model = build(overrides=["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "0.25", "SOLVER.LOSS_NORMALIZER", "rank"])
    assert model.things == (False, False, True, True, True)
    assert (model.object_mask_threshold, model.overlap_threshold) == (0.5, 0.25)
    assert model.panoptic_on
    assert not model.instance_on
    assert model.criterion.normalizer == "rank"
    assert model.size_divisibility == 32
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_per_pixel_models_ignore_the_mask_formers_divisibility() -> None:
    model = build("configs/quickstart/shapes_per_pixel.yaml")
    assert isinstance(model, SemanticSegmentor)
    assert model.size_divisibility == 0  # a ResNet's own


def test_minus_one_takes_the_backbones_divisibility() -> None:
    assert build(overrides=["MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "-1"]).size_divisibility == 0


def test_matchers() -> None:
    key = "MODEL.MASK_FORMER.MATCHER"
    matcher = build_matcher(get_cfg(QUICKSTART, ["MODEL.MASK_FORMER.MASK_WEIGHT", "7.0"]))
    assert isinstance(matcher, HungarianMatcher)
    assert matcher.mask_weight == 7.0
    assert isinstance(build_matcher(get_cfg(QUICKSTART, [key, "fixed", *queries(5)])), FixedMatcher)
    with pytest.raises(UserError, match="NUM_OBJECT_QUERIES"):
        build_matcher(get_cfg(QUICKSTART, [key, "fixed", *queries(6)]))


def queries(count: int) -> list[str]:
    return ["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", str(count)]


def test_wrong_class_count_names_both_numbers_and_the_key() -> None:
    with pytest.raises(UserError, match=r"NUM_CLASSES is 4, but .* has 5 classes; set the key to 5"):
        build(overrides=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4"])


def test_panoptic_results_need_to_know_the_things() -> None:
    with pytest.raises(UserError, match="which classes are things"):
        build(overrides=["DATASETS.TRAIN", "()"])


def test_seeds_make_the_same_model() -> None:
    torch.manual_seed(3)
    first = build()
    torch.manual_seed(3)
    second = build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert count_parameters(first) == (sum(p.numel() for p in first.parameters()), 0)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:x", "meta"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"MODEL\.DEVICE"):
        resolve_device(name)
