"""Which config key is likely at fault when a weight file and a model differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEAD = r"network\.head\."
_DECODER = r"network\.pixel_decoder\."
_HIDDEN = "MODEL.MASK_FORMER.HIDDEN_DIM"
_BACKBONE = "MODEL.RESNETS.DEPTH, MODEL.SWIN or MODEL.BACKBONE.NAME"

# (names, axis that differs or None for any, keys); the first that applies is named.
_RULES: tuple[tuple[str, int | None, str], ...] = (
    (_HEAD + r"query_positions\.", 0, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
    (_HEAD + r"mask_head\.layers\.2\.", 0, "MODEL.SEM_SEG_HEAD.MASK_DIM"),
    (_HEAD + r"classifier\.", 1, "MODEL.SEM_SEG_HEAD.MASK_DIM"),
    (_HEAD + r"input_projection\.weight", 1, _BACKBONE),
    (_HEAD + r".*linear1\.", 0, "MODEL.MASK_FORMER.DIM_FEEDFORWARD"),
    (_HEAD + r".*linear2\.weight", 1, "MODEL.MASK_FORMER.DIM_FEEDFORWARD"),
    (_HEAD, None, _HIDDEN),
    (_DECODER + r"embedding\.", 0, "MODEL.SEM_SEG_HEAD.MASK_DIM"),
    (_DECODER + r"encoder\..*linear1\.", 0, "MODEL.MASK_FORMER.DIM_FEEDFORWARD"),
    (_DECODER + r"encoder\..*linear2\.weight", 1, "MODEL.MASK_FORMER.DIM_FEEDFORWARD"),
    (_DECODER + r"(lateral|input_projection)\..*weight", 1, _BACKBONE),
    (_DECODER + r"output\..*weight", 1, f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME, CONVS_DIM or {_BACKBONE}"),
    (_DECODER, None, "MODEL.SEM_SEG_HEAD.CONVS_DIM"),
    (r".*relative_position_bias_table", 0, "MODEL.SWIN.WINDOW_SIZE"),
    (r".*relative_position_bias_table", 1, "MODEL.SWIN.NUM_HEADS"),
    (r".*absolute_pos_embed", None, "MODEL.SWIN.PRETRAIN_IMG_SIZE"),
    (r"network\.backbone\.body\.(conv1|bn1)\b", None, "MODEL.RESNETS.STEM_TYPE and MODEL.RESNETS.STEM_OUT_CHANNELS"),
    (r"network\.backbone\.body\.", None, "MODEL.RESNETS.DEPTH (or MODEL.TIMM.NAME)"),
    (r"network\.backbone\.", None, "MODEL.SWIN.EMBED_DIM"),
)
_PART_KEYS = {
    "backbone": "MODEL.BACKBONE.NAME, MODEL.RESNETS.DEPTH, MODEL.RESNETS.STEM_TYPE and MODEL.SWIN.DEPTHS",
    "pixel decoder": "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME and MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
    "head": "MODEL.SEM_SEG_HEAD.NAME, MODEL.MASK_FORMER.DEC_LAYERS and MODEL.MASK_FORMER.ENC_LAYERS",
}


def likely_key(name: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    """The config keys that usually explain a tensor of another shape.

    Args:
        name: ours.
        shape: in the file.
        expected: in the model.
    """
    axes = {i for i, (one, other) in enumerate(zip(shape, expected, strict=False)) if one != other}
    for pattern, axis, keys in _RULES:
        if re.match(pattern, name) and (axis is None or axis in axes):
            return keys
    return "the config that the file was made with"


def likely_keys_of_part(part: str, absent: Sequence[str], extra: Sequence[str]) -> str:
    """The config keys that usually explain names that one side has and the other lacks.

    Args:
        part: of the model, as in `layouts.PARTS`.
        absent: our names that the file lacks.
        extra: the file's names that the model lacks.
    """
    names = [*absent, *extra]
    if part == "backbone" and names and all(re.search(r"\.(res4|layer3|layers\.2)\.", name) for name in names):
        return "MODEL.RESNETS.DEPTH or MODEL.SWIN.DEPTHS"
    if part == "backbone" and names and all(re.search(r"stem|body\.(conv1|bn1)\.", name) for name in names):
        return "MODEL.RESNETS.STEM_TYPE"
    return _PART_KEYS[part]
