"""The published names of weights around our modules, and Detectron2's checkpointer for every weight file that we read.

The names come from `checkpoint.layouts`; here they are put on what Detectron2 saves and taken off what it loads.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from maskformer.checkpoint import hub, layouts
from maskformer.checkpoint.files import WeightFile, read_torch_file, read_weight_file, recognise
from maskformer.checkpoint.huggingface import join_projections, our_names
from maskformer.checkpoint.loading import ENOUGH, LoadingReport, check_weights, refuse_incomplete
from maskformer.checkpoint.resizing import as_map, can_resize, resize_table
from maskformer.checkpoint.sources import TIMM
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

BACKBONE = "backbone"
PIXEL_DECODER = "pixel_decoder"
HEAD = "head"
PUBLISHED_ROOTS = {
    BACKBONE: "backbone.",
    PIXEL_DECODER: "sem_seg_head.pixel_decoder.",
    HEAD: "sem_seg_head.predictor.",
}
_PUBLISHED = next(family for family in layouts.FAMILIES if family.title == "published MaskFormer")
_COUNTER = "num_batches_tracked"
_IN_PYRAMID = "backbone.bottom_up."
_FILE = "weight_file"


class PublishedPlace:
    """Stands in a model where the published one has a module: Detectron2 looks it up to report a tensor's other shape.

    The module itself has our name; this one holds nothing but further places.
    """


class PublishedNames:
    """Lets a module of ours appear in state dicts under the published names of one part of a model.

    Args:
        part: `BACKBONE`, `PIXEL_DECODER` or `HEAD`.
        inner: what its own names begin with before ours do, such as "native.".
    """

    def __init__(self, part: str, inner: str = "") -> None:
        self.part = part
        self.inner = inner
        self.prefix = ""

    def attach(self, module: nn.Module) -> None:
        """Translate whenever `module`, or a model that contains it, is saved or loaded."""
        # torch marks the hook, and a method cannot be marked.
        module.register_state_dict_post_hook(partial(self.after_saving))
        module.register_load_state_dict_pre_hook(self.before_loading)
        module.register_load_state_dict_post_hook(self.after_loading)
        for name in self.table(module).values():
            place: Any = module
            for part in name.split(".")[:-1]:
                if not hasattr(place, part):
                    place.__dict__[part] = PublishedPlace()
                place = getattr(place, part)

    def table(self, module: nn.Module) -> dict[str, str]:
        """Own name of each tensor of `module` → its published name, both without the part's."""
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        ours = {name: f"{layouts.OURS}{self.part}.{name.removeprefix(self.inner)}" for name, _ in tensors}
        published = published_names(ours.values())
        return {name: published[full].removeprefix(PUBLISHED_ROOTS[self.part]) for name, full in ours.items()}

    def after_saving(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Own names to published ones, in the same order."""
        table = self.table(module)
        for name in [name for name in state if name.startswith(prefix)]:
            own = name.removeprefix(prefix)
            state[prefix + table.get(own, own)] = state.pop(name)

    def before_loading(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Published names to own ones; what published files hold although it can be calculated is dropped."""
        self.prefix = prefix
        own_names = {published: own for own, published in self.table(module).items()}
        for name in [name for name in state if name.startswith(prefix)]:
            published, tensor = name.removeprefix(prefix), state.pop(name)
            own = own_names.get(published, published)
            counted = published.endswith(_COUNTER) and published in own_names
            if counted or not _PUBLISHED.ignored.fullmatch(published):
                state[prefix + own] = tensor

    def after_loading(self, module: nn.Module, incompatible: Any) -> None:
        """What is missing is reported under its published name."""
        table, missing = self.table(module), incompatible.missing_keys
        for i, name in enumerate(missing):
            if name.startswith(self.prefix):
                own = name.removeprefix(self.prefix)
                missing[i] = self.prefix + table.get(own, own)


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Our names (``network.…``) → published ones; a timm model's own parts keep their names behind ``backbone.``.

    Other names stay as they are.
    """
    names = list(names)
    kind = layouts.backbone_kind(names)
    published = {}
    for name in names:
        found = layouts.to_published(name, kind) if name.startswith(layouts.OURS) else name
        published[name] = found or name.removeprefix(layouts.OURS)
    return published


def rename_native(state: dict[str, Any], prefix: str = "") -> None:
    """A native checkpoint's names to published ones, in place; calculated values of published files are dropped."""
    inside = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    published = published_names(inside)
    for name in inside:
        tensor = state.pop(prefix + name)
        outside = name.startswith(("backbone.", "sem_seg_head.", layouts.OURS))
        if outside or not _PUBLISHED.ignored.fullmatch(name):
            state[prefix + published[name]] = tensor


def read_first_version(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a head is loaded: in the first published version the pixel decoder's names stood directly under it."""
    for name in [name for name in state if name.startswith(prefix)]:
        full = "sem_seg_head." + name.removeprefix(prefix)
        state[prefix + layouts.current_version(full).removeprefix("sem_seg_head.")] = state.pop(name)


class MaskFormerCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also reads every family of weight files that `load_weights` reads.

    Those are: native checkpoints, into any meta-architecture; models in Hugging Face's layout; backbones of the
    original Swin release, of torchvision and timm. Weights of another model are refused by the rules of `load_weights`.

    Args:
        model: to fill and save.
        save_dir: folder of the checkpoints.
        strict: refuse weights that do not fill the model completely, as evaluation wants; a run that is resumed always
            does.
        min_fit: refuse weights of which less than this share of a part fits (``MODEL.WEIGHTS_MIN_FIT``).
        others: see the class it extends.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, strict: bool = False, min_fit: float = ENOUGH, **others: Any
    ) -> None:
        super().__init__(model, save_dir, **others)
        self.strict = strict
        self.min_fit = min_fit
        self._resuming = False

    def resume_or_load(self, path: str, *, resume: bool = True) -> Any:
        """As Detectron2's.

        Raises:
            UserError: the file cannot be had or read, or is for another model.
        """
        self._resuming = resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """As Detectron2's, also from ``hf://owner/name``.

        Raises:
            UserError: the file cannot be had or read, or is for another model.
        """
        if path and path.startswith(TIMM):
            raise UserError(
                f"MODEL.WEIGHTS {path} is no address of Detectron2: set MODEL.BACKBONE.NAME timm and "
                "MODEL.TIMM.PRETRAINED True, or make a file of it with `maskformer convert`"
            )
        if path and path.startswith(hub.PREFIX):
            file = hub.weights_in(hub.fetch(path))
            if file is None or file.suffix == ".json":
                raise UserError(
                    f"MODEL.WEIGHTS {path} is in several files: make one of them with `maskformer convert` first"
                )
            path = str(file)
        if path:
            self._fetch(path)
        return super().load(path, *args, **kwargs)

    def _fetch(self, path: str) -> None:
        """Have the file on this machine, from where Detectron2 takes it then."""
        reason = "there is no such file"
        try:
            if Path(self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())).is_file():
                return
        except Exception as error:  # whatever its handlers raise: there is no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the weights {path} cannot be had ({reason}): check MODEL.WEIGHTS, the network connection, or "
            "last_checkpoint in OUTPUT_DIR if the run is resumed"
        )

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        file: WeightFile | None = checkpoint.pop(_FILE, None)
        strict = self.strict or self._resuming
        state = self.model.state_dict()
        targets = our_targets(state, file) if file else {}
        if file and targets:
            report, _ = check_weights(file, targets, strict=strict, min_fit=self.min_fit)
            logger.info("%s", report.summary())
        path = file.path if file else "MODEL.WEIGHTS"
        found = super()._load_model(checkpoint)
        missing = [name for name in found.missing_keys if not name.endswith(_COUNTER)]
        if len(missing) == sum(not name.endswith(_COUNTER) for name in state):
            raise UserError(f"{path} holds nothing that fits this model: check MODEL.BACKBONE.NAME and MODEL.WEIGHTS")
        if strict:
            extra = [name for name in found.unexpected_keys if not _PUBLISHED.ignored.fullmatch(name)]
            refuse_incomplete(LoadingReport(path, "Detectron2", missing=missing, unexpected=extra))
        return found

    def _load_file(self, filename: str) -> Any:
        path = Path(filename)
        file = read_weight_file(path)
        family = layouts.find_family(file.tensors)
        if family is None:
            return super()._load_file(filename)
        # Not mapped: optimizers keep the tensors they are given, and Detectron2 overwrites files in place.
        content = read_torch_file(path) if recognise(path) == "torch" else {}
        # Beside its weights, a checkpoint of a run has what its trainer goes on with.
        rest = {key: value for key, value in content.items() if key != "model"} if "model" in content else {}
        tensors = published_tensors(file, family)
        if family.backbone_only:  # found by the ends of their names, wherever the model has its backbone
            tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
        self._bring_to_current_version(tensors)
        self._fit_tables(tensors)
        return {**rest, _FILE: file, "model": tensors, "matching_heuristics": family.backbone_only}

    def _bring_to_current_version(self, tensors: dict[str, Tensor]) -> None:
        """Names of the first published version to those of the model, under which Detectron2 compares shapes."""
        state = self.model.state_dict()
        for name in [name for name in tensors if name not in state]:
            if (current := layouts.current_version(name)) in state:
                tensors[current] = tensors.pop(name)

    def _fit_tables(self, tensors: dict[str, Tensor]) -> None:
        """Swin's position tables resized, where window or image size differs, as natively."""
        for target, own in self.model.state_dict().items():
            name = next((n for n in (target, target.removeprefix("backbone.")) if n in tensors), None)
            if name is None:
                continue
            table, wanted = as_map(target, tensors[name]), tuple(own.shape)
            if can_resize(target, tuple(table.shape), wanted):
                tensors[name] = resize_table(target, table, wanted)


