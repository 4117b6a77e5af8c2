"""Reading config files and command-line overrides into flat settings; never executes code.

YAML goes through a loader of our own: plain YAML only, no duplicate keys, no tags. One tagged idiom of published
configs, a computed list of sizes, is recognised and computed here.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from maskformer.errors import UserError

BASE_KEY = "_BASE_"
_PACKAGE = Path(__file__).resolve().parents[1]
_MAP_TAG = "tag:yaml.org,2002:map"
_SEQUENCE_TAG = "tag:yaml.org,2002:seq"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_SIZE_LIST_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_SIZE_LIST = re.compile(
    r"\[\s*int\(\s*(?P<x>[A-Za-z_]\w*)\s*\*\s*(?P<first>\d+(?:\.\d*)?)\s*\*\s*(?P<second>\d+(?:\.\d*)?)\s*\)\s+"
    r"for\s+(?P=x)\s+in\s+range\(\s*(?P<bounds>-?\d+\s*,\s*-?\d+\s*(?:,\s*-?\d+\s*)?)\)\s*\]"
)
_SIZE_LIST_EXAMPLE = "[int(x * 0.1 * 512) for x in range(5, 21)]"
_MAX_SIZES = 1000


class Setting(NamedTuple):
    """One ``key: value`` as it was written.

    ``where`` stands in front of messages ("file.yaml, line 3: "). ``from_words`` marks text of the command line, where
    nothing else tells numbers from text.
    """

    key: str
    value: Any
    where: str
    from_words: bool = False


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads ``1e-4`` as a number and computes the published size lists."""

    # Resolvers are class attributes shared with SafeLoader: copy before adding to them.
    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}  # noqa: RUF012


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def evaluate_size_list(text: str) -> list[int]:
    """Compute ``[int(x * a * b) for x in range(start, stop[, step])]`` without executing it.

    The product is rounded as Python does, ``(x * a) * b`` in this order: the published sizes depend on it.

    Args:
        text: the expression, exactly of this shape; a and b are whole or decimal numbers.

    Returns:
        The sizes in pixels.

    Raises:
        ValueError: the text has another shape, or the range is empty or longer than 1000.
    """
    match = _SIZE_LIST.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not of the form {_SIZE_LIST_EXAMPLE}")
    bounds = [int(bound) for bound in match["bounds"].split(",")]
    if len(bounds) == 3 and bounds[2] == 0:
        raise ValueError(f"the range of {text!r} has step 0")
    numbers = range(*bounds)
    if not 0 < len(numbers) <= _MAX_SIZES:
        raise ValueError(f"the range of {text!r} has {len(numbers)} elements, not 1 to {_MAX_SIZES}")
    first, second = ast.literal_eval(match["first"]), ast.literal_eval(match["second"])
    return [int(x * first * second) for x in numbers]


def _line(path: Path, mark: yaml.Mark | None) -> str:
    return f"{path}, line {mark.line + 1}: " if mark is not None else f"{path}: "


class _Reader:
    """Turns the nodes of one file into settings."""

    def __init__(self, loader: _Loader, path: Path) -> None:
        self.loader = loader
        self.path = path
        self._open: list[yaml.Node] = []  # nodes being read, outermost first

    def where(self, node: yaml.Node) -> str:
        """Front of a message about a node."""
        return _line(self.path, node.start_mark)

    def settings(self, node: yaml.MappingNode, prefix: str = "") -> Iterator[Setting]:
        """Settings of a mapping in the order of the file."""
        self._enter(node, prefix.removesuffix("."))
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, prefix)
            if key in seen:
                raise UserError(
                    f"{self.where(key_node)}{prefix}{key} was already given in line {seen[key]}: keep one of the two"
                )
            seen[key] = key_node.start_mark.line + 1
            if isinstance(value_node, yaml.MappingNode) and value_node.tag == _MAP_TAG:
                yield from self.settings(value_node, f"{prefix}{key}.")
            else:
                yield Setting(prefix + key, self._value(value_node, prefix + key), self.where(key_node))
        self._open.pop()

    def _enter(self, node: yaml.Node, key: str) -> None:
        if any(outer is node for outer in self._open):
            raise UserError(f"{self.where(node)}{key} contains itself: write its values out")
        self._open.append(node)

    def _key(self, node: yaml.Node, prefix: str) -> str:
        if node.tag == _MERGE_TAG:
            raise UserError(f"{self.where(node)}the merge key << is refused: write the keys out or use {BASE_KEY}")
        key = self._value(node, prefix)
        if not isinstance(key, str):
            kind = type(key).__name__
            raise UserError(f"{self.where(node)}{prefix}{key!r} is a {kind}, but keys are names: check the indentation")
        return key

    def _value(self, node: yaml.Node, key: str) -> Any:
        """The value of a node below a key; sequences item by item, so that a tag is found at any depth."""
        if node.tag == _SIZE_LIST_TAG:
            return self._size_list(node)
        if node.tag not in self.loader.yaml_constructors:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{self.where(node)}the tag {tag} is refused: write the plain value instead")
        if not isinstance(node, yaml.SequenceNode) or node.tag != _SEQUENCE_TAG:
            return self.loader.construct_object(node, deep=True)
        self._enter(node, key)
        items = [self._value(item, key) for item in node.value]
        self._open.pop()
        return items

    def _size_list(self, node: yaml.Node) -> list[int]:
        """What the one published expression computes; never executed."""
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        try:
            if len(items) != 1 or not isinstance(items[0], yaml.ScalarNode):
                raise ValueError(f'there must be one text, ["{_SIZE_LIST_EXAMPLE}"]')
            return evaluate_size_list(items[0].value)
        except ValueError as error:
            raise UserError(
                f"{self.where(node)}code in a config is never executed, and {error}: write the list out"
            ) from None


