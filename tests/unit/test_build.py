"""From a config to a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskformer import build_model, get_cfg
from maskformer.build import build_matcher, count_parameters, synchronize_norms
from maskformer.device import resolve_device
from maskformer.errors import UserError
from maskformer.modeling.backbones import make_timm_pyramid
from maskformer.modeling.layers import synchronize_batch_norms
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


# ---------------------------------------------------------------- synchronised batch norms
SYNC = ["MODEL.SYNC_BN", "True"]
PUBLISHED_SYNC = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.SEM_SEG_HEAD.NORM", "SyncBN"]


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}


@pytest.mark.parametrize("overrides", [SYNC, PUBLISHED_SYNC])
def test_one_process_has_nothing_to_synchronise(overrides: list[str]) -> None:
    model = build(overrides=overrides)
    assert kinds(model) == {nn.BatchNorm2d if overrides is SYNC else nn.SyncBatchNorm}
    images = torch.randn(2, 3, 32, 32)
    assert model.network(images).mask_logits.isfinite().all()
    assert model.eval().network(images).mask_logits.isfinite().all()


def test_several_processes_synchronise_the_batch_norms_that_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(overrides=["MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "3"])
    cfg = get_cfg(QUICKSTART, SYNC)
    model = copy.deepcopy(plain)
    monkeypatch.setattr("maskformer.build.world_size", lambda: 2)
    synchronize_norms(cfg, model, torch.device("cuda"))
    different = [name for name, module in model.named_modules() if type(module) is not type(plain.get_submodule(name))]
    assert {".".join(name.split(".")[:4]) for name in different if "backbone" in name} == {
        "network.backbone.body.layer3",
        "network.backbone.body.layer4",
    }
    assert sum("pixel_decoder" in name for name in different) == 7
    assert kinds(model) == {nn.BatchNorm2d, nn.SyncBatchNorm}
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]
    images = torch.randn(2, 3, 64, 64)  # no process group here, so the numbers are those of one process
    expected, found = plain.network(images), model.network(images)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits)


def test_synchronised_norms_of_timm_keep_their_activation() -> None:
    plain = make_timm_pyramid("mobilenetv3_small_050")
    model = copy.deepcopy(plain)
    synchronize_batch_norms(model)
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds(model))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images)["res5"], plain(images)["res5"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            SYNC,
            "MODEL.SYNC_BN True cannot synchronise .* 2 processes on MODEL.DEVICE cpu: set it to False, or train on",
        ),
        (PUBLISHED_SYNC, "MODEL.RESNETS.NORM 'SyncBN' cannot .*: use BN or GN, or train on GPUs"),
        (PUBLISHED_SYNC[2:], "MODEL.SEM_SEG_HEAD.NORM 'SyncBN' cannot .*: use BN or GN, or train on GPUs"),
        ([*PUBLISHED_SYNC, "MODEL.BACKBONE.FREEZE_AT", "5"], "MODEL.SEM_SEG_HEAD.NORM 'SyncBN' cannot"),
    ],
)
def test_norms_that_torch_cannot_synchronise_are_refused(
    overrides: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskformer.build.world_size", lambda: 2)
    model = build(overrides=overrides)  # evaluating synchronises nothing
    with pytest.raises(UserError, match=sentence) as caught:
        synchronize_norms(get_cfg(QUICKSTART, overrides), model, torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [[], [*SYNC, "MODEL.RESNETS.NORM", "GN"]])
def test_several_processes_on_cpus_need_no_synchronised_norms(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskformer.build.world_size", lambda: 2)
    model = build(overrides=overrides)
    synchronize_norms(get_cfg(QUICKSTART, overrides), model, torch.device("cpu"))
    assert nn.SyncBatchNorm not in kinds(model)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:x", "meta"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"MODEL\.DEVICE"):
        resolve_device(name)
