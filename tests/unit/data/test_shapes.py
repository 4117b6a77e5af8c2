from __future__ import annotations

import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
from scipy import ndimage

from maskformer.data import get_dataset, get_metadata, image_io
from maskformer.data.datasets import shapes, shapes_scene
from maskformer.data.datasets.shapes_scene import SIZE, STUFF, THINGS, draw_scene

SCENES = range(60)


def test_scenes_are_a_function_of_split_and_index() -> None:
    first = draw_scene("train", 5)
    shapes_scene.draw_scene.cache_clear()
    again = draw_scene("train", 5)
    assert again is not first
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.ids, again.ids)
    assert first.segments == again.segments
    code = (
        "import zlib; from maskformer.data.datasets.shapes_scene import draw_scene; "
        "print(zlib.crc32(draw_scene('train', 5).image))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == zlib.crc32(first.image)


def test_scenes_differ() -> None:
    images = [draw_scene(split, i).image.tobytes() for split in ("train", "val") for i in range(40)]
    assert len(set(images)) == 80


def test_the_last_scene_is_drawn_once() -> None:
    shapes_scene.draw_scene.cache_clear()
    record = get_dataset("shapes_panoptic_train").records[77]
    image_io.read_image(record["file_name"])
    image_io.read_label_map(record["sem_seg_file_name"])
    image_io.read_panoptic_ids(record["pan_seg_file_name"])
    list(record["segments_info"])
    assert shapes_scene.draw_scene.cache_info().misses == 1


def test_labels_of_one_scene_agree() -> None:
    panoptic, instance = get_dataset("shapes_panoptic_val").records, get_dataset("shapes_instance_val").records
    for index in SCENES:
        record = panoptic[index]
        ids = image_io.read_panoptic_ids(record["pan_seg_file_name"])
        labels = image_io.read_label_map(record["sem_seg_file_name"])
        segments = record["segments_info"]
        assert image_io.read_image(record["file_name"]).shape == (SIZE, SIZE, 3) == (*ids.shape, 3)
        assert set(np.unique(ids)) == {s["id"] for s in segments}
        for segment in segments:
            mask = ids == segment["id"]
            assert segment["area"] == mask.sum()
            assert (labels[mask] == segment["category_id"]).all()
            rows, columns = np.nonzero(mask)
            left, top, width, height = segment["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
        things = [s for s in segments if s["isthing"]]
        annotations = instance[index]["annotations"]
        assert [a["category_id"] for a in annotations] == [s["category_id"] - len(STUFF) for s in things]
        for annotation, thing in zip(annotations, things, strict=True):
            mask = image_io.decode_segmentation(annotation["segmentation"], SIZE, SIZE, "x")
            assert np.array_equal(mask, ids == thing["id"])
            assert annotation["id"] > 0


def test_scenes_are_as_described() -> None:
    counts, merged, objects = [], 0, 0
    kinds = np.zeros(len(STUFF) + len(THINGS), int)
    for index in SCENES:
        scene = draw_scene("val", index)
        labels = shapes.read(f"shapes://val/semantic/{index:06d}.png")
        things = [s for s in scene.segments if s["isthing"]]
        counts.append(len(things))
        for segment in scene.segments:
            kinds[segment["category_id"]] += 1
        for thing in things:
            # Half of every object is visible, and no object is a sliver.
            assert thing["area"] >= 60
            component, _ = ndimage.label(labels == thing["category_id"])
            mask = scene.ids == thing["id"]
            merged += int((component == component[mask][0]).sum() > mask.sum())
        objects += len(things)
    assert (min(counts), max(counts)) == (3, 6)
    assert merged / objects > 0.5  # connected components of a class are not objects
    assert (kinds[len(STUFF) :] > objects / 5).all()
    assert (kinds[: len(STUFF)] >= len(SCENES) - 2).all()


def test_colour_says_nothing_about_class() -> None:
    """The mean colours of a class have the same mean, within chance, for all classes."""
    colors: dict[int, list[np.ndarray]] = {c: [] for c in range(5)}
    for index in range(150):
        scene = draw_scene("train", index)
        for segment in scene.segments:
            colors[segment["category_id"]].append(scene.image[scene.ids == segment["id"]].mean(0))
    means = np.array([np.mean(c, 0) for c in colors.values()])
    errors = np.array([np.std(c, 0) / np.sqrt(len(c)) for c in colors.values()])
    for group in (slice(0, 2), slice(2, 5)):
        assert (np.ptp(means[group], axis=0) < 4.5 * errors[group].max(0)).all()


def test_texture_tells_stuff_apart() -> None:
    """Stripes vary along one direction only, blobs along all: the structure tensor is lopsided for grass."""
    lopsided: dict[int, list[float]] = {0: [], 1: []}
    for index in SCENES:
        scene = draw_scene("train", index)
        grey = scene.image.mean(-1)
        dy, dx = (ndimage.gaussian_filter(grey, 1.0, order=o) for o in ((1, 0), (0, 1)))
        for segment in scene.segments[:2]:
            if segment["isthing"]:
                continue
            inside = ndimage.binary_erosion(scene.ids == segment["id"], iterations=4)
            if inside.sum() < 200:
                continue
            tensor = np.cov(np.stack([dy[inside], dx[inside]]))
            low, high = np.linalg.eigvalsh(tensor)
            lopsided[segment["category_id"]].append((high - low) / (high + low))
    assert np.quantile(lopsided[0], 0.1) > np.quantile(lopsided[1], 0.9)


@pytest.mark.parametrize("name", shapes.NAMES)
def test_records_are_lazy_and_complete(name: str) -> None:
    shapes_scene.draw_scene.cache_clear()
    dataset = get_dataset(name)
    records = dataset.records
    assert len(records) == (1_000_000 if name.endswith("train") else 200)
    last = records[len(records) - 1]
    assert {"file_name", "image_id", "height", "width"} <= set(last)
    assert records[-1]["file_name"] == last["file_name"] == records[len(records) - 2 :][1]["file_name"]
    with pytest.raises(IndexError):
        records[len(records)]
    pickle.loads(pickle.dumps(last))
    pickle.loads(pickle.dumps(records))
    assert shapes_scene.draw_scene.cache_info().misses == 0
    metadata = get_metadata(name)
    assert metadata.num_classes == (3 if "instance" in name else 5)
    assert metadata.things == [c in THINGS for c in metadata.classes]
    assert len(set(metadata.colors)) == metadata.num_classes
