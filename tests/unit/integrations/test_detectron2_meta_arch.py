"""The meta-architecture of Detectron2 beside ours: same weights, same losses, same results, in Detectron2's types."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed, see docs/detectron2.md")

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from PIL import Image

from maskformer.checkpoint import save_model
from maskformer.errors import UserError
from maskformer.integrations.detectron2 import normalizers, to_detectron2
from maskformer.integrations.detectron2.meta_arch import things_of
from maskformer.modeling.criterion import LossNormalizers
from maskformer.structures import SegmentMap

from .detectron2_models import (
    COCO,
    R50,
    SWIN,
    TINY,
    both,
    detectron2_config,
    detectron2_model,
    labelled,
    native_model,
    with_segments,
)

COCO_TINY = {
    **TINY,
    "DATASETS.TRAIN": ("coco_2017_train_panoptic",),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
}
RECIPES = {"semantic": (R50, TINY, 5), "swin": (SWIN, TINY, 5), "panoptic": (COCO, COCO_TINY, 133)}


def squares() -> tuple[torch.Tensor, torch.Tensor]:
    """Three masks (3, 64, 96), the first two overlapping, the last empty, and their classes."""
    masks = torch.zeros(3, 64, 96, dtype=torch.bool)
    masks[0, 10:40, 10:50] = True
    masks[1, 30:60, 40:90] = True
    return masks, torch.tensor([4, 1, 2])


def with_instances(kind: str) -> dict[str, Any]:
    """A sample of a third-party mapper for panoptic or instance segmentation."""
    masks, classes = squares()
    instances = Instances((64, 96))
    instances.gt_classes = classes
    if kind == "polygons":
        corners = [[10, 10, 50, 10, 50, 40, 10, 40], [40, 30, 90, 30, 90, 60, 40, 60], [0, 0, 0, 0, 0, 0]]
        instances.gt_masks = PolygonMasks([[np.array(each, dtype=np.float64)] for each in corners])
    else:
        instances.gt_masks = BitMasks(masks) if kind == "bitmasks" else masks
    image = labelled(5)[0]["image"]
    return {"image": image, "instances": instances, "height": 64, "width": 96}


@pytest.mark.parametrize("name", RECIPES)
def test_detectron2_model_has_our_losses_and_results(name: str) -> None:
    recipe, settings, classes = RECIPES[name]
    native, other = both(recipe, settings)
    samples = labelled(classes)
    expected, found = native(with_segments(samples)), other(samples)
    assert list(found) == list(expected)
    for key, loss in expected.items():
        torch.testing.assert_close(found[key], loss, rtol=1e-5, atol=1e-5)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in (native, other)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
    for ours, theirs in zip(native.eval()(samples), other.eval()(samples), strict=True):
        assert theirs.keys() == ours.keys()
        torch.testing.assert_close(theirs["sem_seg"], ours["sem_seg"], rtol=1e-5, atol=1e-5)
        if name == "panoptic":
            assert torch.equal(theirs["panoptic_seg"][0], ours["panoptic_seg"][0])
            assert len(ours["panoptic_seg"][1]) > 0
            for segment, same in zip(ours["panoptic_seg"][1], theirs["panoptic_seg"][1], strict=True):
                assert {**same, "score": 0} == {**segment, "score": 0}
                assert same["score"] == pytest.approx(segment["score"], abs=1e-5)
            assert torch.equal(theirs["instances"].pred_masks, ours["instances"]["masks"])


def test_detectron2_model_is_made_of_our_own_modules() -> None:
    native, other = both(COCO, COCO_TINY)
    assert isinstance(other, type(native))
    for part in ("image_result", "infer", "infer_each"):
        assert getattr(type(other), part) is getattr(type(native), part)
    assert type(other.criterion) is type(native.criterion)
    assert type(other.criterion.matcher) is type(native.criterion.matcher)
    assert type(other.sem_seg_head.predictor) is type(native.network.head)
    assert type(other.sem_seg_head.pixel_decoder.native) is type(native.network.pixel_decoder)
    assert type(both(SWIN)[1].backbone.native) is type(native_model(SWIN).network.backbone)


def test_detectron2_model_answers_as_ours_to_our_own_evaluation() -> None:
    native, other = both(R50)
    samples = labelled(5)
    for ours, theirs in zip(native.eval().infer(samples, "labels"), other.eval().infer(samples, "labels"), strict=True):
        assert list(theirs) == ["sem_seg_labels"]
        assert torch.equal(theirs["sem_seg_labels"], ours["sem_seg_labels"])
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(other.network(images).mask_logits, native.network(images).mask_logits)


@pytest.mark.parametrize("kind", ["bitmasks", "polygons", "tensor"])
def test_detectron2_model_trains_on_instances_of_third_party_mappers(kind: str) -> None:
    native, other = both(R50)
    masks, classes = squares()
    sample = with_instances(kind)
    segments = SegmentMap.from_masks(masks[:2], classes[:2])  # an empty mask would hurt, and is dropped
    expected, found = native([{"image": sample["image"], "segments": segments}]), other([sample])
    for name, loss in expected.items():
        # Polygons are drawn with a border that differs by a pixel here and there.
        tolerance = 2e-2 if kind == "polygons" else 1e-5
        torch.testing.assert_close(found[name], loss, rtol=tolerance, atol=1e-5)
    assert other.loss_normalizers([sample]).segments == 2


def test_detectron2_model_keeps_empty_segments_if_asked() -> None:
    model = detectron2_model(R50, {**TINY, "INPUT.KEEP_EMPTY_SEGMENTS": True})
    assert model.loss_normalizers([with_instances("bitmasks")]).segments == 3


def test_detectron2_model_trains_on_images_without_instances() -> None:
    empty = Instances((64, 96))
    empty.gt_classes, empty.gt_masks = torch.zeros(0, dtype=torch.int64), BitMasks(torch.zeros(0, 64, 96))
    model = detectron2_model(R50)
    losses = model([{**with_instances("tensor"), "instances": empty}])
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_detectron2_model_refuses_truth_that_is_not_that_of_its_images() -> None:
    model = detectron2_model(R50, {**TINY, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5})
    (sample,) = labelled(5, ((64, 64),))
    for wrong in (sample["sem_seg"][:32, :32], torch.zeros(80, 80, dtype=torch.int64)):
        with pytest.raises(UserError, match=rf"is {len(wrong)}x{len(wrong)} but its image 64x64"):
            model([{**sample, "sem_seg": wrong}])
    with pytest.raises(UserError, match=r"label 5, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 5"):
        model([{**sample, "sem_seg": torch.full((64, 64), 5)}])


def test_detectron2_instances_have_the_types_its_evaluators_take() -> None:
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 3:10, 5:21] = True
    masks[1, 19, 29] = True
    scores = torch.rand(3, 20, 30)
    found = to_detectron2(
        {"sem_seg": scores, "instances": {"masks": masks, "labels": torch.tensor([7, 2]), "scores": torch.ones(2)}}
    )
    instances = found["instances"].to("cpu")
    assert found["sem_seg"] is scores
    assert isinstance(instances, Instances)
    assert isinstance(instances.pred_boxes, Boxes)
    assert instances.image_size == (20, 30)
    assert instances.pred_boxes.tensor.tolist() == [[5, 3, 21, 10], [29, 19, 30, 20]]
    assert instances.pred_classes.tolist() == [7, 2]
    assert torch.equal(instances[instances.pred_classes == 2].pred_masks, masks[1:])


def test_detectron2_predictor_sees_what_ours_sees(tmp_path: Path) -> None:
    settings = {**TINY, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 100}
    native = native_model(R50, settings)
    save_model(tmp_path / "model.pth", model=native)
    weights = {"MODEL.WEIGHTS": str(tmp_path / "model.pth"), "DATASETS.TEST": ()}
    theirs = DefaultPredictor(detectron2_config(R50, {**settings, **weights}))
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    found = theirs(image[:, :, ::-1])["sem_seg"]  # theirs takes BGR
    resized = Image.fromarray(image).resize((92, 64), Image.Resampling.BILINEAR)
    sample = {"image": torch.from_numpy(np.array(resized)).permute(2, 0, 1), "height": 90, "width": 130}
    torch.testing.assert_close(found, native.eval()([sample])[0]["sem_seg"], rtol=1e-5, atol=1e-5)


def test_detectron2_model_can_be_copied_and_pickled() -> None:
    model = detectron2_model(R50).eval()
    sample = labelled(5)[:1]
    expected = model(sample)[0]["sem_seg"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(sample)[0]["sem_seg"], expected)
        assert other.network.backbone is other.backbone
        assert other.backbone is not model.backbone
        assert other.state_dict().keys() == model.state_dict().keys()
    assert len(list(model.parameters())) == len(list(model.backbone.parameters())) + len(
        list(model.sem_seg_head.parameters())
    )


# ---------------------------------------------------------------- several processes
class Comm:
    """Stands in for Detectron2's, on the first of several processes; the others have what `others` says."""

    def __init__(self, others: list[LossNormalizers]) -> None:
        self.others = others

    def get_world_size(self) -> int:
        return 1 + len(self.others)

    def all_gather(self, own: tuple[float, ...]) -> list[tuple[float, ...]]:
        return [own, *map(tuple, self.others)]


