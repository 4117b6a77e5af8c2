"""The machine a run stands on: which device, which seed, and the state of every random generator."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from maskformer.device import resolve_device
from maskformer.errors import UserError


def choose_device(
    name: str, num_gpus: int | None = None, local_rank: int = 0, local_processes: int = 1
) -> torch.device:
    """The device of this process, that ``MODEL.DEVICE`` and ``--num-gpus`` ask for together.

    Args:
        name: value of ``MODEL.DEVICE``, see `maskformer.device.resolve_device`; where it is "cpu", ``--num-gpus``
            counts processes on the CPU.
        num_gpus: 0 for the CPU, else the number of CUDA devices, None to leave it to `name`.
        local_rank: number of this process on this machine.
        local_processes: number of processes on this machine.

    Raises:
        UserError: if the device is not known, not there, cannot run this build of PyTorch, or what is asked for
            contradicts itself.
    """
    if num_gpus == 0:
        if name not in ("auto", "cpu"):
            raise UserError(f"--num-gpus 0 asks for the CPU but MODEL.DEVICE is {name!r}; drop one of the two")
        return torch.device("cpu")
    if num_gpus and name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise UserError(f"--num-gpus {num_gpus} asks for GPUs but MODEL.DEVICE is {name!r}; drop one of the two")
    if num_gpus and name == "auto" and not torch.cuda.is_available():
        raise UserError(
            f"--num-gpus {num_gpus} asks for GPUs but this PyTorch sees no CUDA device; use --num-gpus 0 to run on the "
            f"CPU, or MODEL.DEVICE cpu to run {num_gpus} processes there"
        )
    device = resolve_device(name)
    if device.type == "cuda":
        if local_processes > 1:
            device = device_of_process(device, local_rank, local_processes, torch.cuda.device_count())
        check_build(*capability_and_build(device))
        device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device needs the number
    return device


def device_of_process(device: torch.device, local_rank: int, processes: int, devices: int) -> torch.device:
    """The CUDA device of one of several processes on a machine.

    Args:
        device: what ``MODEL.DEVICE`` means.
        local_rank: of the process.
        processes: on this machine.
        devices: CUDA devices that this process sees; one where the scheduler gives each process its own.

    Raises:
        UserError: if the config names one device for all, or there are too few.
    """
    if device.index is not None:
        raise UserError(f"MODEL.DEVICE is {device} but there are {processes} processes; use cuda, each takes its own")
    if devices == 1:
        return torch.device("cuda", 0)
    if devices < processes:
        raise UserError(f"{processes} processes were started but this machine shows {devices} GPUs; start {devices}")
    return torch.device("cuda", local_rank)


def check_devices(processes: int) -> None:
    """Refuse to start more processes on this machine than it shows GPUs.

    Raises:
        UserError: naming both numbers.
    """
    devices = torch.cuda.device_count()
    if devices < processes:
        raise UserError(
            f"--num-gpus is {processes} but this machine shows {devices} GPUs; give {devices}, or check "
            "CUDA_VISIBLE_DEVICES"
        )


def device_id(device: torch.device) -> str | None:
    """What tells a GPU from all others of its machine; None for the CPU, which processes may share."""
    if device.type != "cuda":
        return None
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


class Capability(NamedTuple):
    """What a CUDA device is.

    Attributes:
        name: of the card.
        version: compute capability, such as (7, 0) of a V100.
    """

    name: str
    version: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        """Whether it computes bfloat16 itself; older cards only emulate it, slowly."""
        return self.version >= (8, 0)

    @property
    def triton(self) -> bool:
        """Whether Triton kernels run on it."""
        return self.version >= (7, 0)


def capability_and_build(device: torch.device) -> tuple[Capability, list[str]]:
    """What the card is, and the architectures that this PyTorch was built for, such as ``sm_80`` or ``compute_90``."""
    properties = torch.cuda.get_device_properties(device)
    return Capability(properties.name, (properties.major, properties.minor)), torch.cuda.get_arch_list()


def check_build(capability: Capability, architectures: Sequence[str]) -> None:
    """Refuse a build of PyTorch that has no kernels for the card, which would fail at the first one.

    Kernels of ``sm_XY`` run on capabilities X.Z with Z ≥ Y, those of ``compute_XY`` on all from X.Y on.

    Raises:
        UserError: naming the card, the build and the one to take.
    """
    major, minor = capability.version
    if any(not architecture.startswith(("sm_", "compute_")) for architecture in architectures):
        return  # not NVIDIA's
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")  # sm_90a
        built = (int(digits[:-1]), int(digits[-1]))
        if (kind == "compute" and built <= (major, minor)) or (built[0] == major and built[1] <= minor):
            return
    remedy = "install one for a newer CUDA"
    if (major, minor) < (7, 5):
        remedy = "install its CUDA 12.6 build (choose CUDA 12.6 on pytorch.org)"
    if (7, 0) <= (major, minor) < (7, 5):
        remedy += ", or torch 2.10 or older from PyPI"
    raise UserError(
        f"{capability.name} (sm_{major}{minor}) cannot run this PyTorch {torch.__version__}, which was built for "
        f"{', '.join(architectures)}; {remedy}"
    )


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What ``SOLVER.AMP.DTYPE`` means on a device; None for the device's usual.

    Raises:
        UserError: for bfloat16 on a card that only emulates it.
    """
    if name == "auto":
        return None
    if name == "bfloat16" and device.type == "cuda":
        capability, _ = capability_and_build(device)
        if not capability.bfloat16:
            raise UserError(
                f"SOLVER.AMP.DTYPE is 'bfloat16', which {capability.name} does not compute itself; use float16"
            )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe_device(device: torch.device) -> str:
    """The device in words: its name, and the threads or the memory it has."""
    if device.type == "cuda":
        capability, _ = capability_and_build(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        abilities = [f"sm_{capability.version[0]}{capability.version[1]}"]
        abilities += [name for name in ("bfloat16", "triton") if getattr(capability, name)]
        return f"{device} ({capability.name}, {memory:.0f} GiB, {', '.join(abilities)})"
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
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's device
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set every generator to a state from `rng_state`; that of a CUDA device is left out where there is none."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position = state["numpy"]
    has_gauss, cached = state["numpy_gauss"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_of_process(seed: int, rank: int, iteration: int = 0) -> int:
    """A seed of its own for a process other than the first, or for one that a resumed run did not have before.

    Args:
        seed: of the run.
        rank: of the process.
        iteration: that training starts with.
    """
    return int(np.random.SeedSequence((seed, rank, iteration)).generate_state(1)[0])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave all generators as they were, so that what happens inside does not change the training after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
