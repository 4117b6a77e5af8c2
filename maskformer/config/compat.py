"""Published keys that nothing reads: the values they may have, and what to do instead.

They are part of the schema, so that published configs load unchanged; another value would be ignored, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from maskformer.errors import UserError


class Unread(NamedTuple):
    """A published key without effect.

    Its default is ``values[0]``, ``values`` are all that it may have.
    """

    values: tuple[Any, ...]
    remedy: str


UNREAD: dict[str, Unread] = {
    # Version of the config schema; there is only this one.
    "VERSION": Unread((2,), "convert the config to version 2"),
    # Iterations between pictures of training samples.
    "VIS_PERIOD": Unread((0,), "use TEST.PICTURES, pictures are saved at every evaluation"),
    # Stride in a block's 1x1 instead of its 3x3 convolution (the original Caffe networks).
    "MODEL.RESNETS.STRIDE_IN_1X1": Unread((False,), "use weights of a network with the stride in the 3x3 convolution"),
    # Outputs of the backbone: always all four.
    "MODEL.RESNETS.OUT_FEATURES": Unread(
        (["res2", "res3", "res4", "res5"],), "choose among the four with MODEL.SEM_SEG_HEAD.IN_FEATURES"
    ),
    # Channels after the stem: follows from STEM_TYPE (basic 64, deeplab 128), and must agree with it.
    "MODEL.RESNETS.STEM_OUT_CHANNELS": Unread((64, 128), "leave it out, it follows from MODEL.RESNETS.STEM_TYPE"),
    # Channels of res2: follows from DEPTH (18 and 34: 64, else 256); 64 is refused where 256 are built.
    "MODEL.RESNETS.RES2_OUT_CHANNELS": Unread((256, 64), "leave it out, it follows from MODEL.RESNETS.DEPTH"),
    # ResNeXt.
    "MODEL.RESNETS.NUM_GROUPS": Unread((1,), "use MODEL.BACKBONE.NAME timm with a ResNeXt as MODEL.TIMM.NAME"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Unread((64,), "use MODEL.BACKBONE.NAME timm with a wider network"),
    # Box detectors.
    "MODEL.MASK_ON": Unread((False,), "use MODEL.MASK_FORMER.TEST.INSTANCE_ON"),
    "MODEL.KEYPOINT_ON": Unread((False,), "leave it out, keypoints are not predicted"),
    "MODEL.LOAD_PROPOSALS": Unread((False,), "leave it out, there are no proposals"),
    # Mirroring: all recipes mirror left-right with probability 1/2.
    "INPUT.RANDOM_FLIP": Unread(("horizontal",), "leave it out, every recipe mirrors half of its images"),
    # How COCO masks are stored; both kinds are read wherever they occur.
    "INPUT.MASK_FORMAT": Unread(("polygon", "bitmask"), "leave it out, polygons and RLE are both read"),
    # Separate settings for biases.
    "SOLVER.BIAS_LR_FACTOR": Unread((1.0,), "leave it out, biases share the learning rate of their layer"),
    "SOLVER.WEIGHT_DECAY_BIAS": Unread((None,), "leave it out, biases share SOLVER.WEIGHT_DECAY"),
    "TEST.DETECTIONS_PER_IMAGE": Unread((100,), "set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
    # Results that a run must reach.
    "TEST.EXPECTED_RESULTS": Unread(([],), "compare OUTPUT_DIR/metrics.json yourself"),
}


def check_unread(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse values of unread keys that would have an effect elsewhere and have none here.

    Args:
        values: flat config, dotted key to value.
        origins: where a key was set, as it should stand in front of a message; keys may be missing.

    Raises:
        UserError: a key of ``UNREAD`` has a value that it may not have.
    """
    for key, unread in UNREAD.items():
        value = values[key]
        if value not in unread.values:
            allowed = " or ".join(repr(allowed) for allowed in unread.values)
            raise UserError(f"{origins.get(key, '')}{key} is {value!r} but may only be {allowed}: {unread.remedy}")
