"""Parameter groups, clipping, and optimizer state found again by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from maskformer.engine.optimizer import build_clipper, build_optimizer, load_optimizer_state
from maskformer.errors import UserError
from maskformer.modeling.backbones import make_resnet


def config(**solver: Any) -> SimpleNamespace:
    defaults = {
        "OPTIMIZER": "ADAMW",
        "BASE_LR": 1e-3,
        "BACKBONE_MULTIPLIER": 0.1,
        "WEIGHT_DECAY": 0.05,
        "WEIGHT_DECAY_NORM": 0.0,
        "WEIGHT_DECAY_EMBED": 0.01,
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "LR_MULTIPLIERS": [],
    }
    return SimpleNamespace(SOLVER=SimpleNamespace(**{**defaults, **solver}))


def clip_config(kind: str, value: float, enabled: bool = True) -> SimpleNamespace:
    clip = SimpleNamespace(ENABLED=enabled, CLIP_TYPE=kind, CLIP_VALUE=value, NORM_TYPE=2.0)
    return SimpleNamespace(SOLVER=SimpleNamespace(CLIP_GRADIENTS=clip))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(4))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(4))


class Tiny(nn.Module):
    """One parameter or more for every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), Table())
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm2d(4))
        self.queries = nn.Embedding(5, 4)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.shared = self.head[0]


def rules_by_name(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    return {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }


def test_each_parameter_gets_its_rule() -> None:
    rules = rules_by_name(build_optimizer(config(), Tiny()))
    assert rules == {
        "backbone.0.weight": (1e-4, 0.05),
        "backbone.0.bias": (1e-4, 0.05),
        "backbone.1.weight": (1e-4, 0.0),
        "backbone.1.bias": (1e-4, 0.0),
        "backbone.2.relative_position_bias_table": (1e-4, 0.0),
        "backbone.2.absolute_pos_embed": (1e-4, 0.0),
        "head.0.weight": (1e-3, 0.05),
        "head.0.bias": (1e-3, 0.05),
        "head.1.weight": (1e-3, 0.0),
        "head.1.bias": (1e-3, 0.0),
        "head.2.weight": (1e-3, 0.0),
        "head.2.bias": (1e-3, 0.0),
        "queries.weight": (1e-3, 0.01),
    }


def test_groups_are_merged_by_equal_settings_and_named() -> None:
    groups = build_optimizer(config(BACKBONE_MULTIPLIER=1.0, WEIGHT_DECAY_EMBED=0.0), Tiny()).param_groups
    assert [(group["group_name"], len(group["params"])) for group in groups] == [
        ("backbone+head, decay 0.05", 4),
        ("backbone+head, decay 0", 9),
    ]


def test_adamw_and_sgd_settings() -> None:
    adamw = build_optimizer(config(), Tiny())
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.999)
    assert adamw.defaults["eps"] == 1e-8
    sgd = build_optimizer(config(OPTIMIZER="SGD"), Tiny())
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.9


def test_unknown_optimizer_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(UserError, match=r"SOLVER.OPTIMIZER is 'LION'"):
        build_optimizer(config(OPTIMIZER="LION"), Tiny())
    with pytest.raises(UserError, match="no trainable parameters"):
        build_optimizer(config(), Tiny().requires_grad_(False))


