"""The config tree: schema, merging with type checks, and writing it out."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yacs.config
import yaml

from maskformer.config.compat import UNREAD
from maskformer.config.defaults import DEFAULTS, ELEMENT_TYPE_WHERE_EMPTY, TYPE_WHERE_NONE
from maskformer.config.loading import Setting, decode, find_config, parse_overrides, read_config
from maskformer.config.ranges import STEM_CHANNELS
from maskformer.config.validation import validate_values
from maskformer.errors import UserError


class CfgNode(yacs.config.CfgNode):
    """A yacs node whose merges go through our own loader and checks (no code in files, one sentence per mistake)."""

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a config file with its bases; only for the whole tree."""
        merge(self, read_config(find_config(cfg_filename)))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``KEY VALUE`` pairs; only for the whole tree."""
        merge(self, parse_overrides(cfg_list))

    @classmethod
    def load_cfg(cls, cfg_file_obj_or_str: Any) -> CfgNode:
        """Refused: yacs would execute Python files here."""
        raise UserError("CfgNode.load_cfg is not supported: use maskformer.get_cfg(config_file)")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping, in its order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _schema_tree() -> dict[str, Any]:
    tree = copy.deepcopy(DEFAULTS)
    for key, unread in UNREAD.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = copy.deepcopy(unread.values[0])
    return tree


_SCHEMA: dict[str, Any] = dict(flatten(_schema_tree()))


def _unknown(setting: Setting) -> UserError:
    """The message for a key that does not exist, with the nearest one that does."""
    key = setting.key
    inside = [known for known in _SCHEMA if known.startswith(f"{key}.")]
    if inside:
        return UserError(f"{setting.where}{key} is a section, not a value: set one of its keys, such as {inside[0]}")
    by_folded = {known.upper(): known for known in _SCHEMA}
    same_name = [known for known in by_folded if known.rsplit(".", 1)[-1] == key.upper().rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(key.upper(), same_name, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(key.upper(), by_folded, n=1, cutoff=0.5)
    hint = f"did you mean {by_folded[near[0]]}?" if near else "see maskformer/config/defaults.py for the keys there are"
    return UserError(f"{setting.where}unknown key {key}: {hint}")


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _element_type(key: str, default: Sequence[Any]) -> type:
    return type(default[0]) if default else ELEMENT_TYPE_WHERE_EMPTY[key]


def _expected(key: str) -> tuple[type, str]:
    """Type of a key, and how to name it in a message."""
    default = _SCHEMA[key]
    if default is None:
        kind = TYPE_WHERE_NONE[key]
        return kind, f"{kind.__name__} or None"
    if isinstance(default, (list, tuple)):
        return type(default), f"list of {_element_type(key, default).__name__}"
    return type(default), type(default).__name__


def _named(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:
        return f"{type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _coerce(setting: Setting) -> Any:
    """The setting's value in the type of its key.

    Text is decoded like a Python literal, as yacs does, unless the key holds text. A whole number may stand for a
    float, a tuple for a list and a list for a tuple.
    """
    key, value = setting.key, setting.value
    kind, expected = _expected(key)
    if isinstance(value, str) and (setting.from_words or kind is not str):
        decoded = decode(value)
        # "OUTPUT_DIR 2024" means a folder: a key that holds text keeps a number as it was typed.
        keeps_text = kind is str and isinstance(decoded, (int, float)) and not isinstance(decoded, bool)
        value = value if keeps_text else decoded
    if value is None and _SCHEMA[key] is None:
        return None
    if kind in (list, tuple):
        fits = isinstance(value, (list, tuple))
        fits = fits and all(_fits(item, _element_type(key, _SCHEMA[key])) for item in value)
    else:
        fits = _fits(value, kind)
    if not fits:
        remedy = "write True or False" if kind is bool else f"give a value like {_example(key)}"
        raise UserError(f"{setting.where}{key} must be {expected}, but {value!r} is {_named(value)}: {remedy}")
    return kind(value)


def _example(key: str) -> str:
    default = _SCHEMA[key]
    if default is None or (isinstance(default, (list, tuple)) and not default):
        examples = {
            "DATASETS.TRAIN": '("ade20k_sem_seg_train",)',
            "DATASETS.TEST": '("ade20k_sem_seg_val",)',
            "SOLVER.LR_MULTIPLIERS": '[["sem_seg_head.pixel_decoder", 0.5]]',
        }
        return examples.get(key, "1.0")
    return repr(default)


def merge(cfg: yacs.config.CfgNode, settings: Iterable[Setting]) -> dict[str, str]:
    """Write settings into a config in order, later ones win.

    Args:
        cfg: a whole config as :func:`get_cfg` returns it.
        settings: what to write.

    Returns:
        For each key that was written, where its last value came from.

    Raises:
        UserError: an unknown key, or a value of another type than its key.
    """
    origins = {}
    for setting in settings:
        if setting.key not in _SCHEMA:
            raise _unknown(setting)
        *sections, name = setting.key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        setattr(node, name, _coerce(setting))
        origins[setting.key] = setting.where
    return origins


def get_cfg(config_file: str | Path | None = None, overrides: Sequence[Any] = ()) -> CfgNode:
    """The defaults, then a config file with its bases, then overrides; checked, not frozen.

    Args:
        config_file: a YAML file; ``configs/...`` finds the shipped recipes from any directory.
        overrides: ``[KEY, VALUE, KEY, VALUE, ...]``; texts are read like Python literals.

    Returns:
        The whole tree. ``cfg.SOLVER.BASE_LR`` reads a value.

    Raises:
        UserError: anything that could not mean what the user wants.
    """
    cfg = CfgNode(_schema_tree())
    settings = read_config(find_config(config_file)) if config_file is not None else []
    origins = merge(cfg, [*settings, *parse_overrides(overrides)])
    if "MODEL.RESNETS.STEM_OUT_CHANNELS" not in origins:  # it follows the stem, in what is dumped too
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = STEM_CHANNELS.get(cfg.MODEL.RESNETS.STEM_TYPE, 64)
    validate_values(dict(flatten(cfg)), origins)
    return cfg


def validate(cfg: yacs.config.CfgNode) -> None:
    """Check a config that was changed in Python: keys, types and values, as :func:`get_cfg` does.

    Raises:
        UserError: an unknown key, a wrong type, or a value that cannot work.
    """
    values = dict(flatten(cfg))
    for key, value in values.items():
        setting = Setting(key, value, "")
        if key not in _SCHEMA:
            raise _unknown(setting)
        _coerce(setting)
    missing = [key for key in _SCHEMA if key not in values]
    if missing:
        raise UserError(f"the config lacks {missing[0]}: start from maskformer.get_cfg()")
    validate_values(values, {})


def dump(cfg: yacs.config.CfgNode) -> str:
    """The config as YAML text that :func:`get_cfg` reads back to the same values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return str(yaml.safe_dump(plain(cfg), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True))
