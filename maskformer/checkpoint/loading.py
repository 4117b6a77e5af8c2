"""Filling a model with the weights of a file, and saying exactly what was filled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from maskformer.checkpoint import layouts
from maskformer.checkpoint.files import WeightFile
from maskformer.checkpoint.huggingface import join_projections, our_names
from maskformer.checkpoint.mismatch import likely_key, likely_keys_of_part
from maskformer.checkpoint.resizing import as_map, can_resize, resize_table
from maskformer.checkpoint.sources import open_weights
from maskformer.errors import UserError

ENOUGH = 0.9
_NAMES_SHOWN = 4
_NAME_OTHERS = "name weights that were trained with this config"
_CLASS_LAYERS = ("network.head.class_head.", "network.head.classifier.")
_QUERIES = "network.head.query_positions.weight"
# The first convolutions of a ResNet, with either stem, and of a Swin.
_STEM = re.compile(r"network\.backbone\.(body\.conv1(\.[036])?|patch_embed\.proj)\.weight")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadingReport:
    """What `load_weights` did.

    Attributes:
        path: the file (or folder, or address) that was read.
        family: the kind of file, as `layouts.Family.title`.
        loaded: our names that now hold the file's values.
        missing: our names, in parts of the model that the file is for, that it lacks; they keep their initial values.
        unexpected: the file's names that the model has no place for.
        reshaped: our names of tensors whose shape differs: shape in the file, shape in the model. They keep their
            initial values (class layers of another number of classes), unless they are `resized`.
        resized: our names, among `reshaped`, of Swin's position tables, which hold the file's values interpolated.
        ignored: the file's names of calculated values, known to be of no use.
        parts: for each part of the model how many of its tensors were filled, and how many it has.
        not_finite: our names that were filled with values that are not all finite.
        differences: our names, among `reshaped`: what differs, in words.
    """

    path: Path | str
    family: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines: what the weights filled, part by part, and what they did not."""
        lines = [f"weights: {self.path} ({self.family})"]
        for part, (filled, total) in self.parts.items():
            rest = "" if filled else ", stays as initialised"
            lines.append(f"  {part}: {filled} of {total} tensors filled{rest}")
        for name, (in_file, in_model) in self.reshaped.items():
            if name not in self.resized:
                why = self.differences.get(name, "shapes differ")
                lines.append(f"  initialised anew, {why}: {name} {in_model} (file: {in_file})")
        if self.resized:
            first = self.resized[0]
            in_file, in_model = self.reshaped[first]
            others = f" and {len(self.resized) - 1} more" if len(self.resized) > 1 else ""
            lines.append(f"  position tables resized: {first} {in_model} (file: {in_file}){others}")
        for title, names in (
            ("not in the file, stay as initialised", self.missing),
            ("in the file but not in the model", self.unexpected),
            ("WARNING, values that are not finite", self.not_finite),
        ):
            if names:
                lines.append(f"  {title}: {len(names)} ({_some(names)})")
        return "\n".join(lines)


