"""A data set on disk whose predictions an evaluation has written, for tests of their scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from maskformer.data.catalog import Dataset
from maskformer.evaluation import InstanceEvaluator, PanopticEvaluator, SemSegEvaluator
from maskformer.evaluation.predictions import write_panoptic_png


class Case(NamedTuple):
    """A data set on disk, and predictions of it that an evaluation has written."""

    folder: Path
    dataset: Dataset
    results: dict[str, dict[str, float]]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def edit(self, name: str, change: Callable[[Any], Any]) -> Path:
        """Change a prediction file, in place or to what `change` returns."""
        path = self.out / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))
        return path


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, NaN included."""
    return json.dumps(one) == json.dumps(other)


def records_of(samples: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The truth of samples as files."""
    records = []
    for sample in samples:
        name = f"{sample['image_id']}.png"
        ids, segments = sample["pan_seg"]
        write_panoptic_png(ids.numpy(), folder / "truth" / name)
        (folder / "labels").mkdir(exist_ok=True)
        Image.fromarray(sample["sem_seg"].numpy().astype(np.uint8)).save(folder / "labels" / name)
        common = {key: sample[key] for key in ("file_name", "image_id", "height", "width", "annotations")}
        pan_seg = {"pan_seg_file_name": str(folder / "truth" / name), "segments_info": segments}
        records.append({**common, **pan_seg, "sem_seg_file_name": str(folder / "labels" / name)})
    return records


@pytest.fixture
def case(metadata: Any, samples: Any, spoiled: Any, tmp_path: Path) -> Case:
    metadata = replace(metadata, truth=("sem_seg", "pan_seg", "annotations"))
    records = records_of(samples, tmp_path)
    out = tmp_path / "out"
    evaluators: list[Any] = [
        SemSegEvaluator(metadata.classes, metadata.ignore_label, metadata.dataset_ids, out),
        PanopticEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, out),
        InstanceEvaluator(metadata.classes, metadata.things, metadata.dataset_ids, out),
    ]
    results = {}
    for evaluator in evaluators:
        evaluator.reset([sample["image_id"] for sample in samples])
        evaluator.process(samples, [spoiled(sample) for sample in samples])
        results[evaluator.name] = evaluator.evaluate()
    return Case(tmp_path, Dataset(metadata, lambda: records), results)


def coco_truth(case: Case) -> tuple[Path, Path]:
    """The truth as COCO's panoptic and instances JSON."""
    metadata, records = case.dataset.metadata, case.dataset.records
    columns = zip(metadata.dataset_ids, metadata.classes, metadata.things, strict=True)
    categories = [{"id": i, "name": name, "isthing": int(thing)} for i, name, thing in columns]
    images = [{"id": r["image_id"], "file_name": r["file_name"], "height": 48, "width": 64} for r in records]

    def own(items: Any, image_id: int) -> list[dict[str, Any]]:
        return [{**i, "category_id": metadata.dataset_ids[i["category_id"]], "image_id": image_id} for i in items]

    panoptic = [
        {
            "image_id": r["image_id"],
            "file_name": Path(r["pan_seg_file_name"]).name,
            "segments_info": own(r["segments_info"], r["image_id"]),
        }
        for r in records
    ]
    instances = [a for r in records for a in own(r["annotations"], r["image_id"])]
    things = [c for c in categories if c["isthing"]]
    for name, items, listed in (("truth", panoptic, categories), ("objects", instances, things)):
        content = {"images": images, "categories": listed, "annotations": items}
        (case.folder / f"{name}.json").write_text(json.dumps(content))
    return case.folder / "truth.json", case.folder / "objects.json"
