"""What the wheel holds and what it says about itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import maskformer

ROOT = Path(maskformer.__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What goes into a wheel, built outside the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    command += ["build_py", "--build-lib", str(folder / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_recipes_are_in_the_wheel(built: Path) -> None:
    packaged = built / "lib" / "maskformer" / "_configs"
    names = {path.relative_to(packaged) for path in packaged.rglob("*.yaml")}
    assert names == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}


def test_all_modules_and_tables_are_in_the_wheel(built: Path) -> None:
    for pattern in ("*.py", "data/metadata/*.json", "py.typed"):
        names = {path.relative_to(ROOT / "maskformer") for path in (ROOT / "maskformer").rglob(pattern)}
        assert names <= {path.relative_to(built / "lib" / "maskformer") for path in (built / "lib").rglob("*.*")}


def test_installed_recipes_are_found_without_the_checkout(built: Path, tmp_path: Path) -> None:
    program = (
        "from maskformer import get_cfg; from maskformer.config import find_config; import maskformer;"
        "name = 'configs/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml';"
        "print(find_config(name)); print(get_cfg(name).MODEL.BACKBONE.NAME)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(built / 'lib')!r}); {program}"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    path, backbone = result.stdout.split()
    assert path.startswith(str(built / "lib"))
    assert backbone == "D2SwinTransformer"


def test_requirements(built: Path) -> None:
    text = (built / "maskformer.egg-info" / "requires.txt").read_text()
    required, *extras = text.split("\n[")
    names = {line.split(">")[0] for line in required.split()}
    assert {"torch", "timm", "scipy", "yacs"} <= names
    # Detectron2 pins iopath: it must stay out of our own requirements, and Detectron2 itself out of all.
    assert not {"iopath", "fvcore", "transformers"} & names
    assert {extra.partition("]")[0] for extra in extras} == {
        *("test", "export", "docs", "app", "wandb", "detectron2", "prepare"),
    }
    assert "\ndetectron2" not in text
    info = (built / "maskformer.egg-info" / "PKG-INFO").read_text()
    assert f"Version: {maskformer.__version__}\n" in info
    assert "Requires-Python: >=3.10" in info
