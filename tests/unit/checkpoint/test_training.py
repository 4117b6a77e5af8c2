"""Checkpoints of a run: bit-identical, complete or not there, the newest found."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskformer.checkpoint import find_last_checkpoint, load_checkpoint, restore_model, save_checkpoint, training
from maskformer.errors import UserError


@dataclasses.dataclass
class Metadata:
    classes: list[str]
    colors: list[tuple[int, int, int]]


class Run:
    """A tiny training run with everything that a checkpoint holds."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            scale = random.random() + float(np.random.rand())
            (self.model(torch.randn(5, 3)).square().mean() * scale).backward()
            self.optimizer.step()
            self.scheduler.step()

    def save(self, folder: Path, iteration: int, **options: Any) -> Path:
        rng = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        return save_checkpoint(
            folder,
            iteration,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            rng=[rng],
            position=5 * iteration,
            config_text="SEED: 1\n",
            metadata=Metadata(["wall"], [(1, 2, 3)]),
            versions={"torch": torch.__version__},
            **options,
        )

    def resume(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        restore_model(self.model, checkpoint, path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        rng = checkpoint["rng"][0]
        random.setstate(rng["python"])
        name, keys, *rest = rng["numpy"]
        np.random.set_state((name, keys.numpy(), *rest))
        torch.set_rng_state(rng["torch"])


def same(one: Any, other: Any) -> bool:
    """Bit-identical, through containers."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    first = Run()
    first.train(3)
    path = first.save(tmp_path, 2)
    assert path == tmp_path / "model_0000002.pth"
    first.train(4)
    second = Run()
    second.train(1)
    second.resume(path)
    second.train(4)
    assert same(first.model.state_dict(), second.model.state_dict())
    assert same(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert same(first.scheduler.state_dict(), second.scheduler.state_dict())


def test_every_entry_comes_back(tmp_path: Path) -> None:
    run = Run()
    run.train(2)
    checkpoint = load_checkpoint(run.save(tmp_path, 1, extra={"best": np.float64(0.5), "where": tmp_path}))
    assert tuple(checkpoint) == training.KEYS
    assert same(checkpoint["model"], dict(run.model.state_dict()))
    assert same(checkpoint["optimizer"], run.optimizer.state_dict())
    assert (checkpoint["iteration"], checkpoint["position"], checkpoint["scaler"]) == (1, 5, None)
    assert checkpoint["config"] == "SEED: 1\n"
    assert checkpoint["metadata"] == {"classes": ["wall"], "colors": [(1, 2, 3)]}
    assert checkpoint["extra"] == {"best": 0.5, "where": str(tmp_path)}


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot hold extra\.args\[1\], a Run"):
        save_checkpoint(tmp_path, 0, model={}, extra={"args": [1, Run()]})
    assert not list(tmp_path.iterdir())


def test_last_checkpoint_and_final_file(tmp_path: Path) -> None:
    run = Run()
    assert find_last_checkpoint(tmp_path) is None
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    first = run.save(tmp_path, 4)
    assert find_last_checkpoint(tmp_path) == first
    final = run.save(tmp_path, 9, name="model_final.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert find_last_checkpoint(tmp_path) == final
    assert load_checkpoint(final)["iteration"] == 9


@pytest.mark.parametrize("pointer", [None, "", "model_0000099.pth", "model_0000030.pth"])
def test_newest_readable_file_where_the_pointer_does_not_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pointer: str | None
) -> None:
    run = Run()
    for iteration in (9, 10, 20):
        run.save(tmp_path, iteration)
    (tmp_path / "model_0000030.pth").write_bytes((tmp_path / "model_0000020.pth").read_bytes()[:3000])
    (tmp_path / "model_weights.pth").write_bytes(pickle.dumps({}))
    if pointer is None:
        (tmp_path / "last_checkpoint").unlink()
    else:
        (tmp_path / "last_checkpoint").write_text(pointer)
    with caplog.at_level(logging.WARNING):
        assert find_last_checkpoint(tmp_path) == tmp_path / "model_0000020.pth"
    assert "continuing from the newest readable checkpoint, model_0000020.pth" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    Run().save(tmp_path, 3).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        find_last_checkpoint(tmp_path)


def test_old_checkpoints_are_removed_only_after_a_successful_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> list[str]:
        return sorted(each.name for each in tmp_path.glob("model_*"))

    run = Run()
    for iteration in (9, 19, 29):
        run.save(tmp_path, iteration)
    (tmp_path / ".model_0000029.pth.77.tmp").write_bytes(b"left by a killed run")
    assert len(names()) == 3

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(UserError, match="No space left on device"):
            run.save(tmp_path, 39, keep_last=1)
    assert len(names()) == 3
    assert find_last_checkpoint(tmp_path) == tmp_path / "model_0000029.pth"
    run.save(tmp_path, 39, keep_last=2)
    assert names() == ["model_0000029.pth", "model_0000039.pth"]
    run.save(tmp_path, 39, keep_last=2, name="model_final.pth")
    assert names() == ["model_0000029.pth", "model_0000039.pth", "model_final.pth"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_write_that_stops_half_way_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    path = run.save(tmp_path, 1)
    before = path.read_bytes()

    def stop(_: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path, 1)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds weights but no state of a run: set MODEL\.WEIGHTS"):
        load_checkpoint(tmp_path / "a.pth")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(UserError, match="no state of a run"):
        load_checkpoint(tmp_path / "b.pkl")


def test_a_checkpoint_of_another_model_cannot_be_resumed(tmp_path: Path) -> None:
    run = Run()
    path = run.save(tmp_path, 1)
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    with pytest.raises(UserError, match=r"saved by another model \(8 tensors differ, such as 0\.bias\)"):
        restore_model(other, load_checkpoint(path), path)


def test_model_of_the_package(tmp_path: Path, small_model: Callable[..., nn.Module]) -> None:
    model = small_model()
    path = save_checkpoint(tmp_path, 0, model=model)
    checkpoint = load_checkpoint(path)
    assert all(name.startswith("network.") for name in checkpoint["model"])
    restore_model(small_model(), checkpoint, path)
