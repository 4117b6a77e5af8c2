"""Weight files that tests make, and models to make them of."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskformer.checkpoint import export_published

DEEP: dict[str, Any] = {
    "MODEL__BACKBONE__NAME": "build_resnet_deeplab_backbone",
    "MODEL__RESNETS__STEM_TYPE": "deeplab",
}
DEEP |= {"MODEL__RESNETS__STEM_OUT_CHANNELS": 128, "MODEL__RESNETS__RES5_MULTI_GRID": (1, 2)}


def save(path: Path, state: dict[str, Tensor], **beside: Any) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, **beside}))
    return path


def randomised(model: nn.Module) -> nn.Module:
    """The model with other values everywhere, also in its buffers."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(-1, 1)
    return model


def equal(one: nn.Module, other: nn.Module, start: str = "network.") -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith(start))


def file_of(model: nn.Module, path: Path) -> Path:
    return export_published(randomised(model), path)