# ---------------------------------------------------------------- multipliers
class Named(nn.Module):
    """Names as in a model with a Swin backbone; the ends of two are the beginnings of others."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.backbone = nn.ModuleDict(
            {"patch_embed": nn.ModuleDict({"proj": nn.Linear(2, 2)}), "layers": nn.ModuleList([nn.Linear(2, 2)])}
        )
        self.network.pixel_decoder = nn.ModuleDict({"embedding": nn.Linear(2, 2), "embedding_2": nn.Linear(2, 2)})
        self.network.head = nn.ModuleDict({"query_positions": nn.Embedding(2, 2), "class_head": nn.Linear(2, 2)})


def factors(multipliers: list[list[Any]], **solver: Any) -> dict[str, float]:
    """Names whose learning rate is not the base rate, without ``network.`` and kind of parameter, and its factor."""
    optimizer = build_optimizer(config(BASE_LR=1.0, **solver, LR_MULTIPLIERS=multipliers), Named())
    found = {name.removeprefix("network."): lr for name, (lr, _) in rules_by_name(optimizer).items()}
    return {name.removesuffix(".weight"): lr for name, lr in found.items() if lr != 1.0 and name.endswith(".weight")}


ALL_BACKBONE = {"backbone.patch_embed.proj": 0.1, "backbone.layers.0": 0.1}


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("pixel_decoder", {"pixel_decoder.embedding", "pixel_decoder.embedding_2"}),
        ("network.pixel_decoder.embedding", {"pixel_decoder.embedding"}),
        ("embedding", {"pixel_decoder.embedding"}),
        ("pixel_decoder.embedding.weight", {"pixel_decoder.embedding"}),
        ("query_positions", {"head.query_positions"}),
        # published names
        ("sem_seg_head.pixel_decoder.mask_features", {"pixel_decoder.embedding"}),
        ("query_embed", {"head.query_positions"}),
        ("predictor.query_embed", {"head.query_positions"}),
        ("sem_seg_head.predictor", {"head.query_positions", "head.class_head"}),
    ],
)
def test_a_part_is_whole_components_of_a_name_ours_or_published(part: str, names: set[str]) -> None:
    assert factors([[part, 0.5]]) == {**ALL_BACKBONE, **dict.fromkeys(names, 0.5)}


def test_factors_multiply_also_with_the_backbones() -> None:
    found = factors([["backbone.layers", 0.5], ["layers.0", 0.5], ["head", 0], ["class_head", 3]])
    assert found == pytest.approx(
        {"backbone.patch_embed.proj": 0.1, "backbone.layers.0": 0.025, "head.query_positions": 0, "head.class_head": 0}
    )


def test_published_names_of_resnet_stages_are_parts_too() -> None:
    model = nn.Module()
    model.network = nn.ModuleDict({"backbone": make_resnet(depth=18)})
    rules = rules_by_name(build_optimizer(config(LR_MULTIPLIERS=[["res5", 2.0]]), model))
    assert {name.split(".")[3] for name, (lr, _) in rules.items() if lr == pytest.approx(2e-4)} == {"layer4"}


def test_factor_zero_changes_nothing_and_the_log_tells_parts_apart() -> None:
    model = Named()
    optimizer = build_optimizer(config(LR_MULTIPLIERS=[["pixel_decoder", 0.5], ["query_embed", 0]]), model)
    assert [group["group_name"] for group in optimizer.param_groups] == [
        "backbone, decay 0.05",
        "head (pixel_decoder x0.5), decay 0.05",
        "head (query_embed x0), decay 0.01",
        "head, decay 0.05",
    ]
    before = model.network.head.query_positions.weight.clone()
    trained(model, optimizer)
    assert torch.equal(model.network.head.query_positions.weight, before)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("pixel_decodr", r"names 'pixel_decodr', which is no part of the model: did you mean pixel_decoder"),
        ("query_embd", r"did you mean query_embed"),
        ("sem_seg_head.pixel_decoder.mask_feature", r"did you mean sem_seg_head.pixel_decoder.mask_features"),
        ("pixel", r"'pixel', which is no part"),
        ("zzz", r"name it as model.named_parameters\(\) does"),
        ("backbone.patch_embed", r"is not trained: take the pair out, or lower MODEL.BACKBONE.FREEZE_AT"),
    ],
)
def test_parts_that_are_not_trained_are_refused(part: str, sentence: str) -> None:
    model = Named()
    model.network.backbone.patch_embed.requires_grad_(False)
    with pytest.raises(UserError, match=sentence) as caught:
        build_optimizer(config(LR_MULTIPLIERS=[[part, 0.5]]), model)
    assert str(caught.value).startswith("SOLVER.LR_MULTIPLIERS")
    assert "\n" not in str(caught.value)


def with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return [*parameters, nn.Parameter(torch.zeros(1))]  # the last took no part in the loss


def gradients_after(kind: str, value: float) -> list[list[float]]:
    clip = build_clipper(clip_config(kind, value))
    assert clip is not None
    parameters = with_gradients([3.0, 0.0], [0.0, -4.0])
    clip(parameters)
    return [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None]


def test_clipping_the_full_model_norm() -> None:
    assert gradients_after("full_model", 0.5) == [pytest.approx([0.3, 0.0]), pytest.approx([0.0, -0.4])]
    assert gradients_after("full_model", 10.0) == [[3.0, 0.0], [0.0, -4.0]]


def test_clipping_each_norm_and_each_value() -> None:
    assert gradients_after("norm", 3.5) == [[3.0, 0.0], pytest.approx([0.0, -3.5])]
    assert gradients_after("value", 2.0) == [[2.0, 0.0], [0.0, -2.0]]


def test_clipping_off_or_wrong() -> None:
    assert build_clipper(clip_config("full_model", 0.01, enabled=False)) is None
    with pytest.raises(UserError, match="CLIP_TYPE is 'norms'"):
        build_clipper(clip_config("norms", 0.01))
    with pytest.raises(UserError, match="CLIP_VALUE is 0"):
        build_clipper(clip_config("full_model", 0.0))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(number + 1))
    optimizer.step()


def test_state_is_found_by_name_under_another_grouping() -> None:
    model = Tiny()
    first = build_optimizer(config(), model)
    trained(model, first)
    second = build_optimizer(config(BACKBONE_MULTIPLIER=1.0, WEIGHT_DECAY_EMBED=0.05, BASE_LR=0.5), model)
    load_optimizer_state(second, first.state_dict())
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert torch.equal(first.state[parameter]["exp_avg"], second.state[parameter]["exp_avg"])
    assert {group["lr"] for group in second.param_groups} == {0.5}


def test_state_of_something_else_is_refused() -> None:
    model = Tiny()
    adamw = build_optimizer(config(), model)
    trained(model, adamw)
    with pytest.raises(UserError, match="another optimizer than SGD"):
        load_optimizer_state(build_optimizer(config(OPTIMIZER="SGD"), model), adamw.state_dict())
    with pytest.raises(UserError, match="different parameters"):
        load_optimizer_state(build_optimizer(config(), Tiny().head), adamw.state_dict())


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_fused_steps_are_right_in_channels_last_memory(name: str) -> None:
    """The fused kernels walk through memory, so parameter, gradient and moments must be laid out alike."""
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(4, 6, 3)
    plain.load_state_dict(model.state_dict())
    fused = build_optimizer(config(OPTIMIZER=name), model)
    kinds: dict[str, type[torch.optim.Optimizer]] = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    settings = {"momentum": 0.9} if name == "SGD" else {}
    reference = kinds[name](plain.parameters(), lr=1e-3, weight_decay=0.05, foreach=False, fused=False, **settings)
    for _ in range(3):
        images = torch.randn(2, 4, 8, 8)
        for module, optimizer in ((model, fused), (plain, reference)):
            optimizer.zero_grad()
            module(images).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)
