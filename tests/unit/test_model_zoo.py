"""MODEL_ZOO.md: made from committed tables, complete, and with commands that parse."""

from __future__ import annotations

import copy
import json
import shlex
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from maskformer import cli, get_cfg, model_zoo
from maskformer.analysis import count_flops, count_parts, counting_size, training_size
from maskformer.analyze import on_meta
from maskformer.config import find_config
from maskformer.errors import UserError

ZOO = model_zoo.load("model_zoo.json")
ABLATIONS = model_zoo.load("ablations.json")
CONFIGS = [model["config"] for model in ZOO["models"]]

pytestmark = pytest.mark.skipif(not (model_zoo.ROOT / "setup.py").is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((model_zoo.ROOT / model_zoo.MEASUREMENTS).read_text(encoding="utf-8"))
    return table


@pytest.fixture(scope="module")
def page() -> str:
    return (model_zoo.ROOT / model_zoo.PAGE).read_text(encoding="utf-8")


def test_the_page_is_what_the_tables_make(page: str, measured: dict[str, Any]) -> None:
    assert page == model_zoo.render(ZOO, ABLATIONS, measured), "run python tools/make_model_zoo.py"


def test_every_recipe_has_one_row_and_its_commands(page: str) -> None:
    assert len(CONFIGS) == len(set(CONFIGS)) == 30
    recipes = page.partition("## Ablations")[0]
    rows = [line for line in recipes.splitlines() if line.startswith("|")]
    for model in ZOO["models"]:
        assert [f"`{model['config']}`" in row for row in rows].count(True) == 1
        commands = [line for line in recipes.splitlines() if f"--config-file {model['config']}" in line]
        verbs = Counter(line.split()[1] for line in commands)
        assert verbs == {"eval": 2 if "mIoU" in model else 1, "train": 1}
        assert sum(model["weights_url"] in line for line in commands) == verbs["eval"]


def test_every_recipe_and_ablation_of_the_checkout_is_there() -> None:
    root = model_zoo.ROOT
    files = {str(path.relative_to(root)) for path in (root / "configs").rglob("*.yaml")}
    families = {str(Path(config).parts[1]) for config in CONFIGS}
    published = {f for f in files if Path(f).parts[1] in families and not Path(f).name.startswith("Base-")}
    assert published == set(CONFIGS)
    ablations = {f for f in files if f.startswith("configs/ablations/") and not Path(f).name.startswith("Base-")}
    named = [entry["config"] for entry in ABLATIONS["ablations"]]
    assert ablations <= set(named)
    assert set(named) <= ablations | published
    assert max(Counter(name for name in named if name in ablations).values()) == 1


def test_every_command_parses(page: str) -> None:
    lines = [line for line in page.splitlines() if line.startswith("maskformer ")]
    assert len(lines) >= 30 * 2
    for line in lines:
        word, *rest = shlex.split(line)[1:]
        command = cli.COMMANDS[word]
        parser = import_module(command.module).build_parser()
        arguments = parser.parse_intermixed_args([*command.arguments, *rest])
        cfg = get_cfg(arguments.config_file, arguments.opts)
        assert arguments.eval_only == (word == "eval")
        assert cfg.TEST.AUG.ENABLED == ("TEST.AUG.ENABLED True" in line)
        if word == "eval":
            assert cfg.MODEL.WEIGHTS.startswith("https://")


def test_every_config_in_the_page_exists(page: str) -> None:
    named = {word.strip("`") for word in page.split() if word.strip("`").startswith("configs/")}
    assert set(CONFIGS) < named
    for name in named:
        assert find_config(name)


def test_what_must_be_said_is_said(page: str) -> None:
    top = " ".join(page.partition("## ")[0].split())
    assert "CC BY-NC 4.0" in top
    assert "Apache 2.0" in top
    assert "None of these scores has been measured again here" in top


def test_published_numbers_are_copied(page: str) -> None:
    row = next(line for line in page.splitlines() if "`configs/ade20k-150/maskformer_R50_bs16_160k.yaml`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["MaskFormer", "R50", "160k", "44.5", "46.7", "41.3"]
    assert cells[6] == "52.8 (512x512)"
    assert cells[7] == "4334"


@pytest.mark.parametrize("config", CONFIGS[2::9])
def test_measurements_are_those_of_this_code(config: str, measured: dict[str, Any]) -> None:
    cfg = get_cfg(config)
    model = on_meta(cfg)
    counts = count_flops(model, counting_size(cfg))
    costs = measured["recipes"][config]
    assert costs["parameters"] == count_parts(model.network)["total"].parameters
    assert costs["flops"] == {"size": list(counts.size), "total": counts.total, "parts": counts.by_part()}
    if "memory" in costs:  # in docs/measurements.json as soon as someone has measured it
        assert costs["memory"]["size"] == list(training_size(cfg))


def test_every_recipe_is_measured(measured: dict[str, Any]) -> None:
    assert list(measured["recipes"]) == CONFIGS
    assert all(costs["parameters"] > 3e7 and costs["flops"]["total"] > 4e10 for costs in measured["recipes"].values())


def test_a_recipe_that_was_not_measured_is_one_sentence(measured: dict[str, Any]) -> None:
    less = copy.deepcopy(measured)
    del less["recipes"][CONFIGS[0]]
    with pytest.raises(UserError, match=r"has no configs/.*: run python tools/make_model_zoo\.py --measure"):
        model_zoo.render(ZOO, ABLATIONS, less)


def test_memory_cell() -> None:
    gib = 2**30
    assert model_zoo.memory_cell({"size": [512, 1024], "peak": int(1.26 * gib)}) == "1.3 (1024x512)"
    assert model_zoo.memory_cell({"size": [512, 512], "limit": 20 * gib}) == "more than 20 (512x512)"
    assert model_zoo.memory_cell(None) == "-"


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    totals = {"large": 3, "small": 1, "middle": 2}

    def fake(config: str, limit: int, threads: int) -> dict[str, Any]:
        asked.append(config)
        if config == "middle" and asked.count("middle") == 1:
            raise KeyboardInterrupt
        return {"size": [1, 1], "peak": 0}

    monkeypatch.setattr(model_zoo, "measure_counts", lambda config: {"flops": {"total": totals[config]}})
    monkeypatch.setattr(model_zoo, "measure_memory", fake)
    path = tmp_path / "measurements.json"
    with pytest.raises(KeyboardInterrupt):
        list(model_zoo.measure_missing(path, list(totals), 1.0, 1))
    list(model_zoo.measure_missing(path, list(totals), 1.0, 1))
    assert asked == ["small", "middle", "middle", "large"]
    recipes = json.loads(path.read_text())["recipes"]
    assert list(recipes) == list(totals)  # in the order of the table
    assert all(costs["memory"]["peak"] == 0 for costs in recipes.values())
    # With other threads the numbers are others: all anew.
    list(model_zoo.measure_missing(path, ["small"], 1.0, 2))
    assert asked[4:] == ["small"]


def test_main_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, Any], page: str
) -> None:
    monkeypatch.setattr(model_zoo, "ROOT", tmp_path)
    assert model_zoo.main([]) == 2  # no measurements
    (tmp_path / "docs").mkdir()
    (tmp_path / model_zoo.MEASUREMENTS).write_text(json.dumps(measured))
    assert model_zoo.main([]) == 0
    assert (tmp_path / model_zoo.PAGE).read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--memory-limit", "nan"], "--memory-limit is nan, but must be more than 0"),
        (["--memory-limit", "-1"], "--memory-limit is -1, but must be more than 0"),
        (["--threads", "0"], "--threads is 0, but must be more than 0"),
    ],
)
def test_numbers_that_are_refused(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_zoo.main(["--measure", *words]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
