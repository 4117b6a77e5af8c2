"""Which device to run on."""

from __future__ import annotations

import torch

from maskformer.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device that ``MODEL.DEVICE`` means.

    Args:
        name: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:N" or "mps" (untested).

    Raises:
        UserError: if the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {name!r}, which is no device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"MODEL.DEVICE is {name!r}, but there are {count} usable CUDA devices; use auto or cpu")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("MODEL.DEVICE is 'mps', but this machine has no usable Metal device; use auto or cpu")
    elif device.type != "cpu":
        raise UserError(f"MODEL.DEVICE is {name!r}; use auto, cpu, cuda, cuda:N or mps")
    return device