@pytest.mark.parametrize("normalizer", ["global", "rank"])
def test_detectron2_losses_of_two_processes_average_to_those_of_the_step(
    monkeypatch: pytest.MonkeyPatch, normalizer: str
) -> None:
    native, other = both(R50, {**TINY, "SOLVER.LOSS_NORMALIZER": normalizer})
    samples = labelled(5, ((64, 96), (64, 96)))
    samples[1]["sem_seg"][:, 16:] = 255  # fewer segments than the other
    shares = []
    own = [other.loss_normalizers([sample]) for sample in samples]
    assert own[0].segments != own[1].segments
    for here, there in ((0, 1), (1, 0)):
        monkeypatch.setattr(normalizers, "comm", Comm([own[there]]))
        shares.append(other([samples[here]]))
    whole = own[0].plus(own[1])
    for name in shares[0]:
        mean = (shares[0][name] + shares[1][name]) / 2  # what DistributedDataParallel makes of it
        sample_losses = [native(with_segments([sample]), whole)[name] for sample in samples]
        torch.testing.assert_close(mean, sum(sample_losses), rtol=1e-5, atol=1e-6)
    if normalizer == "global":
        together = native(with_segments(samples))
        for name, loss in together.items():
            torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, loss, rtol=1e-5, atol=1e-6)


