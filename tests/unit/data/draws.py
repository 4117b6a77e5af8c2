"""Many draws of an augmentation, and how unlikely they are under the published rule.

Draws come from the generators that training uses, one for each position, so they are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from maskformer.data.samplers import sample_rng

DRAWS = 2000
UNLIKELY = 1e-4
"""Below it a rule is rejected; a right rule falls below once in 10,000 checks, and the draws are always the same."""


def generators(seed: int = 0) -> Iterator[np.random.Generator]:
    """One for each sample, as in training."""
    return (sample_rng(seed, position) for position in range(DRAWS))


def one_of(values: Sequence[Any], expected: Sequence[Any]) -> float:
    """p that `values` are drawn uniformly from `expected`; 0 if there is another one."""
    counts = dict.fromkeys(expected, 0)
    for value in values:
        if value not in counts:
            return 0.0
        counts[value] += 1
    return float(stats.chisquare(list(counts.values())).pvalue) if len(counts) > 1 else 1.0


def a_half(flags: Sequence[bool]) -> float:
    """p that each is true with probability ½."""
    return float(stats.binomtest(sum(flags), len(flags), 0.5).pvalue)


def independent(one: Sequence[Any], other: Sequence[Any]) -> float:
    """p that two properties of a sample have nothing to do with each other."""
    rows, columns = sorted(set(one)), sorted(set(other))
    if min(len(rows), len(columns)) < 2:
        return 1.0
    table = np.zeros((len(rows), len(columns)))
    for a, b in zip(one, other, strict=True):
        table[rows.index(a), columns.index(b)] += 1
    return float(stats.chi2_contingency(table).pvalue)


def whole_numbers(values: Sequence[int], lows: Sequence[int], highs: Sequence[int]) -> float:
    """p that each value is uniform over its own inclusive range.

    A number of a range is spread over its share of [0, 1], which makes all ranges comparable.
    """
    if any(not low <= value <= high for value, low, high in zip(values, lows, highs, strict=True)):
        return 0.0
    spread = np.random.default_rng(9).random(len(values))
    width = np.array(highs) - np.array(lows) + 1
    return float(stats.kstest((np.array(values) - np.array(lows) + spread) / width, "uniform").pvalue)


def rejected(p_values: dict[str, float]) -> set[str]:
    return {name for name, p in p_values.items() if p < UNLIKELY}