def our_targets(state: Mapping[str, Tensor], file: WeightFile) -> dict[str, Tensor]:
    """The tensors of a model of Detectron2 that a file can be checked against, under our names where they have any.

    Args:
        state: of the model, under the names it has there.
        file: of a family that we know.

    Returns:
        Nothing, if the file is a backbone and it cannot be told which tensors are that of the model.
    """
    family = layouts.find_family(file.tensors)
    if family is None or not family.backbone_only:
        return _under_our_names(state)
    inside = [name for name in state if name.startswith(_IN_PYRAMID)]
    if inside:  # the pyramid around it has tensors too, which no such file holds
        state = {name.replace(_IN_PYRAMID, "backbone.", 1): state[name] for name in inside}
    targets = _under_our_names(state)
    return targets if any(name.startswith(f"{layouts.OURS}backbone.") for name in targets) else {}


def _under_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kind = _backbone_kind(state)
    return {layouts.to_ours(name, kind) or name: tensor for name, tensor in state.items()}


def _backbone_kind(published: Collection[str]) -> layouts.BackboneKind:
    """`layouts.backbone_kind` of published names."""
    if "backbone.stem.conv1.weight" in published:
        return "ResNet with a deep stem" if "backbone.stem.conv3.weight" in published else "ResNet"
    return "Swin" if "backbone.patch_embed.proj.weight" in published else "other"


def published_tensors(file: WeightFile, family: layouts.Family) -> dict[str, Tensor]:
    """The tensors of a weight file of this family under published names, without those of no use.

    Where the names are the published ones already, all are kept: the model that loads them knows which it has.
    """
    if family is _PUBLISHED:
        return dict(file.tensors)
    if family is layouts.HUGGING_FACE:
        tensors = join_projections(file.tensors)
        full = our_names(tensors)
    else:
        tensors = file.tensors
        full = {name: family.full_name(name) for name in tensors}
    kept = {full[name]: tensor for name, tensor in tensors.items() if not family.ignored.fullmatch(name)}
    published = published_names(kept)
    return {published[name]: tensor for name, tensor in kept.items()}