def read_state_dict(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file under the file's own names, on the CPU.

    Args:
        source: anything that `sources.open_weights` reads.

    Raises:
        UserError: the file cannot be had, is damaged or holds more than numbers.
    """
    return open_weights(source).tensors


def load_weights(model: nn.Module, path: str | Path, *, strict: bool = False, min_fit: float = ENOUGH) -> LoadingReport:
    """Fills a model with the weights of a file, of any family in `layouts.FAMILIES`.

    Nothing is copied before everything has been checked. A layer whose size follows the number of classes keeps its
    initial values where that number differs, Swin's position tables are resized where window or image size differs, and
    the report says so.

    Args:
        model: a meta-architecture, its weights under ``network.``.
        path: anything that `sources.open_weights` reads: path, folder, ``https://``, ``detectron2://``, ``hf://``,
            ``timm://``.
        strict: refuse a file that leaves anything of the model as initialised, has anything left over, holds values
            that are not finite, or whose position tables do not fit as they are: what evaluation and prediction want.
        min_fit: refuse a file of which less than this share of a part fits the model, or of which less of the model's
            part is filled. 0 takes whatever fits, also where shapes differ (``MODEL.WEIGHTS_MIN_FIT``).

    Raises:
        UserError: the file cannot be read, does not belong to this model, or (`strict`) does not fill it completely.
    """
    file = open_weights(path, model)
    targets = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(layouts.OURS)}
    report, values = check_weights(file, targets, strict=strict, min_fit=min_fit)
    with torch.no_grad():
        for name, tensor in values.items():
            targets[name].copy_(resize_table(name, as_map(name, tensor), tuple(targets[name].shape)))
    return report


def check_weights(
    file: WeightFile, targets: Mapping[str, Tensor], *, strict: bool = False, min_fit: float = ENOUGH
) -> tuple[LoadingReport, dict[str, Tensor]]:
    """What `load_weights` copies, and how it refuses a file; nothing is copied here.

    Args:
        file: what was read.
        targets: tensors of the model under our names. One that has none, of another's module, is found by its own.
        strict: see `load_weights`.
        min_fit: see `load_weights`.

    Returns:
        The report, and the file's tensors under our names, position tables not resized yet.

    Raises:
        UserError: the file does not belong to this model, or (`strict`) does not fill it completely.
    """
    file, family, full_names = _recognise(file, targets)
    sources, report = _assign(file, family, full_names, targets)
    _check_numbers(file, (name for ours, name in sources.items() if targets[ours].is_floating_point()))
    different = _sort_shapes(file, sources, targets, report)
    _check_parts(file, family, full_names, sources, targets, report, min_fit, strict)
    if min_fit > 0:
        _check_stem(file, sources, targets)
    if different and (min_fit > 0 or strict):
        raise UserError(_bad_shapes(file, different, sources, targets))
    values = {name: file.tensors[sources[name]] for name in (*report.loaded, *report.resized)}
    for name, tensor in values.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            report.not_finite.append(name)
    if strict:
        refuse_incomplete(report)
    return report, values


def _recognise(file: WeightFile, targets: Mapping[str, Tensor]) -> tuple[WeightFile, layouts.Family, Mapping[str, str]]:
    """What kind of file it is, with its tensors as we divide them, and each one's published name or ours."""
    family = layouts.find_family(file.tensors)
    if family is layouts.HUGGING_FACE:
        # Before the parts of a tensor are joined, which would give them one type.
        _check_numbers(file, (name for name in file.tensors if not family.ignored.fullmatch(name)))
        file = replace(file, tensors=join_projections(file.tensors))
        return file, family, our_names(file.tensors)
    if family is not None:
        return file, family, {name: family.full_name(name) for name in file.tensors}
    if not file.matching_heuristics:
        known = ", ".join(each.title for each in layouts.FAMILIES)
        raise UserError(f"{file.path}: names such as {_some(list(file.tensors))} are of no known family ({known})")
    kind = layouts.backbone_kind(targets)
    published = (layouts.to_published(name, kind) for name in targets if not _is_counter(name))
    by_suffix = layouts.match_by_suffix([name for name in published if name], file.tensors)
    return file, layouts.HEURISTICS, {name: by_suffix.get(name, name) for name in file.tensors}


def _assign(
    file: WeightFile, family: layouts.Family, full_names: Mapping[str, str], targets: Mapping[str, Tensor]
) -> tuple[dict[str, str], LoadingReport]:
    """Which name of the file goes to which of the model: our name → file name."""
    kind = layouts.backbone_kind(targets)
    report = LoadingReport(file.path, family.title)
    sources: dict[str, str] = {}
    for name in file.tensors:
        if family.ignored.fullmatch(name):
            report.ignored.append(name)
            continue
        full = full_names[name]
        ours = full if full.startswith(layouts.OURS) or full in targets else layouts.to_ours(full, kind)
        if ours is None or ours not in targets:
            report.unexpected.append(name)
        elif ours in sources:
            raise UserError(f"{file.path} holds {ours} twice, as {sources[ours]} and {name}: remove one of them")
        else:
            sources[ours] = name
    return sources, report


def _is_counter(name: str) -> bool:
    """Batch norm counts its batches; published files have no such entry, and frozen norms do not use it."""
    return name.endswith(".num_batches_tracked")


def _sort_shapes(
    file: WeightFile, sources: Mapping[str, str], targets: Mapping[str, Tensor], report: LoadingReport
) -> list[str]:
    """Shapes agree, or differ by the number of classes or positions only; our names of all others are returned."""
    shapes = {ours: tuple(as_map(ours, file.tensors[name]).shape) for ours, name in sources.items()}
    different: list[str] = []
    for ours in targets:
        if ours not in sources:
            continue
        if shapes[ours] == tuple(targets[ours].shape):
            report.loaded.append(ours)
            continue
        report.reshaped[ours] = (shapes[ours], tuple(targets[ours].shape))
        if can_resize(ours, *report.reshaped[ours]):
            report.resized.append(ours)
        elif _follows_classes(ours, shapes, targets):
            report.differences[ours] = "classes differ"
        else:
            different.append(ours)
            rows_only = shapes[ours][1:] == tuple(targets[ours].shape)[1:]
            report.differences[ours] = (
                "numbers of queries differ" if ours == _QUERIES and rows_only else "shapes differ"
            )
    return different


def _follows_classes(name: str, shapes: Mapping[str, Shape], targets: Mapping[str, Tensor]) -> bool:
    """Whether only the number of rows differs, and rows are classes.

    Query positions have a row per class where there is no class layer (per-pixel+), and with fixed matching, which
    shows in one row less than the class layer's, on both sides.
    """
    shape, expected = shapes[name], tuple(targets[name].shape)
    if len(shape) != len(expected) or shape[1:] != expected[1:]:
        return False
    if name.startswith(_CLASS_LAYERS):
        return True
    if name != _QUERIES:
        return False
    class_layer = next((ours for ours in targets if ours.startswith(_CLASS_LAYERS)), None)
    if class_layer is None:
        return True
    classes = shapes.get(class_layer, (0,))[0] - 1
    return classes == shape[0] and targets[class_layer].shape[0] - 1 == expected[0]


def _check_parts(
    file: WeightFile,
    family: layouts.Family,
    full_names: Mapping[str, str],
    sources: Mapping[str, str],
    targets: Mapping[str, Tensor],
    report: LoadingReport,
    min_fit: float,
    strict: bool,
) -> None:
    """Counts what each part got, and refuses a file that fits a part badly."""
    places = {part: [name for name in targets if layouts.part_of(name) == part] for part in layouts.PARTS}
    leftover: dict[str | None, list[str]] = {}
    for name in report.unexpected:
        full = full_names[name]
        if not layouts.is_of_absent_stage(full, targets):
            leftover.setdefault(layouts.part_of(full), []).append(name)
    if not sources:
        raise UserError(
            f"{file.path} ({family.title}) holds nothing that fits this model, only names such as "
            f"{_some(report.unexpected or report.ignored)}: check MODEL.BACKBONE.NAME and MODEL.WEIGHTS"
        )
    for part, names in places.items():
        wanted = [name for name in names if not _is_counter(name)]
        filled = [name for name in wanted if name in sources]
        kept = [name for name in filled if name not in report.reshaped or name in report.resized]
        report.parts[part] = (len(kept), len(wanted))
        extra = leftover.get(part, [])
        if not filled and not extra:
            if not family.backbone_only:
                report.missing.extend(wanted)
            continue
        absent = [name for name in wanted if name not in sources]
        if len(filled) < min_fit * len(wanted) or len(filled) < min_fit * (len(filled) + len(extra)):
            last = _NAME_OTHERS if strict else "lower MODEL.WEIGHTS_MIN_FIT to train from what fits"
            raise UserError(f"{_bad_fit(file, part, len(filled), absent, extra)}, or {last}")
        report.missing.extend(absent)


def _check_stem(file: WeightFile, sources: Mapping[str, str], targets: Mapping[str, Tensor]) -> None:
    """Refuse a file with a backbone but without its first convolutions: a backbone that begins otherwise."""
    lacking = [name for name in targets if _STEM.fullmatch(name) and name not in sources]
    if lacking and any(name.startswith("network.backbone.") for name in sources):
        raise UserError(
            f"{file.path} is for another backbone: it lacks the first convolution, {_some(lacking)}: "
            f"check MODEL.RESNETS.STEM_TYPE and MODEL.BACKBONE.NAME"
        )


def _check_numbers(file: WeightFile, names: Iterable[str]) -> None:
    """Refuse tensors that cannot be copied into floating parameters without a change of meaning."""
    for name in names:
        tensor = file.tensors[name]
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            form = "without values" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise UserError(
                f"{file.path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, {form}, where weights are dense "
                f"floating-point numbers: have its source save them as float32"
            )


def _bad_shapes(
    file: WeightFile, different: list[str], sources: Mapping[str, str], targets: Mapping[str, Tensor]
) -> str:
    first = different[0]
    shape, expected = tuple(file.tensors[sources[first]].shape), tuple(targets[first].shape)
    others = f" and {len(different) - 1} more differ" if len(different) > 1 else ""
    return (
        f"{file.path}: {sources[first]} has shape {shape} but the model's is {expected}{others}: "
        f"check {likely_key(first, shape, expected)}"
    )


def _bad_fit(file: WeightFile, part: str, filled: int, absent: list[str], extra: list[str]) -> str:
    lacking = f"the file lacks {len(absent)} ({_some(absent)})" if absent else ""
    surplus = f"the model lacks {len(extra)} ({_some(extra)})" if extra else ""
    reasons = " and ".join(reason for reason in (lacking, surplus) if reason)
    return (
        f"{file.path} is for another {part}: only {filled} tensors fit, {reasons}: "
        f"check {likely_keys_of_part(part, absent, extra)}"
    )


def refuse_incomplete(report: LoadingReport) -> None:
    """Refuse weights that leave a part of a model as initialised, or have something left over: what `strict` means.

    Raises:
        UserError: saying what.
    """
    problems = (
        (
            "the file has nothing for the",
            [part for part, (filled, total) in report.parts.items() if total and not filled],
        ),
        ("the file lacks", report.missing),
        ("the model lacks", report.unexpected),
        ("the number of classes differs in", [name for name in report.reshaped if name not in report.resized]),
        ("MODEL.SWIN.WINDOW_SIZE or PRETRAIN_IMG_SIZE differs in", report.resized),
        ("values are not finite in", report.not_finite),
    )
    reasons = " and ".join(f"{title} {_some(names)}" for title, names in problems if names)
    if reasons:
        raise UserError(f"{report.path} does not fill this model completely, {reasons}: {_NAME_OTHERS}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (", …" if len(names) > _NAMES_SHOWN else "")
