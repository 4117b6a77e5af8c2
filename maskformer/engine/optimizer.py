"""From config to optimizer: which learning rate and weight decay each parameter gets, and how gradients are clipped."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maskformer.checkpoint import layouts
from maskformer.errors import UserError

Clipper = Callable[[Sequence[nn.Parameter]], Tensor | None]

# Every norm with trainable parameters: `_NormBase` covers batch, synchronised and instance norms.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


class ParameterRule(NamedTuple):
    """What one parameter trains with.

    Attributes:
        name: full name in the model.
        parameter: the parameter itself.
        lr: base learning rate, before the schedule.
        weight_decay: AdamW's or SGD's weight decay.
        region: ``backbone`` or ``head``, and what `LearningRateMultipliers` apply; for reading the log.
    """

    name: str
    parameter: nn.Parameter
    lr: float
    weight_decay: float
    region: str


class LearningRateMultipliers:
    """Factors on the learning rates of parts of a model (``SOLVER.LR_MULTIPLIERS``).

    A part is one or more whole components of a parameter's name that follow each other: ``pixel_decoder`` and
    ``head.transformer.decoder`` are parts of all names that contain them. Published names mean the same:
    ``sem_seg_head.predictor.query_embed`` or ``query_embed`` for ``network.head.query_positions``. Factors of several
    parts that a parameter belongs to multiply. With a factor of 0 a parameter stays as it is, weight decay included,
    since that is scaled by the learning rate.

    Args:
        model: its trainable parameters must have every part.
        multipliers: pairs of a part and a factor of 0 or more.

    Raises:
        UserError: if there is no trainable parameter of a part.
    """

    def __init__(self, model: nn.Module, multipliers: Iterable[Sequence[Any]]) -> None:
        self.multipliers = [(str(part), float(factor)) for part, factor in multipliers]
        if not self.multipliers:
            return
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.kind = layouts.backbone_kind(parameters)
        trained = {known for name, p in parameters.items() if p.requires_grad for known in self._names(name)}
        frozen = {known for name, p in parameters.items() if not p.requires_grad for known in self._names(name)}
        for part, _ in self.multipliers:
            if any(_is_part(part, name) for name in trained):
                continue
            if any(_is_part(part, name) for name in frozen):
                reason = "is not trained: take the pair out, or lower MODEL.BACKBONE.FREEZE_AT"
            else:
                reason = f"is no part of the model: {_nearest_parts(part, trained)}"
            raise UserError(f"SOLVER.LR_MULTIPLIERS names {part!r}, which {reason}")

    def of(self, name: str) -> list[tuple[str, float]]:
        """The parts that the parameter `name` belongs to, and their factors."""
        return [pair for pair in self.multipliers if any(_is_part(pair[0], known) for known in self._names(name))]

    def _names(self, name: str) -> list[str]:
        """Our name of a parameter, and the published one where there is one."""
        published = layouts.to_published(name, self.kind)
        return [name] if published is None else [name, published]


def _is_part(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def _nearest_parts(part: str, names: Iterable[str]) -> str:
    """A hint for someone who misspelt a part."""
    known: dict[str, None] = {}
    for name in sorted(names):
        steps = name.removeprefix(layouts.OURS).split(".")
        known.update(dict.fromkeys(".".join(steps[:i]) for i in range(1, len(steps) + 1)))
        known.update(dict.fromkeys(step for step in steps if not step.isdigit()))
    nearest = difflib.get_close_matches(part, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(nearest)}?" if nearest else "name it as model.named_parameters() does"


def parameter_rules(
    model: nn.Module,
    *,
    base_lr: float,
    backbone_multiplier: float,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_embed: float,
    lr_multipliers: Iterable[Sequence[Any]] = (),
) -> Iterator[ParameterRule]:
    """Learning rate and weight decay of every trainable parameter; of the rules for decay the later one wins.

    `weight_decay` (biases included) → 0 for Swin's position tables → `weight_decay_norm` for the parameters of norms →
    `weight_decay_embed` for `nn.Embedding`. A shared parameter appears once, under its first name.
    """
    multipliers = LearningRateMultipliers(model, lr_multipliers)
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = weight_decay
            if any(table in own_name for table in POSITION_TABLES):
                decay = 0.0
            if isinstance(module, NORMS):
                decay = weight_decay_norm
            if isinstance(module, nn.Embedding):
                decay = weight_decay_embed
            in_backbone = "backbone" in module_name.split(".")
            name = f"{module_name}.{own_name}" if module_name else own_name
            lr = base_lr * backbone_multiplier if in_backbone else base_lr
            region = "backbone" if in_backbone else "head"
            if parts := multipliers.of(name):
                lr *= math.prod(factor for _, factor in parts)
                region += f" ({' '.join(f'{part} x{factor:g}' for part, factor in parts)})"
            yield ParameterRule(name, parameter, lr, decay, region)


def parameter_groups(rules: Iterator[ParameterRule]) -> list[dict[str, Any]]:
    """Optimizer groups, one per (lr, weight decay), in order of first appearance.

    Parameters are given with their names, which the optimizer keeps as ``param_names``: a resumed run finds each
    parameter's state by name, whatever the grouping of its config is; ``group_name`` is for the log.
    """
    merged: dict[tuple[float, float], list[ParameterRule]] = {}
    for rule in rules:
        merged.setdefault((rule.lr, rule.weight_decay), []).append(rule)
    groups = []
    for (lr, decay), members in merged.items():
        regions = "+".join(dict.fromkeys(member.region for member in members))
        groups.append(
            {
                "params": [(member.name, member.parameter) for member in members],
                "group_name": f"{regions}, decay {decay:g}",
                "lr": lr,
                "weight_decay": decay,
            }
        )
    return groups


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) or SGD with momentum, as ``SOLVER.OPTIMIZER`` says.

    Raises:
        UserError: for another optimizer, a model without trainable parameters, or multipliers of a part it has not.
    """
    solver = cfg.SOLVER
    rules = parameter_rules(
        model,
        base_lr=solver.BASE_LR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
        lr_multipliers=solver.LR_MULTIPLIERS,
    )
    groups = parameter_groups(rules)
    if not groups:
        raise UserError("The model has no trainable parameters, so there is nothing to train")
    # The fused kernels update a group in one pass and let the gradient scaler's flag stay on the device.
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, fused=True
        )
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, which is not known; use ADAMW or SGD")


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give each parameter the saved state (moments, step) that was kept under its name.

    Learning rates and decays stay those of the present config: a resumed run follows the config it was started with.

    Args:
        optimizer: made by `build_optimizer`.
        saved: `state_dict()` of such an optimizer.

    Raises:
        UserError: if the saved state is of other parameters or of another kind of optimizer.
    """
    index_of: dict[str, int] = {}
    for group in saved["param_groups"]:
        index_of.update(zip(group["param_names"], group["params"], strict=True))
    current = optimizer.state_dict()
    names = {
        name: index
        for group in current["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    differing = sorted(names.keys() ^ index_of.keys())
    if differing:
        raise UserError(
            f"The checkpoint's optimizer and this config train different parameters ({len(differing)}, for example "
            f"{differing[0]}); resume with the config of that run, or start anew from its weights with MODEL.WEIGHTS"
        )
    current["state"] = {names[name]: saved["state"][i] for name, i in index_of.items() if i in saved["state"]}
    expected = {"SGD": "momentum_buffer", "AdamW": "exp_avg"}[type(optimizer).__name__]
    if any(expected not in state for state in current["state"].values()):
        raise UserError(
            f"The checkpoint was trained with another optimizer than {type(optimizer).__name__}; "
            "set SOLVER.OPTIMIZER to that run's, or start anew from its weights with MODEL.WEIGHTS"
        )
    optimizer.load_state_dict(current)


def build_clipper(cfg: Any) -> Clipper | None:
    """Gradient clipping as ``SOLVER.CLIP_GRADIENTS`` says; None if it is off.

    ``full_model`` clips the L2 norm of all gradients together, ``norm`` each parameter's own norm, ``value`` each
    number. The returned function takes the parameters, clips in place without a host synchronisation and returns the
    total norm before clipping (0-d) where it is known.

    Raises:
        UserError: for another type, or a clip value that is not positive.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return None
    value = float(clip.CLIP_VALUE)
    if value <= 0:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE is {value:g}, which would stop all training; "
            "give a positive value, or set SOLVER.CLIP_GRADIENTS.ENABLED to False"
        )
    if clip.CLIP_TYPE == "full_model":
        return lambda parameters: nn.utils.clip_grad_norm_(parameters, value)
    if clip.CLIP_TYPE == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, value)
    if clip.CLIP_TYPE == "norm":
        return lambda parameters: clip_each_norm(parameters, value, float(clip.NORM_TYPE))
    raise UserError(
        f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}, which is not known; use full_model, norm or value"
    )


def clip_each_norm(parameters: Sequence[nn.Parameter], value: float, norm_type: float) -> None:
    """Scale each parameter's gradient whose own norm is above `value` down to it."""
    for parameter in parameters:
        nn.utils.clip_grad_norm_([parameter], value, norm_type)
