"""Gradient checkpointing: less is kept, everything else is equal."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

from maskformer.config import get_cfg
from maskformer.errors import UserError
from maskformer.modeling.backbones import (
    Backbone,
    SwinBackbone,
    build_backbone,
    make_resnet,
    make_timm_pyramid,
    recompute_activations,
)
from maskformer.modeling.backbones.recomputation import check_recomputation, find_blocks

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2), "window_size": 4}
MAKERS: dict[str, Callable[[], Backbone]] = {
    "resnet": lambda: make_resnet(depth=18, norm="BN"),
    "resnet, frozen norms": lambda: make_resnet(depth=18),
    "swin": lambda: SwinBackbone(**SWIN, drop_path_rate=0.5, drop_rate=0.1, attn_drop_rate=0.1),
    "convnext": lambda: make_timm_pyramid("convnext_atto"),
    "mobilenet": lambda: make_timm_pyramid("mobilenetv3_small_050"),
    "regnet": lambda: make_timm_pyramid("regnetx_002"),
}


def loss_of(backbone: nn.Module, images: Tensor) -> Tensor:
    return torch.stack([feature.float().square().mean() for feature in backbone(images).values()]).sum()


def kept_bytes(backbone: nn.Module, images: Tensor) -> int:
    """What a forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.data_ptr() for p in backbone.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(backbone, images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def outcome(backbone: nn.Module, images: Tensor, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients and buffers by name, of one step with the same random numbers."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(backbone, images)
    loss.backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return loss.detach(), {**gradients, **dict(backbone.named_buffers())}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_same_loss_gradients_and_statistics(name: str, autocast: bool) -> None:
    plain = MAKERS[name]()
    again = copy.deepcopy(plain)
    assert recompute_activations(again)
    images = torch.randn(2, 3, 64, 64)
    loss, expected = outcome(plain, images, autocast)
    again_loss, found = outcome(again, images, autocast)
    torch.testing.assert_close(again_loss, loss, rtol=0, atol=1e-6)
    assert list(found) == list(expected)
    for key, value in expected.items():  # buffers too: running statistics and counts of batches
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
    assert list(again.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("name", "share"), [("resnet", 0.6), ("swin", 0.25), ("mobilenet", 0.35), ("regnet", 0.25)])
def test_less_is_kept_for_the_backward_pass(name: str, share: float) -> None:
    backbone = MAKERS[name]()
    images = torch.randn(2, 3, 128, 128)
    before = kept_bytes(backbone, images)
    recompute_activations(backbone)
    assert kept_bytes(backbone, images) < share * before


def test_running_statistics_are_updated_once_per_step_also_as_a_cumulative_mean() -> None:
    backbone = make_resnet(depth=18, norm="BN")
    norm = backbone.body.layer1[0].bn1
    norm.momentum = None
    recompute_activations(backbone)
    buffers = dict(norm.named_buffers())
    inputs: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for steps in (1, 2):
        loss = loss_of(backbone, torch.randn(2, 3, 32, 32))
        loss.backward(retain_graph=True)
        loss.backward()
        assert len(inputs) == 3 * steps  # it does run again, for each backward pass
        assert norm.num_batches_tracked == steps
    assert all(buffer is buffers[name] for name, buffer in norm.named_buffers())
    mean = torch.stack([inputs[i].mean((0, 2, 3)) for i in (0, 3)]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)


def test_only_in_training_with_gradients_and_not_where_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def count(function: Any, *args: Any, **options: Any) -> Any:
        calls.append(function)
        return checkpoint.checkpoint(function, *args, **options)

    monkeypatch.setattr("maskformer.modeling.backbones.recomputation.checkpoint", count)
    backbone = make_resnet(depth=18)
    recompute_activations(backbone)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        backbone(images)
    backbone.eval()(images)
    assert calls == []
    backbone.train()(images)
    assert len(calls) == 8
    backbone.freeze(3)
    backbone(images)
    assert len(calls) == 8 + 4


def test_a_copy_runs_its_own_weights() -> None:
    backbone = make_resnet(depth=18)
    recompute_activations(backbone)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.body.layer1.parameters():
            parameter.zero_()
    loss_of(other, torch.randn(1, 3, 32, 32)).backward()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in backbone.parameters())


def test_data_parallel_needs_no_search_for_unused_parameters() -> None:
    plain = make_resnet(depth=18, norm="BN")
    again = copy.deepcopy(plain)
    recompute_activations(again)
    images = torch.randn(2, 3, 32, 32)
    _, expected = outcome(plain, images)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        _, found = outcome(DistributedDataParallel(again), images)
    finally:
        time.sleep(0.1)  # see maskformer.distributed.process_group
        distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], value)


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_a_compiler_can_trace_it(name: str) -> None:
    if name == "resnet" and TORCH < (2, 7):
        pytest.skip("compiled by PyTorch 2.6, recomputed batch norms update their statistics twice")
    plain = {
        "swin": lambda: SwinBackbone(**SWIN, drop_path_rate=0.0, out_features=["res2"]),
        "resnet": lambda: make_resnet(depth=18, norm="BN", out_features=["res2"]),
    }[name]()
    again = copy.deepcopy(plain)
    recompute_activations(again)
    images = torch.randn(2, 3, 32, 32)
    loss, expected = outcome(plain, images)
    again.compile(backend="aot_eager", fullgraph=True)
    again_loss, found = outcome(again, images)
    torch.testing.assert_close(again_loss, loss)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


