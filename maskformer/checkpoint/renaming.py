"""Pairs of name patterns that are read in both directions.

In a pattern ``{a}``, ``{b}`` and ``{c}`` are the same number on both sides, ``{a+1}`` is one more than ``{a}``, and
``{*}`` is the rest of the name, unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

Rules = tuple[tuple[re.Pattern[str], str], ...]


@cache
def compile_rules(pairs: tuple[tuple[str, str], ...], *, backwards: bool = False) -> Rules:
    """Rules from the first pattern of each pair to the second, or `backwards`."""
    return tuple((_pattern(b), a) if backwards else (_pattern(a), b) for a, b in pairs)


def translate(name: str, rules: Rules) -> str | None:
    """The name that the first fitting rule makes; None if none fits."""
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return _fill(template, match.groupdict())
    return None


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Puts numbers and rest into a template; a number may have been read as itself or as one more."""

    def fill(slot: re.Match[str]) -> str:
        key, plus = slot[1], slot[2] or ""
        if key == "*":
            return values["rest"]
        number = int(values[key]) if key in values else int(values[f"{key}_plus"]) - 1
        return str(number + (1 if plus else 0))

    return re.sub(r"\{([abc*])(\+1)?\}", fill, template)


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(re.escape("{*}"), r"(?P<rest>.+)")
    for key in "abc":
        text = text.replace(re.escape(f"{{{key}+1}}"), rf"(?P<{key}_plus>[1-9]\d*)")
        text = text.replace(re.escape(f"{{{key}}}"), rf"(?P<{key}>\d+)")
    return re.compile(text)
