"""An evaluation by three real processes is, number for number and byte for byte, that of one."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from maskformer import distributed
from maskformer.build import build_model
from maskformer.config import get_cfg
from maskformer.data.catalog import get_dataset
from maskformer.data.dataset import Dataset
from maskformer.data.loading import build_test_loader
from maskformer.errors import UserError
from maskformer.evaluation import AugmentedModel, PictureSaver, build_evaluators, inference_on_dataset
from maskformer.evaluation.predictions import JsonStream

DATASET = "shapes_panoptic_val"
RANKS = 3
SECONDS = 60  # all of it takes a few; more means that the processes wait for one another
OPTIONS = """
MODEL.DEVICE cpu  MODEL.RESNETS.DEPTH 18  MODEL.SEM_SEG_HEAD.NUM_CLASSES 5
MODEL.SEM_SEG_HEAD.CONVS_DIM 32  MODEL.SEM_SEG_HEAD.MASK_DIM 32
MODEL.MASK_FORMER.HIDDEN_DIM 32  MODEL.MASK_FORMER.NHEADS 2  MODEL.MASK_FORMER.DIM_FEEDFORWARD 32
MODEL.MASK_FORMER.DEC_LAYERS 2  MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 8
MODEL.MASK_FORMER.TEST.PANOPTIC_ON True  MODEL.MASK_FORMER.TEST.INSTANCE_ON True
MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD 0.0  MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD 0.0
INPUT.MIN_SIZE_TEST 64  INPUT.MAX_SIZE_TEST 64  DATALOADER.NUM_WORKERS 0
"""


def config(pictures: int = 0) -> Any:
    cfg = get_cfg()
    cfg.merge_from_list([*OPTIONS.split(), "TEST.PICTURES", pictures])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (DATASET,)
    return cfg


class Guess(nn.Module):
    """The truth with some pixels moved; how much depends on the image alone."""

    def infer(self, samples: Sequence[Any], semantic: str) -> list[dict[str, Any]]:
        return [self.guess(sample) for sample in samples]

    def guess(self, sample: Any) -> dict[str, Any]:
        chance = torch.Generator().manual_seed(sample["image_id"])
        move = torch.randint(0, 5, (2,), generator=chance).tolist()
        ids = torch.roll(torch.as_tensor(sample["pan_seg"][0]), move, (0, 1))
        segments = [
            {key: s[key] for key in ("id", "category_id", "isthing")}
            | {"score": float(torch.rand((), generator=chance))}
            for s in sample["pan_seg"][1]
            if (ids == s["id"]).any()
        ]
        things = [s for s in segments if s["isthing"]]
        return {
            "sem_seg_labels": torch.roll(torch.as_tensor(sample["sem_seg"]).long(), move, (0, 1)),
            "panoptic_seg": (ids, segments),
            "instances": {
                "masks": torch.stack([ids == s["id"] for s in things]),
                "labels": torch.tensor([s["category_id"] for s in things]),
                "scores": torch.tensor([s["score"] for s in things]),
            },
        }


class Share:
    """Batches of one sample for this rank, of a data set whose records are given."""

    def __init__(self, samples: Sequence[Any], shares: Sequence[Sequence[int]], file_names: Sequence[str]) -> None:
        own = shares[distributed.rank()] if distributed.world_size() > 1 else [i for share in shares for i in share]
        self.samples = [{**samples[i], "file_name": file_names[i]} for i in own]
        records = [{"image_id": s["image_id"], "file_name": n} for s, n in zip(samples, file_names, strict=True)]
        self.dataset = SimpleNamespace(records=records)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[list[Any]]:
        return ([sample] for sample in self.samples)


def real_loader(images: int, batch_size: int) -> Any:
    cfg = config()
    cfg.TEST.IMS_PER_BATCH = batch_size
    whole = get_dataset(DATASET)
    dataset = Dataset(whole.metadata, lambda: whole.records[:images])
    return build_test_loader(cfg, dataset, rank=distributed.rank(), world_size=distributed.world_size())


@cache
def five_samples() -> list[Any]:
    whole = get_dataset(DATASET)
    return [s for b in build_test_loader(config(), Dataset(whole.metadata, lambda: whole.records[:5])) for s in b]


def measure(model: nn.Module, loader: Any, folder: Path, pictures: int = 0) -> dict[str, Any]:
    """Scores and names of pictures."""
    evaluators = build_evaluators(config(pictures), get_dataset(DATASET).metadata, folder)
    scores = inference_on_dataset(model, loader, evaluators)
    pictures = [
        str(p.relative_to(folder)) for e in evaluators if isinstance(e, PictureSaver) for p in e.pictures.values()
    ]
    return {"scores": scores, "pictures": pictures}


# ---------------------------------------------------------------- what the processes do, one after the other
def seven_images(folder: Path) -> Any:
    return measure(Guess(), real_loader(7, 2), folder, pictures=3)


def a_real_model(folder: Path) -> Any:
    torch.manual_seed(0)
    return measure(build_model(config()), real_loader(7, 2), folder)


def scales_and_mirrors(folder: Path) -> Any:
    torch.manual_seed(0)
    model = AugmentedModel(build_model(config()), sizes=[64, 96], longest=99, mirror=True)
    evaluators = build_evaluators(config(), get_dataset(DATASET).metadata, folder, tasks=("sem_seg",))
    return {"scores": inference_on_dataset(model, real_loader(4, 1), evaluators), "pictures": []}


def fewer_images_than_ranks(folder: Path) -> Any:
    return measure(Guess(), real_loader(2, 1), folder, pictures=3)


def names_that_clash(folder: Path) -> Any:
    names = [f"{name}.png" for name in ("a/0", "a/1", "b/0", "b/1", "c/0")]
    return measure(Guess(), Share(five_samples(), [[0], [1, 2], [3, 4]], names), folder)


def a_missing_image(folder: Path) -> Any:
    return measure(Guess(), Share(five_samples(), [[0], [1], [3, 4]], list("abcde")), folder)


def an_image_on_two_ranks(folder: Path) -> Any:
    return measure(Guess(), Share(five_samples(), [[0, 1], [1, 2], [3, 4]], list("abcde")), folder)


def a_lost_shard(folder: Path) -> Any:
    """As if the last rank wrote to a disk of its own."""
    real = JsonStream.shard

    def lost(stream: JsonStream) -> Any:
        shard = real(stream)
        if shard is not None and distributed.rank() == RANKS - 1:
            (stream.path.parent / shard.name).unlink()
        return shard

    with mock.patch.object(JsonStream, "shard", lost):
        return measure(Guess(), real_loader(3, 1), folder)


SAME_AS_ONE = (seven_images, a_real_model, fewer_images_than_ranks, names_that_clash)
ERRORS = {
    a_missing_image: "1 of 5 images were not evaluated (image_id 2)",
    an_image_on_two_ranks: "1 images were evaluated more than once (image_id 1)",
    a_lost_shard: "OUTPUT_DIR must be on a file system that all machines share",
}


def work(rank: int, port: int, folder: Path) -> None:
    """One process: every scenario; what came out goes to ``<rank>.pkl``."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    outcomes: dict[str, Any] = {}
    with distributed.process_group(torch.device("cpu"), SECONDS):
        for scenario in (*SAME_AS_ONE, scales_and_mirrors, *ERRORS):
            try:
                outcomes[scenario.__name__] = scenario(folder / scenario.__name__)
            except UserError as error:
                outcomes[scenario.__name__] = str(error)
        distributed.barrier()
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(outcomes))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder and outcomes by rank of three processes that did everything above."""
    folder = tmp_path_factory.mktemp("spread")
    leftover = folder / "seven_images" / "inference" / ".predictions.json.2.4711.partial"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("of a killed run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 2 * SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    assert [process.exitcode for process in processes] == [0] * RANKS
    return folder, [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(RANKS)]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("scenario", SAME_AS_ONE)
def test_scores_and_files_are_those_of_one_process(
    scenario: Callable[[Path], Any], spread: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    expected = scenario(tmp_path)
    folder, outcomes = spread
    for outcome in outcomes:  # compared as text: equal to the last bit, NaN included
        assert json.dumps(outcome[scenario.__name__]["scores"]) == json.dumps(expected["scores"])
    assert outcomes[0][scenario.__name__]["pictures"] == expected["pictures"]
    assert sorted(expected["scores"]) == ["panoptic_seg", "segm", "sem_seg"]
    alone, together = files_in(tmp_path), files_in(folder / scenario.__name__)
    assert sorted(alone) == sorted(together)
    assert all(together[name] == content for name, content in alone.items())
    assert {"sem_seg_predictions.json", "predictions.json", "coco_instances_results.json"} <= {
        Path(name).name for name in alone
    }


def test_test_time_augmentation_is_that_of_one_process(
    spread: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    expected = scales_and_mirrors(tmp_path)
    assert list(expected["scores"]) == ["sem_seg"]
    for outcome in spread[1]:
        assert json.dumps(outcome["scales_and_mirrors"]) == json.dumps(expected)
    assert files_in(tmp_path) == files_in(spread[0] / "scales_and_mirrors")


def test_the_comparison_is_worth_something(spread: tuple[Path, list[dict[str, Any]]]) -> None:
    scores = spread[1][0]["seven_images"]["scores"]
    for task, metric in (("sem_seg", "mIoU"), ("panoptic_seg", "PQ"), ("segm", "AP")):
        assert 5 < scores[task][metric] < 95
    names = [Path(name).name for name in files_in(spread[0] / "names_that_clash" / "inference" / "predictions")]
    assert sorted(names) == ["0.png", "1.png", "2.png", "3.png", "4.png"]


@pytest.mark.parametrize("scenario", ERRORS)
def test_an_error_reaches_every_process_and_leaves_nothing(
    scenario: Callable[[Path], Any], spread: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, outcomes = spread
    problems = {outcome[scenario.__name__] for outcome in outcomes}
    assert len(problems) == 1
    assert ERRORS[scenario] in problems.pop()
    assert {Path(name).suffix for name in files_in(folder / scenario.__name__)} <= {".png"}
