"""Devices, seeds and generator states."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from maskformer.engine.device import (
    choose_device,
    describe_device,
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


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_one_gpu_contradicts_a_device_that_is_none(name: str) -> None:
    with pytest.raises(UserError, match=rf"--num-gpus 1 asks for a GPU but MODEL.DEVICE is '{name}'; drop one"):
        choose_device(name, 1)


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
