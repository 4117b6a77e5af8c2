"""The loop on a model whose weights can be computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from maskformer.engine.trainer import Hook, Precision, Trainer
from maskformer.errors import UserError
from tests.unit.engine.fakes import Batches, Slope, make_trainer


class Recorder(Hook):
    def __init__(self) -> None:
        self.events: list[str] = []

    def before_train(self, trainer: Trainer) -> None:
        self.events.append("before")

    def after_step(self, trainer: Trainer) -> None:
        self.events.append(f"step {trainer.iteration}")

    def after_train(self, trainer: Trainer) -> None:
        self.events.append("after")

    def close(self) -> None:
        self.events.append("close")


def test_steps_follow_gradient_and_schedule() -> None:
    trainer = make_trainer(max_iterations=2)
    trainer.train()
    # d/dw (w - 1)² = 2(w - 1): 0 + 0.25·2 = 0.5, then 0.5 + 0.125·1 = 0.625.
    assert trainer.model.weight.item() == pytest.approx(0.625)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0625)
    assert trainer.batches.position == 2
    assert trainer.is_last


def test_hooks_are_called_at_their_moments() -> None:
    recorder = Recorder()
    make_trainer(max_iterations=5, start_iteration=3).train([recorder])
    assert recorder.events == ["before", "step 3", "step 4", "after", "close"]


def test_hooks_are_closed_but_not_finished_after_an_error() -> None:
    recorder = Recorder()
    with pytest.raises(UserError):
        make_trainer(values=[1.0, math.nan]).train([recorder])
    assert recorder.events == ["before", "step 0", "close"]


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights() -> None:
    trainer = make_trainer(values=[1.0, math.inf])
    with pytest.raises(
        UserError, match=r"iteration 1, because loss_a = inf, loss_b = inf on the images 2a.png, 2b.png"
    ):
        trainer.train()
    assert trainer.model.weight.item() == pytest.approx(0.5)


def test_micro_batches_of_a_step_share_normalisers() -> None:
    whole, halves = make_trainer(), make_trainer()
    samples = [sample for batch in (next(Batches([1.0])), next(Batches([4.0]))) for sample in batch]
    one = whole.backward([samples])
    two = halves.backward([samples[:3], samples[3:]])
    assert whole.model.weight.grad.item() == pytest.approx(halves.model.weight.grad.item())
    assert {name: loss.item() for name, loss in one.items()} == pytest.approx({n: v.item() for n, v in two.items()})


def test_clipping_sees_all_parameters() -> None:
    trainer = make_trainer(max_iterations=1, clip=lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.1))
    trainer.train()
    assert trainer.model.weight.item() == pytest.approx(0.025)


def test_precision_on_the_cpu_is_bfloat16_without_scaler() -> None:
    precision = Precision(torch.device("cpu"), enabled=True)
    with precision.autocast():
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype is torch.bfloat16
    assert not precision.scaler.is_enabled()
    assert str(precision) == "mixed bfloat16"
    make_trainer(precision=precision).train()


def test_the_loop_trains_in_training_mode() -> None:
    trainer = make_trainer(max_iterations=1)
    trainer.model.eval()
    trainer.train()
    assert isinstance(trainer.model, Slope)
    assert trainer.model.training
