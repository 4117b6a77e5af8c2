"""Results as people and files want them: tables, and one flat level of names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maskformer.evaluation.base import DatasetEvaluator

TITLES = {"sem_seg": "Semantic segmentation", "panoptic_seg": "Panoptic segmentation", "segm": "Instance segmentation"}
TABLE_WIDTH = 120


def flatten_results(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """``{"sem_seg": {"mIoU": 1.0}}`` as ``{"sem_seg/mIoU": 1.0}``, for metrics.json and curves."""
    return {f"{task}/{name}": float(value) for task, metrics in results.items() for name, value in metrics.items()}


def metric_names(evaluators: Iterable[DatasetEvaluator]) -> list[str]:
    """Names of all metrics to come, such as ``sem_seg/mIoU``, as `flatten_results` makes them."""
    return list(flatten_results({e.name: dict.fromkeys(e.metric_names(), math.nan) for e in evaluators}))


def format_results(results: Mapping[str, Mapping[str, float]], metadata: Any = None) -> str:
    """Tables for the console: for each task the main numbers, then every class.

    Args:
        results: of `inference_on_dataset`.
        metadata: of the data set, names it in the titles; may be None.
    """
    where = f" on {metadata.name}" if metadata is not None else ""
    blocks = []
    for task, metrics in results.items():
        blocks.append(f"{TITLES.get(task, task)}{where}:\n" + _headline(task, metrics))
        classes = _class_table(metrics)
        if classes:
            blocks.append(classes)
    return "\n\n".join(blocks)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown's form, columns padded: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).isdigit()


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _headline(task: str, metrics: Mapping[str, float]) -> str:
    if task == "panoptic_seg":
        groups = (("All", ""), ("Things", "_th"), ("Stuff", "_st"))
        rows = [[name, *(_number(metrics[m + suffix]) for m in ("PQ", "SQ", "RQ"))] for name, suffix in groups]
        return format_table(["", "PQ", "SQ", "RQ"], rows)
    main = {name: value for name, value in metrics.items() if "-" not in name}
    return format_table(list(main), [[_number(value) for value in main.values()]])


def _class_table(metrics: Mapping[str, float]) -> str:
    """Every class with its numbers, in as many columns of classes as fit the width."""
    table: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        metric, dash, name = key.partition("-")
        if dash:
            table.setdefault(name, {})[metric] = value
    if not table:
        return ""
    measures = list(dict.fromkeys(measure for values in table.values() for measure in values))
    cells = [[name, *(_number(values.get(m, math.nan)) for m in measures)] for name, values in table.items()]
    longest = max(len(name) for name in table)
    block_width = longest + 3 + sum(max(len(m), 6) + 3 for m in measures)
    columns = max(1, min(TABLE_WIDTH // block_width, math.ceil(len(cells) / 4)))
    height = math.ceil(len(cells) / columns)
    empty = [""] * (1 + len(measures))
    rows = []
    for r in range(height):
        parts = [cells[c * height + r] if c * height + r < len(cells) else empty for c in range(columns)]
        rows.append([cell for part in parts for cell in part])
    return format_table(["class", *measures] * columns, rows)
