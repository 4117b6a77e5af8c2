"""Models built by Detectron2 and natively from the same config, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detectron2.config
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model as build_detectron2_model
from torch import nn

import maskformer
from maskformer import build_model
from maskformer.checkpoint import published_state_dict
from maskformer.integrations.detectron2 import add_maskformer_config
from maskformer.structures import SegmentMap
from tests.unit.checkpoint.conftest import COCO, PER_PIXEL, R50, SMALL, SWIN

__all__ = ["COCO", "PER_PIXEL", "R50", "SWIN"]
REPOSITORY = Path(maskformer.__file__).parents[1]
PLUS = "configs/ade20k-150/per_pixel_baseline_plus_R50_bs16_160k.yaml"
# Without chance in training, and in the memory order that Detectron2's own meta-architecture has too.
EXACT = {
    "MODEL.DEVICE": "cpu",
    "MODEL.CHANNELS_LAST": False,
    "MODEL.MASK_FORMER.DROPOUT": 0.0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
}
TINY = {**SMALL, **EXACT, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}


def words(settings: dict[str, Any]) -> list[Any]:
    return [part for pair in settings.items() for part in pair]


def detectron2_config(recipe: str, settings: dict[str, Any]) -> Any:
    cfg = detectron2.config.get_cfg()
    add_maskformer_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / recipe))
    cfg.merge_from_list(words(settings))
    return cfg


def detectron2_model(recipe: str, settings: dict[str, Any] = TINY) -> Any:
    return build_detectron2_model(detectron2_config(recipe, settings))


def native_model(recipe: str, settings: dict[str, Any] = TINY) -> Any:
    return build_model(maskformer.get_cfg(recipe, words(settings)))


def load_published(model: nn.Module, published: dict[str, torch.Tensor]) -> None:
    """Nothing may be missing or left over."""
    found = model.load_state_dict(published, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])


def both(recipe: str, settings: dict[str, Any] = TINY) -> tuple[Any, Any]:
    """The native model and Detectron2's, with the same random weights."""
    native, other = native_model(recipe, settings), detectron2_model(recipe, settings)
    published = published_state_dict(native)
    if "PerPixel" in type(other.sem_seg_head).__name__:
        published = {name: tensor for name, tensor in published.items() if not name.startswith("criterion.")}
    load_published(other, published)
    return native, other


def labelled(classes: int, sizes: tuple[tuple[int, int], ...] = ((64, 96), (96, 64))) -> list[dict[str, Any]]:
    """Samples of a third-party mapper for semantic segmentation, with unsupervised pixels; results at 50 x 70."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for height, width in sizes:
        coarse = torch.randint(0, classes, (-(-height // 16), -(-width // 16)), generator=generator)
        labels = coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width].contiguous()
        labels[:5] = 255
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "sem_seg": labels, "height": 50, "width": 70})
    return samples


def with_segments(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same samples as our own recipes make them."""
    return [{**sample, "segments": SegmentMap.from_label_map(sample["sem_seg"], 255)} for sample in samples]


def save(model: nn.Module, folder: Path, **extra: Any) -> Path:
    DetectionCheckpointer(model, str(folder)).save("model_0000001", **extra)
    return folder / "model_0000001.pth"


def randomise(model: nn.Module) -> nn.Module:
    """Every tensor another, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand(tensor.shape, generator=generator)
    return model