# ---------------------------------------------------------------- which blocks, and which models cannot
def test_blocks() -> None:
    kinds = {name: [type(block).__name__ for block in find_blocks(make())] for name, make in MAKERS.items()}
    assert kinds["resnet"] == ["BasicBlock"] * 8
    assert kinds["swin"] == ["SwinBlock"] * 8
    assert kinds["convnext"] == ["ConvNeXtBlock"] * 12
    assert set(kinds["mobilenet"]) == {"DepthwiseSeparableConv", "InvertedResidual", "ConvBnAct"}
    assert kinds["regnet"] == ["ConvNormAct", *["RegStage"] * 4]


class Block(nn.Module):
    """A convolution and its square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, H, W) → (B, 4, H, W)."""
        return self.conv(x).square()


class Pyramid(nn.Module):
    """Blocks in a list; `run` calls each."""

    def __init__(self, run: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.run = run

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → res2 (B, 4, H, W)."""
        x = self.stem(images)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = self.run(block, x)
        return {"res2": x}


def changed_afterwards(block: Block, x: Tensor) -> Tensor:
    """The input of a block is overwritten before the backward pass."""
    kept = x.clone()
    y = block(kept)
    kept.data.mul_(2)  # what autograd does not see
    return y


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (changed_afterwards, "gradients change"),
        (lambda block, x: block.conv(x).square(), "saves nothing"),
    ],
)
def test_what_cannot_be_computed_again_is_found(run: Callable[[nn.Module, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_recomputation(Pyramid(run))


def test_the_check_leaves_no_trace() -> None:
    backbone = make_timm_pyramid("mobilenetv3_small_050")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    check_recomputation(backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def test_config(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["MODEL.BACKBONE.NAME", "timm", "MODEL.TIMM.NAME", "mobilenetv3_small_050"]
    cfg = get_cfg(None, [*keys, "MODEL.BACKBONE.GRADIENT_CHECKPOINTING", "True"])
    images = torch.randn(2, 3, 64, 64)
    assert kept_bytes(build_backbone(cfg), images) < 0.5 * kept_bytes(build_backbone(get_cfg(None, keys)), images)

    def fail(_: nn.Module) -> None:
        raise ValueError("its gradients change")

    monkeypatch.setattr("maskformer.modeling.backbones.build.check_recomputation", fail)
    sentence = (
        r"GRADIENT_CHECKPOINTING does not work with MODEL.TIMM.NAME 'mobilenetv3_small_050' \(its gradients change\)"
    )
    with pytest.raises(UserError, match=sentence):
        build_backbone(cfg)
