"""Parameters, structure, speed, memory and the inputs they are measured with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from maskformer import build_model, get_cfg
from maskformer.analysis import (
    count_flops,
    count_parts,
    counting_size,
    measure_speed,
    measure_training_memory,
    module_costs,
    random_samples,
    training_size,
)
from maskformer.analysis.memory import available_memory
from maskformer.analysis.speed import median_seconds
from maskformer.analyze import on_meta
from maskformer.errors import UserError

QUICKSTART = "configs/quickstart/shapes_panoptic.yaml"
ADE, COCO = "configs/ade20k-150", "configs/coco-panoptic"
# Published, exactly; the last four of the seven ADE20K models as counted in the published weight files' millions.
PARAMETERS = {
    f"{ADE}/maskformer_R50_bs16_160k.yaml": 41_254_743,
    f"{ADE}/maskformer_R101c_bs16_160k.yaml": 60_318_039,
    f"{ADE}/swin/maskformer_swin_tiny_bs16_160k.yaml": 41_757_009,
    f"{ADE}/per_pixel_baseline_R50_bs16_160k.yaml": 31_033_942,
    f"{ADE}/per_pixel_baseline_plus_R50_bs16_160k.yaml": 41_228_736,
    "configs/ade20k-150-panoptic/maskformer_panoptic_R50_bs16_720k.yaml": 45_016_407,
    f"{COCO}/maskformer_panoptic_R50_bs64_554k.yaml": 45_012_038,
}
MILLIONS = {
    f"{ADE}/maskformer_R101_bs16_160k.yaml": 60,
    f"{ADE}/swin/maskformer_swin_small_bs16_160k.yaml": 63,
    f"{ADE}/swin/maskformer_swin_base_IN21k_384_bs16_160k_res640.yaml": 102,
    f"{ADE}/swin/maskformer_swin_large_IN21k_384_bs16_160k_res640.yaml": 212,
    f"{COCO}/maskformer_panoptic_R101_bs64_554k.yaml": 64,
    f"{COCO}/swin/maskformer_panoptic_swin_tiny_bs64_554k.yaml": 42,
    f"{COCO}/swin/maskformer_panoptic_swin_small_bs64_554k.yaml": 63,
    f"{COCO}/swin/maskformer_panoptic_swin_base_IN21k_384_bs64_554k.yaml": 102,
    f"{COCO}/swin/maskformer_panoptic_swin_large_IN21k_384_bs64_554k.yaml": 212,
}


@pytest.mark.parametrize(("config", "expected"), PARAMETERS.items())
def test_parameters_exactly(config: str, expected: int) -> None:
    counts = count_parts(on_meta(get_cfg(config)).network)
    assert counts["total"].parameters == expected
    parts = [count for part, count in counts.items() if part != "total"]
    assert [sum(column) for column in zip(*parts, strict=True)] == list(counts["total"])


@pytest.mark.parametrize(("config", "millions"), MILLIONS.items())
def test_parameters_in_millions(config: str, millions: int) -> None:
    assert round(count_parts(on_meta(get_cfg(config)).network)["total"].parameters / 1e6) == millions


def test_frozen_parameters_and_buffers() -> None:
    overrides = ["MODEL.BACKBONE.FREEZE_AT", "1", "MODEL.RESNETS.NORM", "FrozenBN"]
    counts = count_parts(on_meta(get_cfg(QUICKSTART, overrides)).network)
    stem = 64 * 3 * 7 * 7
    assert counts["backbone"].frozen == counts["total"].frozen == stem
    assert counts["head"].buffers == counts["pixel decoder"].buffers == 0
    # Scale, shift, mean and variance of each channel of the stem, four stages and three shortcuts.
    assert counts["backbone"].buffers == 4 * (64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512)


def test_index_tables_are_no_buffers_of_a_model() -> None:
    config = f"{ADE}/swin/maskformer_swin_tiny_bs16_160k.yaml"
    assert count_parts(on_meta(get_cfg(config)).network)["total"].buffers == 0


@pytest.mark.parametrize(
    ("config", "overrides", "counting", "training"),
    [
        (f"{ADE}/maskformer_R50_bs16_160k.yaml", (), (512, 512), (512, 512)),
        ("configs/cityscapes-19/maskformer_R101_bs16_90k.yaml", (), (512, 512), (512, 1024)),
        (f"{COCO}/maskformer_panoptic_R50_bs64_554k.yaml", (), (800, 1067), (800, 1067)),
        (f"{COCO}/maskformer_panoptic_R50_bs64_554k.yaml", ("INPUT.MAX_SIZE_TEST", "1000"), (750, 1000), (800, 1067)),
        (
            f"{ADE}/maskformer_R50_bs16_160k.yaml",
            ("INPUT.CROP.ENABLED", "False", "INPUT.SIZE_DIVISIBILITY", "-1"),
            (512, 683),
            (1024, 1365),
        ),
    ],
)
def test_sizes(config: str, overrides: Sequence[str], counting: tuple[int, int], training: tuple[int, int]) -> None:
    cfg = get_cfg(config, overrides)
    assert counting_size(cfg) == counting
    assert training_size(cfg) == training


def test_random_samples() -> None:
    first, second = random_samples((20, 30), 2, classes=4, segments=10)
    assert first["image"].shape == (3, 20, 30)
    assert not torch.equal(first["image"], second["image"])
    assert first["segments"].labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert second["segments"].labels.tolist()[:2] == [1, 2]
    assert first["segments"].areas().tolist() == [60] * 10
    assert torch.equal(first["image"], random_samples((20, 30), 1, classes=4)[0]["image"])


def test_structure_adds_up() -> None:
    model = on_meta(get_cfg(QUICKSTART))
    costs = {cost.name: cost for cost in module_costs(model, (64, 64), depth=2)}
    counts = count_flops(model, (64, 64))
    network = costs[""]
    assert network.multiply_adds == counts.total - counts.by_part()["inference"]
    assert network.multiply_adds - sum(costs[p].multiply_adds for p in ("backbone", "pixel_decoder", "head")) == 0
    assert network.parameters == sum(costs[p].parameters for p in ("backbone", "pixel_decoder", "head"))
    decoder = [cost for name, cost in costs.items() if name.startswith("pixel_decoder.")]
    assert {cost.name.rpartition(".")[2] for cost in decoder} == {"lateral", "output", "embedding"}
    assert sum(cost.parameters for cost in decoder) == costs["pixel_decoder"].parameters
    # A list of modules is not called, so it has what is in it; nearest upsampling is the decoder's own.
    resampling = counts.parts["pixel decoder"]["resampling"]
    assert sum(cost.multiply_adds for cost in decoder) == costs["pixel_decoder"].multiply_adds - resampling
    assert list(module_costs(model, (64, 64), depth=1)) == [c for n, c in costs.items() if "." not in n]


def test_median_leaves_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([9.0, 9.0, 1.0, 5.0, 2.0])
    now = [0.0]
    monkeypatch.setattr("maskformer.analysis.speed.time.perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(durations)

    assert median_seconds(work, torch.device("cpu"), iterations=3, warm_up=2) == 2.0


def test_speed() -> None:
    model = build_model(get_cfg(QUICKSTART, ["MODEL.DEVICE", "cpu"]))
    speed = measure_speed(model, (64, 96), batch=2, iterations=2, warm_up=1)
    assert 0 < speed.network
    assert 0 < speed.end_to_end
    assert speed.images_per_second == pytest.approx(2 / speed.end_to_end)


@pytest.mark.skipif(available_memory() < 4 * 2**30, reason="needs 4 GiB of memory")
def test_memory_of_a_training_step_holds_what_must_be_there() -> None:
    cfg = get_cfg(QUICKSTART, ["MODEL.DEVICE", "cpu"])
    small = measure_training_memory(cfg, (64, 64), batch=1)
    large = measure_training_memory(cfg, (256, 256), batch=4)
    model = build_model(cfg)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert small.peak > 4 * weights  # weights, gradients and AdamW's two moments
    # 256 times the pixels: at least the 64-channel map at half the size, of the stem and of its activation.
    assert large.peak - small.peak > 4 * 64 * 128 * 128 * 4
    assert (large.device, large.size, large.batch) == ("cpu", (256, 256), 4)


def test_too_little_memory_is_one_sentence() -> None:
    cfg = get_cfg(QUICKSTART, ["MODEL.DEVICE", "cpu"])
    with pytest.raises(UserError, match=r"A training step of 1 image of 64x64 needs more than the 0\.1 GiB") as error:
        measure_training_memory(cfg, (64, 64), batch=1, limit=100 * 2**20)
    assert "--memory-limit" in str(error.value)


def test_a_mistake_in_the_config_comes_back_as_it_is() -> None:
    cfg = get_cfg(QUICKSTART, ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    with pytest.raises(UserError, match=r"^MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 4, but .* has 5 classes"):
        measure_training_memory(cfg, (64, 64), batch=1)