def test_detectron2_model_in_our_own_loop_leaves_the_sums_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    native, other = both(R50)
    samples = labelled(5)
    whole = LossNormalizers(segments=17.0, class_weight=9.0, calls=2.0)
    monkeypatch.setattr(normalizers, "comm", Comm([whole]))  # asking it would change the losses
    expected, found = native(with_segments(samples), whole), other(samples, whole)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- things
@pytest.fixture
def dataset() -> Iterator[Any]:
    """Metadata of a data set that only Detectron2 knows."""
    name = "third_party_train"
    metadata = MetadataCatalog.get(name)
    yield metadata
    MetadataCatalog.remove(name)


def panoptic_config(name: str, classes: int = 5) -> Any:
    return detectron2_config(
        R50,
        {
            **TINY,
            "DATASETS.TRAIN": (name,),
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes,
        },
    )


def test_detectron2_metadata_says_what_is_a_thing(dataset: Any) -> None:
    dataset.set(thing_dataset_id_to_contiguous_id={10: 1, 30: 4})
    assert things_of(panoptic_config("third_party_train")) == (False, True, False, False, True)
    with pytest.raises(UserError, match="NUM_CLASSES is 3, but third_party_train has a thing of class 4"):
        things_of(panoptic_config("third_party_train", 3))


def test_detectron2_metadata_with_thing_classes_alone_has_things_alone(dataset: Any) -> None:
    dataset.set(thing_classes=list("abcde"))
    assert things_of(panoptic_config("third_party_train")) == (True,) * 5


def test_detectron2_metadata_that_does_not_say_is_refused_where_it_matters(dataset: Any) -> None:
    dataset.set(stuff_classes=list("abcde"))
    with pytest.raises(UserError, match="but third_party_train does not say"):
        things_of(panoptic_config("third_party_train"))
    cfg = panoptic_config("third_party_train")
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    assert things_of(cfg) == ()


def test_detectron2_table_of_things_of_the_same_list_counts_for_semantic_sets_too(dataset: Any) -> None:
    dataset.set(stuff_classes=list("abcde"), thing_dataset_id_to_contiguous_id={10: 1, 30: 4})
    assert things_of(panoptic_config("third_party_train")) == (False, True, False, False, True)


def test_detectron2_stuff_of_coco_alone_has_no_things() -> None:
    cfg = panoptic_config("coco_2017_train_panoptic_stuffonly", 54)  # whose metadata have the 80 things too
    with pytest.raises(UserError, match="but coco_2017_train_panoptic_stuffonly does not say: switch both off"):
        things_of(cfg)
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    assert things_of(cfg) == ()


def test_detectron2_things_and_stuff_numbered_apart_are_refused() -> None:
    for classes in (54, 80, 133):
        with pytest.raises(UserError, match=r"thing_classes and stuff_classes of data set .*_separated' differ"):
            things_of(panoptic_config("coco_2017_train_panoptic_separated", classes))


def test_detectron2_takes_things_from_our_catalog_where_it_has_none() -> None:
    assert things_of(panoptic_config("shapes_panoptic_train")) == (False, False, True, True, True)
    # Detectron2's own registration of COCO and our table agree.
    assert things_of(panoptic_config("coco_2017_train_panoptic", 133)) == (True,) * 80 + (False,) * 53


def test_detectron2_asked_for_things_makes_no_metadata() -> None:
    with pytest.raises(UserError, match="but nowhere_train does not say"):
        things_of(panoptic_config("nowhere_train"))
    assert "nowhere_train" not in MetadataCatalog.list()
