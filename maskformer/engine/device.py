"""The machine a run stands on: which device, which seed, and the state of every random generator."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from maskformer.device import resolve_device
from maskformer.errors import UserError


def choose_device(name: str, num_gpus: int | None = None) -> torch.device:
    """The device that ``MODEL.DEVICE`` and ``--num-gpus`` ask for together.

    Args:
        name: value of ``MODEL.DEVICE``, see `maskformer.device.resolve_device`.
        num_gpus: 0 for the CPU, 1 for one CUDA device, None to leave it to `name`.

    Raises:
        UserError: if the device is not known, not there, or the two contradict each other.
    """
    if num_gpus == 0:
        if name not in ("auto", "cpu"):
            raise UserError(f"--num-gpus 0 asks for the CPU but MODEL.DEVICE is {name!r}; drop one of the two")
        return torch.device("cpu")
    if num_gpus == 1 and name != "auto" and not name.startswith("cuda"):
        raise UserError(f"--num-gpus 1 asks for a GPU but MODEL.DEVICE is {name!r}; drop one of the two")
    if num_gpus == 1 and name == "auto" and not torch.cuda.is_available():
        raise UserError(
            "--num-gpus 1 asks for a GPU but this PyTorch sees no CUDA device; use --num-gpus 0 to run on the CPU"
        )
    return resolve_device(name)


def describe_device(device: torch.device) -> str:
    """The device in words: its name, and the threads or the memory it has."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads of {os.cpu_count()} cores)"
    return f"{device} (untested)"


def seed_everything(seed: int, deterministic: bool = False, benchmark: bool = False) -> None:
    """Seed Python, NumPy and PyTorch.

    Args:
        seed: not negative.
        deterministic: only algorithms that give the same numbers in every run; slower on CUDA.
        benchmark: let cuDNN choose its algorithms by timing them.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this when its first handle is made, so it has to be set before any work on the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark and not deterministic


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process, as plain containers and tensors."""
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position)),
        "numpy_gauss": (int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set every generator to a state from `rng_state`; CUDA generators that are not there are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position = state["numpy"]
    has_gauss, cached = state["numpy_gauss"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), index)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave all generators as they were, so that what happens inside does not change the training after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