def _read_one(path: Path) -> list[Setting]:
    """Settings of one file, ``_BASE_`` among them; an empty file has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text: save it as UTF-8 YAML") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return []
            if not isinstance(node, yaml.MappingNode) or node.tag != _MAP_TAG:
                raise UserError(f"{_line(path, node.start_mark)}a config is a mapping: write KEY: value lines")
            return list(_Reader(loader, path).settings(node))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "bad text"
        raise UserError(f"{_line(path, mark)}this is not valid YAML ({problem}): mend the line") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: a value cannot be read ({error}): mend it") from None


def read_config(path: Path, _chain: tuple[Path, ...] = ()) -> list[Setting]:
    """Settings of a config file after those of its bases, later ones win.

    ``_BASE_`` names one file or a list of them, relative to the file that names them; ``~`` is the home directory.

    Raises:
        UserError: a file is missing, not YAML, holds code or a duplicate key, or is its own base.
    """
    resolved = path.resolve()
    if resolved in _chain:
        chain = " -> ".join(str(file) for file in (*_chain, resolved))
        raise UserError(f"config files name each other as {BASE_KEY}: {chain}: remove one of these lines")
    settings: list[Setting] = []
    own = _read_one(path)
    for setting in own:
        if setting.key != BASE_KEY:
            continue
        names = setting.value if isinstance(setting.value, list) else [setting.value]
        for name in names:
            if not isinstance(name, str) or not name:
                raise UserError(f"{setting.where}{BASE_KEY} is {name!r}: write the path of a config file")
            base = path.parent / Path(name).expanduser()
            if not base.is_file():
                raise UserError(f"{setting.where}{BASE_KEY} names {name}, but {base} does not exist: mend the path")
            settings += read_config(base, (*_chain, resolved))
    return settings + [setting for setting in own if setting.key != BASE_KEY]


def shipped_configs() -> Path:
    """Folder of the recipes: inside an installed wheel, else ``configs/`` of the checkout."""
    packaged = _PACKAGE / "_configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def find_config(name: str | Path) -> Path:
    """Path of a config file; ``configs/...`` that is not below the working directory is the shipped one.

    Raises:
        UserError: there is no such file; names the nearest shipped recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    root = shipped_configs()
    if not path.is_absolute() and path.parts[:1] == ("configs",):
        shipped = root.joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    known = {f"configs/{file.relative_to(root).as_posix()}" for file in root.rglob("*.yaml")}
    near = difflib.get_close_matches(path.as_posix(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else "give the path of a YAML file"
    raise UserError(f"config file {path} does not exist: {hint}")


def parse_overrides(words: Sequence[Any]) -> list[Setting]:
    """Settings of ``KEY VALUE KEY VALUE ...`` as given on the command line or in Python.

    Raises:
        UserError: the number of words is odd, or a key is no text.
    """
    if isinstance(words, str):
        raise UserError(f"overrides are {words!r}: give a list of words, KEY VALUE KEY VALUE ...")
    if len(words) % 2:
        listed = " ".join(str(word) for word in words)
        raise UserError(
            f"overrides come as KEY VALUE pairs, but {listed!r} has {len(words)} words: add the missing one"
        )
    settings = []
    for key, value in zip(words[0::2], words[1::2], strict=True):
        if not isinstance(key, str):
            raise UserError(f"override key {key!r} is a {type(key).__name__}: write it like SOLVER.BASE_LR")
        settings.append(Setting(key, value, "command line: ", from_words=isinstance(value, str)))
    return settings


def decode(text: str) -> Any:
    """A Python literal if the text is one (``0.1``, ``(1, 2)``, ``True``, ``None``), else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text
