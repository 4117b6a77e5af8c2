"""Our config keys inside a config of Detectron2, so that the same YAML files serve both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskformer.config import get_cfg

# Detectron2 hands its device to torch as it is, which does not know our "auto".
KEPT = frozenset({"MODEL.DEVICE"})


def add_maskformer_config(cfg: Any, *, our_defaults: bool = False) -> None:
    """Add every key of ours that a config of Detectron2 lacks, with our default.

    Where both have a key, Detectron2's value stays, as do values that are there already: the order in which projects
    add their keys (such as ``add_deeplab_config``) does not matter, nor does adding them twice. The published recipes
    name every key whose two defaults differ; recipes that lean on ours (quickstart, CamVid) need `our_defaults`.

    Args:
        cfg: ``detectron2.config.get_cfg()``, changed in place.
        our_defaults: also replace Detectron2's values by our defaults where both have a key (all but ``MODEL.DEVICE``):
            every recipe then means what it means in `maskformer.get_cfg`.
    """
    _add(cfg, get_cfg(), "", our_defaults)


def _add(node: Any, defaults: Mapping[str, Any], prefix: str, replace: bool) -> None:
    for key, value in defaults.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if key not in node:
                node[key] = type(node)()
            _add(node[key], value, f"{name}.", replace)
        elif key not in node or (replace and name not in KEPT):
            node[key] = value
