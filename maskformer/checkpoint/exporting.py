"""Writing a model's weights under the published names, for tools that know those."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from maskformer.checkpoint import layouts
from maskformer.checkpoint.files import atomic_write
from maskformer.errors import UserError
from maskformer.pickles import dump_pickle

_TABLE = ".relative_position_bias_table"


def export_published(model: nn.Module, path: str | Path) -> Path:
    """Writes a model in the layout of the published weight files.

    Args:
        model: a meta-architecture with a ResNet or Swin backbone.
        path: ends in ``.pkl`` (Detectron2's pickle of numpy arrays), ``.pth`` or ``.safetensors``.

    Returns:
        The file written.

    Raises:
        UserError: the layout has no names for this model, or the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".pkl", ".pth", ".safetensors"):
        raise UserError(f"{path} names no weight format: let it end in .pkl, .pth or .safetensors")
    state = published_state_dict(model)
    with atomic_write(path) as file:
        if path.suffix == ".pkl":
            arrays = {name: tensor.numpy() for name, tensor in state.items()}
            file.write(dump_pickle({"model": arrays, "__author__": "maskformer", "matching_heuristics": False}))
        elif path.suffix == ".pth":
            torch.save({"model": state}, file)
        else:
            file.write(safetensors.torch.save(state, {"format": "pt"}))
    return path


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights under published names, on the CPU; float32, int64 where the layout holds indices.

    Includes what the published files hold although it can be calculated: Swin's table of relative positions and the
    class weights of the criterion.

    Raises:
        UserError: the layout has no name for something in this model.
    """
    own = model.state_dict()
    kind = layouts.backbone_kind(own)
    published: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if not name.startswith(layouts.OURS) or name.endswith(".num_batches_tracked"):
            continue
        outside = layouts.to_published(name, kind)
        if outside is None:
            raise UserError(
                f"The published layout has no name for {name}, because this model has another backbone than ResNet or "
                f"Swin (MODEL.BACKBONE.NAME): use the checkpoint itself, model_final.pth"
            )
        tensor = tensor.detach().cpu()
        published[outside] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        if outside.endswith(_TABLE):
            window = (math.isqrt(tensor.shape[0]) + 1) // 2
            published[outside.removesuffix(_TABLE) + ".relative_position_index"] = relative_position_index(window)
    classes = own.get("network.head.class_head.bias")
    if classes is not None:
        weights = torch.ones(len(classes))
        weights[-1] = float(getattr(getattr(model, "criterion", None), "no_object_weight", 0.1))
        published["criterion.empty_weight"] = weights
    return published


def relative_position_index(window: int) -> Tensor:
    """Row of Swin's bias table for each pair of positions in a window.

    Args:
        window: its side w.

    Returns:
        (w², w²) int64: (Δrow + w - 1)(2w - 1) + (Δcol + w - 1), where Δ = query (row) minus key (column).
    """
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right
