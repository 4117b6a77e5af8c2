"""Models to Hugging Face's layout, ready to be uploaded, and the config of a model that comes from there.

Neither needs transformers: a folder of its layout is a ``config.json``, the weights and what the images go through.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from yacs.config import CfgNode

from maskformer.checkpoint.huggingface import huggingface_state_dict
from maskformer.checkpoint.sources import local_source, pinned
from maskformer.config import get_cfg
from maskformer.data.dataset import Metadata, distinct_colors
from maskformer.errors import UserError
from maskformer.integrations.huggingface_config import check_expressible, model_config, preprocessor_config
from maskformer.integrations.huggingface_reading import check_settings, class_names_of, image_settings, settings_of
from maskformer.writing import atomic_write, write_text

PREPROCESSOR = "preprocessor_config.json"


def export_huggingface(
    model: nn.Module, cfg: CfgNode, metadata: Metadata, folder: str | Path, *, license_name: str = "unknown"
) -> list[Path]:
    """Writes a model as `MaskFormerForInstanceSegmentation.from_pretrained` and the Hub want it.

    Args:
        model: a meta-architecture that `cfg` builds.
        cfg: its config.
        metadata: of its classes; things, colours and ignore label are kept in a section of ours in ``config.json``.
        folder: where to write; made if need be.
        license_name: of the weights, as the Hub spells it (``cc-by-nc-4.0`` for the published ones).

    Returns:
        The files written: configs, weights and the model card.

    Raises:
        UserError: Hugging Face's model cannot be what this one is, or the folder cannot be written.
    """
    check_expressible(cfg)
    folder = Path(folder).expanduser()
    state = huggingface_state_dict(model.state_dict(), cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT)
    weights = folder / "model.safetensors"
    with atomic_write(weights) as file:
        file.write(safetensors.torch.save(state, {"format": "pt"}))
    texts = {
        "config.json": _json(model_config(cfg, metadata)),
        PREPROCESSOR: _json(preprocessor_config(cfg, metadata)),
        "README.md": model_card(cfg, metadata, license_name),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [weights, *(folder / name for name in texts)]


def config_from_huggingface(source: str | Path, overrides: Sequence[Any] = ()) -> CfgNode:
    """The config of a model in Hugging Face's layout; ``MODEL.WEIGHTS`` is the source, on the Hub at its commit of now.

    What such a folder does not say has our defaults: the training recipe, and which classes are things. How results are
    made from the outputs is kept in folders of ours; others get the thresholds of the published panoptic models.

    Args:
        source: a folder with ``config.json``, or ``hf://owner/name[@revision]``.
        overrides: ``KEY, VALUE, …`` as on the command line.

    Raises:
        UserError: it cannot be had, is no MaskFormer, or has parts that ours does not have.
    """
    source = pinned(source)
    folder = _folder(source)
    path = folder / "config.json"
    settings = settings_of(_read(path), path)
    if (folder / PREPROCESSOR).is_file():
        settings += image_settings(_read(folder / PREPROCESSOR), folder / PREPROCESSOR)
    check_settings(settings)
    pairs = [part for setting in settings for part in (setting.key, setting.value)]
    return get_cfg(None, [*pairs, "MODEL.WEIGHTS", source, *overrides])


def metadata_from_huggingface(source: str | Path) -> Metadata:
    """What the classes of such a model mean: only their names, unless `export_huggingface` wrote the folder.

    Raises:
        UserError: the source cannot be had or is damaged.
    """
    folder = _folder(source)
    path = folder / "config.json"
    names = class_names_of(_read(path), path)
    return Metadata(
        name=folder.name,
        classes=names,
        things=[False] * len(names),
        colors=distinct_colors(len(names)),
        ignore_label=max(255, len(names)),
        evaluators=(),
        dataset_ids=list(range(len(names))),
        truth=(),
    )


def is_huggingface(source: str | Path) -> bool:
    """Whether a weight source is a folder, or an address, of Hugging Face's layout, with a ``config.json``.

    Raises:
        UserError: it cannot be had.
    """
    path = local_source(source)
    return path is not None and path.is_dir() and (path / "config.json").is_file()


def model_card(cfg: CfgNode, metadata: Metadata, license_name: str) -> str:
    """The README.md of a model on the Hub."""
    name = "Swin" if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer" else f"ResNet-{cfg.MODEL.RESNETS.DEPTH}"
    trained = ", ".join(cfg.DATASETS.TRAIN) or (metadata.name if metadata.truth else "not stated")
    stated = (
        f"`{license_name}`, as stated by whoever converted this model."
        if license_name != "unknown"
        else "Not stated by whoever converted this model."
    )
    shown = ", ".join(metadata.classes[:8]) + (", …" if metadata.num_classes > 8 else "")
    return _CARD.format(
        license=license_name,
        backbone=name,
        classes=metadata.num_classes,
        shown=shown,
        trained=trained,
        stated=stated,
        shorter=cfg.INPUT.MIN_SIZE_TEST,
        longest=cfg.INPUT.MAX_SIZE_TEST,
    )


_CARD = """\
---
license: {license}
library_name: transformers
pipeline_tag: image-segmentation
tags:
- maskformer
- image-segmentation
- semantic-segmentation
---

# MaskFormer, {backbone}, {classes} classes

Mask classification for image segmentation (Cheng, Schwing, Kirillov, *Per-Pixel Classification is Not All You Need for
Semantic Segmentation*, NeurIPS 2021, [arXiv 2107.06278](https://arxiv.org/abs/2107.06278)), converted to the layout of
transformers by `maskformer convert`.

* **Training data**: {trained}. Its terms apply to what is made from it.
* **Classes**: {classes} ({shown}); all are in `config.json`.
* **Licence of these weights**: {stated}
  The weights published with the paper, and whatever is made from them, are under CC BY-NC 4.0: no commercial use.
* **Images**: RGB, the shorter side resized to {shorter} pixels, the longer one at most {longest}.

```python
from PIL import Image
from transformers import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

folder = "."  # or the name of this model on the Hub
processor = MaskFormerImageProcessor.from_pretrained(folder)
model = MaskFormerForInstanceSegmentation.from_pretrained(folder)
image = Image.open("photo.jpg").convert("RGB")
outputs = model(**processor(images=image, return_tensors="pt"))
classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
```

Class and mask logits equal those of the converted model on the same normalised tensor. The label maps differ slightly
at borders: transformers resizes images to a multiple of 32 where the original pads them, and sums the masks before it
upsamples them.
"""


def _folder(source: str | Path) -> Path:
    path = local_source(source)
    if path is None or not path.is_dir() or not (path / "config.json").is_file():
        raise UserError(
            f"{source} is no folder with a config.json of Hugging Face's layout: name one, or hf://owner/name"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of settings: download or copy it again")
    return content


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
