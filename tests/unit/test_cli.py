"""The ``maskformer`` command."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import maskformer
from maskformer import cli


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and command.help in out for name, command in cli.COMMANDS.items())
    assert cli.main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskformer {maskformer.__version__}\n"


@pytest.mark.parametrize(
    ("word", "remedy"), [("trian", "did you mean 'train'?"), ("xyz", f"use one of {', '.join(cli.COMMANDS)}")]
)
def test_unknown_command(word: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    assert capsys.readouterr().err == f"error: maskformer has no command '{word}'; {remedy}\n"


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    module = types.ModuleType("fake_main")
    module.main = lambda argv: seen.extend(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_main", module)
    monkeypatch.setattr(sys, "argv", ["maskformer"])
    monkeypatch.setitem(cli.COMMANDS, "eval", cli.COMMANDS["eval"]._replace(module="fake_main"))
    assert cli.main(["eval", "--config-file", "x.yaml", "SEED", "1"]) == 7
    assert seen == ["--eval-only", "--config-file", "x.yaml", "SEED", "1"]
    assert sys.argv[0] == "maskformer eval"


def test_help_does_not_load_torch() -> None:
    code = "import sys, maskformer.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
