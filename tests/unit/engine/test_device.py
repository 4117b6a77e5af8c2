"""Devices, seeds and generator states."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from maskformer.engine import device as device_module
from maskformer.engine.device import (
    Capability,
    amp_dtype,
    check_build,
    choose_device,
    describe_device,
    device_of_process,
    preserved_rng,
    rng_state,
    seed_everything,
    set_rng_state,
)
from maskformer.errors import UserError


def draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(()).item()


def test_zero_gpus_means_the_cpu() -> None:
    assert choose_device("auto", 0) == torch.device("cpu")
    assert choose_device("cpu", 0) == choose_device("cpu") == torch.device("cpu")
    assert "cpu" in describe_device(torch.device("cpu"))
    with pytest.raises(UserError, match=r"--num-gpus 0 asks for the CPU but MODEL.DEVICE is 'cuda'"):
        choose_device("cuda", 0)


def test_gpus_contradict_a_device_that_is_none() -> None:
    with pytest.raises(UserError, match=r"--num-gpus 1 asks for GPUs but MODEL.DEVICE is 'mps'; drop one"):
        choose_device("mps", 1)


def test_on_the_cpu_the_number_counts_processes() -> None:
    assert choose_device("cpu", 2, local_rank=1, local_processes=2) == torch.device("cpu")


def test_each_process_takes_its_own_gpu() -> None:
    cuda = torch.device("cuda")
    assert device_of_process(cuda, 3, 4, devices=8) == torch.device("cuda", 3)
    assert device_of_process(cuda, 3, 4, devices=1) == torch.device("cuda", 0)  # the scheduler shows each its own
    with pytest.raises(UserError, match="4 processes were started but this machine shows 2 GPUs"):
        device_of_process(cuda, 3, 4, devices=2)
    with pytest.raises(UserError, match=r"MODEL\.DEVICE is cuda:1 but there are 4 processes"):
        device_of_process(torch.device("cuda", 1), 3, 4, devices=8)


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_80"]),
        ((8, 9), ["sm_80", "sm_86"]),  # kernels run on later cards of the same generation
        ((9, 0), ["sm_80", "sm_90a"]),
        ((12, 1), ["sm_80", "compute_90"]),  # compiled on the card
    ],
)
def test_a_build_with_kernels_for_the_card_is_accepted(version: tuple[int, int], architectures: list[str]) -> None:
    check_build(Capability("card", version), architectures)


def test_a_build_without_kernels_for_a_v100_names_the_one_to_take() -> None:
    newest = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    with pytest.raises(UserError, match=r"Tesla V100 \(sm_70\) cannot run this PyTorch .*CUDA 12.6 build"):
        check_build(Capability("Tesla V100", (7, 0)), newest)
    with pytest.raises(UserError, match="install one for a newer CUDA"):
        check_build(Capability("B200", (10, 0)), ["sm_80", "sm_90"])


def test_other_makers_builds_are_not_judged() -> None:
    check_build(Capability("MI250", (9, 0)), ["gfx90a"])


def test_the_device_of_a_process_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes no device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(device_module, "capability_and_build", lambda device: (Capability("A", (8, 0)), ["sm_80"]))
    assert choose_device("auto") == choose_device("cuda", 1) == torch.device("cuda", 0)
    assert choose_device("cuda:2") == torch.device("cuda", 2)
    assert choose_device("auto", 4, 3, 4) == torch.device("cuda", 3)
    device_module.check_devices(4)
    with pytest.raises(UserError, match="--num-gpus is 5 but this machine shows 4 GPUs"):
        device_module.check_devices(5)


def test_old_cards_compute_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amp_dtype("auto", torch.device("cuda")) is None
    assert amp_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    for name, version, triton in (("V100", (7, 0), True), ("P100", (6, 0), False)):
        capability = Capability(name, version)
        assert capability.triton is triton
        monkeypatch.setattr(device_module, "capability_and_build", lambda device, found=capability: (found, []))
        with pytest.raises(UserError, match=f"{name} does not compute itself; use float16"):
            amp_dtype("bfloat16", torch.device("cuda"))
        assert amp_dtype("float16", torch.device("cuda")) is torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"--num-gpus 1"):
        choose_device("auto", 1)
    assert choose_device("auto") == torch.device("cpu")


def test_seed_decides_all_generators() -> None:
    seed_everything(7, deterministic=False)
    first = draw()
    seed_everything(7, deterministic=False)
    assert draw() == first
    assert draw() != first


def test_deterministic_can_be_switched_on_and_off() -> None:
    seed_everything(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    seed_everything(1, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_state_survives_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    np.random.randn()  # leaves half a pair in NumPy's generator, which is part of its state
    torch.save(rng_state(), tmp_path / "rng.pth")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected


def test_preserved_rng() -> None:
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    with preserved_rng():
        draw()
    assert draw() == expected
