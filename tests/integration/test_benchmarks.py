"""Benchmarks run, alone and beside a counterpart."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_evaluation", BENCHMARKS / "evaluation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUICK_IMAGES", 2)
    monkeypatch.setattr(module, "REPEATS", 1)
    return module


def test_evaluation_without_panopticapi(
    evaluation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "panopticapi.evaluation", None)  # importing it fails
    evaluation.main(["--quick", "--json", str(tmp_path / "times.json")])
    assert "panopticapi cannot be imported, so only our own times follow" in capsys.readouterr().out
    content = json.loads((tmp_path / "times.json").read_text())
    assert content["machine"]
    rows = {row["name"]: row for row in content["rows"]}
    assert (rows["panoptic_quality_arrays"]["target"], rows["panoptic_quality_png"]["target"]) == (10.0, 2.5)
    assert all(row["ours"] > 0 and row["baseline"] is None and row["unit"] == "ms/image" for row in rows.values())


def test_other_scores_than_the_counterpart_end_the_comparison(
    evaluation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "find_api", lambda folder: SimpleNamespace())
    monkeypatch.setattr(evaluation, "theirs_from_arrays", lambda api, scenes: {"PQ": 50.0})
    with pytest.raises(SystemExit, match=r"panoptic_quality_arrays: PQ is .* and 50\.0 in panopticapi"):
        evaluation.main(["--quick"])
