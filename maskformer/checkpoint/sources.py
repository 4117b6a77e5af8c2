"""Whatever a user may write in ``MODEL.WEIGHTS``, and the tensors behind it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
from torch import nn

from maskformer.checkpoint import hub
from maskformer.checkpoint.files import WeightFile, read_weight_file
from maskformer.checkpoint.remote import local_file
from maskformer.errors import UserError

TIMM = "timm://"
# What our ResNets and Swins are; others of timm's have the same names and shapes but compute something else.
_SAME_ARCHITECTURE = re.compile(
    r"(resnet(18|34|50|101|152)|resnet(50|101|152)s|swin_(tiny|small|base|large)_patch4_window\d+_\d+(_in22k)?)(\..+)?"
)


def local_source(source: str | Path) -> Path | None:
    """The file or folder on this machine that `source` means, downloaded if need be; None for timm's weights.

    Raises:
        UserError: there is none, or it cannot be had.
    """
    text = str(source)
    if text.startswith(TIMM):
        return None
    if text.startswith(hub.PREFIX):
        return hub.fetch(text)
    path = Path(source).expanduser()
    if text and "://" not in text and path.is_dir() and hub.weights_in(path):
        return path
    return local_file(source)


def fetch_source(source: str | Path) -> None:
    """Makes sure that what `source` means is on this machine, so that reading it needs no network.

    Raises:
        UserError: it cannot be had.
    """
    if local_source(source) is None:
        _timm_model(str(source))


def pinned(source: str | Path) -> str:
    """`source`, but an address of the Hub with the commit that it means now: see `hub.pinned`.

    Raises:
        UserError: it cannot be had.
    """
    return hub.pinned(str(source)) if str(source).startswith(hub.PREFIX) else str(source)


def open_weights(source: str | Path, model: nn.Module | None = None) -> WeightFile:
    """Reads the tensors of a weight source.

    Args:
        source: a file; a folder that transformers saved; ``https://…``; ``detectron2://X`` (Detectron2's file store);
            ``hf://owner/name[@revision]`` (Hugging Face Hub); ``timm://name`` (timm's pre-trained weights).
        model: the meta-architecture they are for, if any: timm names the weights of its feature pyramids otherwise.

    Raises:
        UserError: the source cannot be had or read, or timm's weights are not for this model.
    """
    path = local_source(source)
    if path is None:
        return _timm_weights(str(source), model)
    return hub.read_folder(path) if path.is_dir() else read_weight_file(path)


def _timm_weights(address: str, model: nn.Module | None) -> WeightFile:
    backbone: Any = getattr(getattr(model, "network", None), "backbone", None)
    wanted = getattr(backbone, "architecture", "")
    name = address.removeprefix(TIMM)
    _check_is_timms(address)
    if not wanted:
        if model is not None and not _SAME_ARCHITECTURE.fullmatch(name):
            raise UserError(
                f"MODEL.WEIGHTS {address} is no ResNet and no Swin of the kind that is built here without timm (such "
                f"as resnet50, resnet101s and swin_tiny_patch4_window7_224): set MODEL.BACKBONE.NAME timm and "
                f"MODEL.TIMM.NAME {name}"
            )
        return WeightFile(address, dict(_timm_model(address).state_dict()))
    if name.split(".")[0] != wanted.split(".")[0]:
        raise UserError(
            f"MODEL.WEIGHTS {address} is another model than MODEL.TIMM.NAME {wanted!r}: name timm://{wanted}, "
            f"or set MODEL.TIMM.NAME {name}"
        )
    body = _timm_model(address, features_only=True).state_dict()
    own = backbone.body.state_dict()
    # Stages that nothing reads are not in our model; those that are have timm's own names.
    return WeightFile(address, {f"timm.{key}": value for key, value in body.items() if key in own})


def _check_is_timms(address: str) -> None:
    if not timm.is_model(address.removeprefix(TIMM)):
        raise UserError(
            f"MODEL.WEIGHTS {address} is no model of timm {timm.__version__}: timm.list_models() lists them"
        )


def _timm_model(address: str, **options: Any) -> nn.Module:
    name = address.removeprefix(TIMM)
    _check_is_timms(address)
    try:
        made: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # whatever timm and its downloads raise: there is no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"MODEL.WEIGHTS {address} cannot be had ({reason}): check the name and the network connection, "
            f"or set MODEL.WEIGHTS to a file on this machine"
        ) from error
    return made
