"""``maskformer analyze``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from maskformer import analyze, cli
from maskformer.errors import UserError

QUICKSTART = "configs/quickstart/shapes_panoptic.yaml"


def test_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    words = ["--tasks", "flops", "parameters", "structure", "--size", "64", "96", "--operators", "--json", str(file)]
    assert cli.main(["analyze", "--config-file", QUICKSTART, *words, "MODEL.DEVICE", "cpu"]) == 0
    out = capsys.readouterr().out
    answer = json.loads(file.read_text())
    assert f"{answer['parameters']['total']['parameters']:,}" in out
    assert "Multiply-adds of 1 image of 96x64 in 10^9" in out
    assert all(name in out for name in ("convolution", "batch norm", "attention", "pixel decoder", "embedding"))
    flops = answer["flops"]
    assert flops["size"] == [64, 96]
    assert sum(sum(part.values()) for part in flops["parts"].values()) == flops["total"]
    assert answer["structure"]["modules"][0]["parameters"] == answer["parameters"]["total"]["parameters"]
    assert answer["config"] == QUICKSTART


def test_operators_are_shown_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["--config-file", QUICKSTART, "--size", "64", "64", "--tasks", "flops"]) == 0
    out = capsys.readouterr().out
    assert "backbone" in out
    assert "convolution" not in out


def test_speed_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    words = ["--size", "64", "64", "--batch", "2", "--images", "3", "--threads", "1", "--json", str(file)]
    command = ["--config-file", QUICKSTART, *words, "--tasks", "speed", "memory", "MODEL.DEVICE", "cpu"]
    assert analyze.main(command) == 0
    out = capsys.readouterr().out
    assert "Speed at 64x64, batch 2, median of 2, CPU with 1 thread, float32" in out
    assert "Peak of a training step at 64x64, batch 2" in out
    answer = json.loads(file.read_text())
    assert answer["speed"]["iterations"] == 2  # three images are two batches of two
    assert answer["memory"]["batch"] == 2
    assert answer["memory"]["peak"] > 0


@pytest.mark.parametrize(
    ("words", "tasks", "opts"),
    [
        (["flops"], ["flops"], []),
        (["speed", "flops", "speed"], ["flops", "speed"], []),
        (["flops", "MODEL.DEVICE", "cpu"], ["flops"], ["MODEL.DEVICE", "cpu"]),
        (["memory", "SEED", "1", "MODEL.DEVICE", "cpu"], ["memory"], ["SEED", "1", "MODEL.DEVICE", "cpu"]),
        (["flops", "OUTPUT_DIR", "x"], ["flops"], ["OUTPUT_DIR", "x"]),
        (["flops", "SEDE", "1"], ["flops"], ["SEDE", "1"]),  # the config says that this is no key
    ],
)
def test_tasks_end_where_overrides_begin(words: list[str], tasks: list[str], opts: list[str]) -> None:
    assert analyze.split_tasks(words) == (tasks, opts)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tasks", "flop"], "--tasks has no 'flop'; did you mean 'flops'?"),
        (["--tasks", "xyz"], "--tasks has no 'xyz'; choose some of parameters, flops, speed, memory, structure"),
        (
            ["--tasks", "MODEL.DEVICE", "cpu"],
            "--tasks names no task before 'MODEL.DEVICE'; choose some of parameters, flops, speed, memory, structure",
        ),
        (["--tasks", "Flops"], "--tasks has no 'Flops'; did you mean 'flops'?"),
        (["--tasks", "memory", "SPEED", "MODEL.DEVICE", "cpu"], "--tasks has no 'SPEED'; did you mean 'speed'?"),
        (["--memory-limit", "nan"], "--memory-limit is nan, but must be more than 0"),
        (
            ["--memory-limit", "inf"],
            "--memory-limit is inf, but must be finite; leave it out for nine tenths of what is free",
        ),
        (
            ["--memory-limit", "1e300"],
            "--memory-limit is 1e+300, but must be finite; leave it out for nine tenths of what is free",
        ),
        (["--batch", "0"], "--batch is 0, but must be more than 0"),
        (["--memory-limit", "-1"], "--memory-limit is -1, but must be more than 0"),
        (["--size", "16", "64"], "--size is 16 64, but each side needs at least 32 pixels"),
        (["MODEL.DEVCE", "cpu"], "command line: unknown key MODEL.DEVCE: did you mean MODEL.DEVICE?"),
        (
            ["--tasks", "memory", "--memory-limit", "0.01", "--size", "64", "64", "MODEL.DEVICE", "cpu"],
            "A training step of 1 image of 64x64 needs more than the 0.0 GiB it may have: "
            "give a smaller --batch or --size, or a larger --memory-limit",
        ),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["--config-file", QUICKSTART, *words]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_json_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "costs.json", tmp_path):
        assert analyze.main(["--config-file", QUICKSTART, "--tasks", "parameters", "--json", str(place)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"error: {place} ")
        assert captured.err.count("\n") == 1


def test_tables_stay_if_writing_fails_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise UserError(f"{path} cannot be written")

    monkeypatch.setattr(analyze, "write_text", fail)
    assert analyze.main(["--config-file", QUICKSTART, "--tasks", "parameters", "--json", str(tmp_path / "x")]) == 2
    captured = capsys.readouterr()
    assert "total" in captured.out
    assert captured.err == f"error: {tmp_path / 'x'} cannot be written\n"


def test_mistakes_in_arguments_do_not_load_torch() -> None:
    code = (
        "import sys, maskformer.analyze as a;"
        "assert a.main(['--config-file', 'x.yaml', '--tasks', 'flop']) == 2; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
