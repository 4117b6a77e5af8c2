"""Numbers of prediction and truth files, taken only as what they are: 3.9 is no category 3."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np


def as_whole(value: Any) -> int | None:
    """A whole number, also one that JSON has as 3.0; None if it is none."""
    if type(value) is int:
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_finite(value: Any) -> float | None:
    """A finite number; None if it is none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
