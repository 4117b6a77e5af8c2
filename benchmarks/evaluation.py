#!/usr/bin/env python
"""Time of panoptic and semantic scoring on one core, beside panopticapi's in the same run.

    python benchmarks/evaluation.py [--quick] [--json FILE] [--panopticapi DIR]

Scenes are drawn: 480x640, 10 true and about 12 predicted segments with wavy borders. Both sides take turns;
what is shown are medians. The scores must agree, else the comparison stops. Nothing here uses more than one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cv2
import numpy as np

from maskformer.evaluation import PanopticQuality, SemSegEvaluator
from maskformer.evaluation.predictions import encode_label_map, write_panoptic_png
from maskformer.evaluation.report import format_table
from maskformer.evaluation.scoring import label_map_of, score_panoptic
from maskformer.evaluation.truth import read_panoptic_truth

HEIGHT, WIDTH = 480, 640
TRUE, PREDICTED = 10, 12
CLASSES = 20
REPEATS = 5
IMAGES, QUICK_IMAGES = 200, 40


class Scene(NamedTuple):
    """One image: ids and segments of the truth (large ids, as COCO's) and of the prediction (from 1, as ours)."""

    true_ids: np.ndarray
    true_segments: list[dict[str, Any]]
    pred_ids: np.ndarray
    pred_segments: list[dict[str, Any]]


class Row(NamedTuple):
    """A measurement, in milliseconds an image."""

    name: str
    ours: float
    baseline: float | None
    target: float | None
    unit: str = "ms/image"


def waves(rng: np.random.Generator, count: int, scales: tuple[tuple[int, float], ...]) -> np.ndarray:
    """(count, HEIGHT, WIDTH) smooth random fields, sums of noise at several scales."""
    fields = np.zeros((count, HEIGHT, WIDTH), np.float32)
    for field in fields:
        for scale, amplitude in scales:
            noise = rng.standard_normal((HEIGHT // scale + 2, WIDTH // scale + 2)).astype(np.float32)
            field += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return fields


def draw_scene(rng: np.random.Generator) -> Scene:
    """Regions where one field is the largest; the prediction is the same with some noise and two regions more."""
    fields = waves(rng, PREDICTED, ((160, 1.0), (40, 0.25), (10, 0.05)))
    true = fields[:TRUE].argmax(0)
    fields[TRUE:] -= 0.8
    predicted = (fields + waves(rng, PREDICTED, ((80, 0.15), (8, 0.05)))).argmax(0)
    colors = rng.choice(2**24 - 1, TRUE, replace=False) + 1
    colors[0] = 0  # void
    classes = rng.integers(0, CLASSES, PREDICTED)
    true_ids, pred_ids = colors[true].astype(np.uint32), (predicted + 1).astype(np.uint32)
    return Scene(
        true_ids,
        segments(true_ids, {int(color): int(label) for color, label in zip(colors, classes, strict=False)}),
        pred_ids,
        segments(pred_ids, {i + 1: int(label) for i, label in enumerate(classes)}),
    )


def segments(ids: np.ndarray, classes: dict[int, int]) -> list[dict[str, Any]]:
    """COCO's ``segments_info``."""
    values, counts = np.unique(ids, return_counts=True)
    return [
        {"id": int(i), "category_id": classes[int(i)], "area": int(n), "iscrowd": 0}
        for i, n in zip(values, counts, strict=True)
        if i
    ]


def write_files(scenes: list[Scene], folder: Path) -> None:
    """``truth.json`` and ``predictions.json`` with their PNGs, in COCO's panoptic format."""
    categories = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(CLASSES)]
    for name, first in (("truth", 0), ("predictions", 2)):
        items = []
        for number, scene in enumerate(scenes):
            write_panoptic_png(scene[first], folder / name / f"{number}.png")
            items.append({"image_id": number, "file_name": f"{number}.png", "segments_info": scene[first + 1]})
        content = {"images": [], "annotations": items, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))


# ---------------------------------------------------------------- ours
def ours_from_arrays(scenes: list[Scene]) -> dict[str, float]:
    """PQ, in percent."""
    quality = PanopticQuality({i: i % 2 for i in range(CLASSES)})
    for scene in scenes:
        quality.update(scene.pred_ids, scene.pred_segments, scene.true_ids, scene.true_segments)
    return quality.compute()


def ours_from_files(folder: Path) -> dict[str, float]:
    """PQ of the files, JSON and PNG included; one process."""
    truth = read_panoptic_truth(folder / "truth.json", folder / "truth")
    return score_panoptic(folder / "predictions.json", folder / "predictions", truth, workers=1)["panoptic_seg"]


# ---------------------------------------------------------------- theirs
def theirs_from_files(api: Any, folder: Path) -> dict[str, float]:
    """PQ of the files by panopticapi's function for one core."""
    truth, predictions = (json.loads((folder / f"{n}.json").read_text()) for n in ("truth", "predictions"))
    categories = {category["id"]: category for category in truth["categories"]}
    found = {a["image_id"]: a for a in predictions["annotations"]}
    pairs = [(a, found[a["image_id"]]) for a in truth["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        stat = api.pq_compute_single_core(0, pairs, str(folder / "truth"), str(folder / "predictions"), categories)
    return averages(stat, categories)


def averages(stat: Any, categories: dict[int, Any]) -> dict[str, float]:
    """PQ, SQ and RQ in percent, as we name them."""
    result = {}
    for suffix, isthing in (("", None), ("_th", True), ("_st", False)):
        average = stat.pq_average(categories, isthing=isthing)[0]
        result.update({metric.upper() + suffix: 100 * average[metric] for metric in ("pq", "sq", "rq")})
    return result


def theirs_from_arrays(api: Any, scenes: list[Scene]) -> dict[str, float]:
    """PQ by the same function, given arrays where it would open files: what remains is its counting."""

    class Opener:
        """Stands in for PIL: a file's name says which array it is."""

        @staticmethod
        def open(path: str) -> np.ndarray:
            side, number = Path(path).parent.name, int(Path(path).stem)
            return scenes[number].true_ids if side == "truth" else scenes[number].pred_ids

    categories = {i: {"id": i, "isthing": i % 2} for i in range(CLASSES)}
    pairs = [
        tuple(
            {"image_id": n, "file_name": f"{n}.png", "segments_info": [dict(s) for s in listed]}
            for listed in (scene.true_segments, scene.pred_segments)
        )
        for n, scene in enumerate(scenes)
    ]
    with (
        mock.patch.object(api, "Image", Opener),
        mock.patch.object(api, "rgb2id", lambda ids: ids),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        stat = api.pq_compute_single_core(0, pairs, "truth", "predictions", categories)
    return averages(stat, categories)


# ---------------------------------------------------------------- measuring
def compare(name: str, count: int, target: float, ours: Callable[[], Any], theirs: Callable[[], Any] | None) -> Row:
    """Medians of both, taking turns; the scores must agree."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    results: dict[str, Any] = {}
    for _ in range(REPEATS + 1):
        for side, work in (("theirs", theirs), ("ours", ours)):
            if work is not None:
                start = time.perf_counter()
                results[side] = work()
                seconds[side].append(time.perf_counter() - start)
    for metric, value in results.get("theirs", {}).items():
        if not abs(results["ours"][metric] - value) < 1e-9:
            sys.exit(f"error: {name}: {metric} is {results['ours'][metric]} here and {value} in panopticapi")
    # The first round warms up.
    medians = {side: 1000 * statistics.median(taken[1:]) / count for side, taken in seconds.items() if taken}
    return Row(name, medians["ours"], medians.get("theirs"), target)


def semantic_rows(scenes: list[Scene]) -> list[Row]:
    """The confusion matrix with PQ^St, and label maps from the RLE of prediction files; there is no counterpart."""
    maps = [(scene.pred_ids.astype(np.int64) % 150, scene.true_ids.astype(np.int32) % 150) for scene in scenes]
    evaluator = SemSegEvaluator([str(i) for i in range(150)], 255)
    entries = [[{"label": label, "segmentation": run} for label, run in encode_label_map(p)] for p, _ in maps]
    rows = []
    for name, work in (
        ("semantic_quality_arrays", lambda: [evaluator.count(p, t) for p, t in maps] and None),
        ("semantic_maps_from_rle", lambda: [label_map_of(e, (HEIGHT, WIDTH), 255, "") for e in entries] and None),
    ):
        rows.append(compare(name, len(scenes), 0.0, work, None)._replace(target=None))
    return rows


def find_api(folder: Path | None) -> Any:
    """The module of panopticapi, or None."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        return import_module("panopticapi.evaluation")
    except ImportError:
        print("panopticapi cannot be imported, so only our own times follow; --panopticapi names a folder of it")
        return None


def machine() -> str:
    """What was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}"


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="Time of scoring on one core, beside panopticapi's.")
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--panopticapi", type=Path, metavar="DIR", help="folder that holds the package panopticapi")
    arguments = parser.parse_args(argv)
    cv2.setNumThreads(1)
    api = find_api(arguments.panopticapi)
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(QUICK_IMAGES if arguments.quick else IMAGES)]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        write_files(scenes, files)
        rows = [
            compare(
                "panoptic_quality_arrays",
                len(scenes),
                10.0,
                lambda: ours_from_arrays(scenes),
                None if api is None else lambda: theirs_from_arrays(api, scenes),
            ),
            compare(
                "panoptic_quality_png",
                len(scenes),
                2.5,
                lambda: ours_from_files(files),
                None if api is None else lambda: theirs_from_files(api, files),
            ),
            *semantic_rows(scenes),
        ]
    cells = [
        [
            row.name,
            f"{row.ours:.3f}",
            "-" if row.baseline is None else f"{row.baseline:.3f}",
            "-" if row.baseline is None else f"{row.baseline / row.ours:.2f}",
            "-" if row.target is None else f"{row.target:.1f}",
        ]
        for row in rows
    ]
    print(f"{machine()}, {len(scenes)} images of {HEIGHT}x{WIDTH}, medians of {REPEATS}")
    print(format_table(["", "ours ms/image", "panopticapi ms/image", "times faster", "target"], cells))
    if arguments.json is not None:
        content = {"machine": machine(), "rows": [row._asdict() for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
