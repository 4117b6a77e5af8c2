"""Strict reading of ``dataset.yaml``: plain values only, no unknown or repeated key, no name that YAML misreads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from maskformer.data.dataset import Color, nearest
from maskformer.errors import UserError

_MAX_LABEL = 65535
_CLASS_KEYS = ("name", "thing", "color")


class ClassEntry(NamedTuple):
    """One entry of ``classes:``; None where it says nothing."""

    name: str
    thing: bool | None = None
    color: Color | None = None


class Description(NamedTuple):
    """A checked ``dataset.yaml``; None where a key is absent."""

    path: str
    classes: list[ClassEntry] | None = None
    ignore_label: int | None = None
    labels: dict[int, str | None] | None = None
    images: str | None = None
    masks: str | None = None
    instances: str | dict[str, str] | None = None
    panoptic: str | dict[str, str] | None = None


_KEYS = Description._fields[1:]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(getattr(key_node, "value", ""))
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_description(path: Path) -> Description:
    """Reads and checks a ``dataset.yaml``.

    Raises:
        UserError: if the file is missing, is not YAML, or says something that has no meaning.
    """
    try:
        # The loader is a SafeLoader: it builds plain values only.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(
            f"{str(path)!r} does not exist: write it, at least with 'classes: [name of label 0, …]'"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {_yaml_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is {type(content).__name__}, not a mapping with 'classes:'")
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise UserError(f"{str(path)!r} has the unknown key {unknown[0]!r}: {nearest(str(unknown[0]), _KEYS)}")
    reader = _Reader(str(path), content)
    description = Description(
        path=repr(str(path)),
        classes=reader.classes(),
        ignore_label=reader.ignore_label(),
        labels=reader.labels(),
        images=reader.pattern("images"),
        masks=reader.pattern("masks"),
        instances=reader.split_files("instances"),
        panoptic=reader.split_files("panoptic"),
    )
    reader.check_combination(description)
    return description


def _yaml_reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    reason = getattr(error, "problem", None) or str(error)
    return place + " ".join(str(reason).split())


class _Reader:
    """The checks of one file."""

    def __init__(self, path: str, content: dict[Any, Any]) -> None:
        self.path, self.content = path, content

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path!r}: {what}")

    def classes(self) -> list[ClassEntry] | None:
        given = self.content.get("classes")
        if given is None:
            return None
        if not isinstance(given, list) or not given:
            raise self.refuse("'classes:' must be a list of names or of {name, thing, color}")
        entries = [self._class(i, item) for i, item in enumerate(given)]
        names = [e.name for e in entries]
        for name in names:
            if names.count(name) > 1:
                raise self.refuse(f"'classes:' has {name!r} twice")
        return entries

    def _class(self, index: int, item: Any) -> ClassEntry:
        where = f"class {index}"
        if not isinstance(item, dict):
            item = {"name": item}
        for key in item:
            if key not in _CLASS_KEYS:
                raise self.refuse(f"{where} has the unknown key {key!r}: {nearest(str(key), _CLASS_KEYS)}")
        name, thing, color = item.get("name"), item.get("thing"), item.get("color")
        if not isinstance(name, str) or not name:
            raise self.refuse(f"the name of {where} is {name!r} ({type(name).__name__}), not text: put it in quotes")
        if thing is not None and not isinstance(thing, bool):
            raise self.refuse(f"'thing' of class {name!r} is {thing!r}, it must be true or false")
        if color is None:
            return ClassEntry(name, thing)
        if not isinstance(color, list) or len(color) != 3 or not all(_is_int(c) and 0 <= c <= 255 for c in color):
            raise self.refuse(f"'color' of class {name!r} is {color!r}, it must be [red, green, blue] of 0..255")
        return ClassEntry(name, thing, (color[0], color[1], color[2]))

    def ignore_label(self) -> int | None:
        given = self.content.get("ignore_label")
        if given is not None and not (_is_int(given) and 0 <= given <= _MAX_LABEL):
            raise self.refuse(f"'ignore_label' is {given!r}, it must be a whole number of 0..{_MAX_LABEL}")
        return given

    def labels(self) -> dict[int, str | None] | None:
        given = self.content.get("labels")
        if given is None:
            return None
        if not isinstance(given, dict) or not given:
            raise self.refuse("'labels:' must map values of the masks to class names, such as {7: road, 8: sidewalk}")
        for raw, name in given.items():
            if not _is_int(raw) or not 0 <= raw <= _MAX_LABEL:
                raise self.refuse(f"'labels:' has the value {raw!r}, it must be a whole number of 0..{_MAX_LABEL}")
            if name is not None and not isinstance(name, str):
                raise self.refuse(f"'labels:' maps {raw} to {name!r}, not to a class name: put it in quotes")
        return given

    def pattern(self, key: str) -> str | None:
        given = self.content.get(key)
        if given is not None and (not isinstance(given, str) or "*" not in given):
            raise self.refuse(f"'{key}' is {given!r}, it must be a pattern such as '{key}/{{split}}/*.png'")
        return given

    def split_files(self, key: str) -> str | dict[str, str] | None:
        given = self.content.get(key)
        if given is None or isinstance(given, str):
            return given
        if not isinstance(given, dict) or not all(isinstance(x, str) for pair in given.items() for x in pair):
            raise self.refuse(f"'{key}' must name a JSON file, or one for each split: {{train: ..., val: ...}}")
        return given

    def check_combination(self, description: Description) -> None:
        if description.instances is not None and description.panoptic is not None:
            raise self.refuse("it has both 'instances:' and 'panoptic:': keep one")
        if description.instances is not None and description.masks is not None:
            raise self.refuse("it has both 'instances:' and 'masks:': keep one")
        if description.labels is not None and (description.instances or description.panoptic):
            raise self.refuse("'labels:' is about masks, the categories of a JSON file are matched by name: remove it")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
