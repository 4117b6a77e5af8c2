"""Who does not have Detectron2 misses nothing; these tests run with and without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import maskformer
from tests.integration.test_training import TINY

PACKAGE = Path(maskformer.__file__).parent
REPOSITORY = PACKAGE.parent

# Trains a step, evaluates it, prints the command's help; then says what has been imported.
NATIVE_RUN = """
import sys
from maskformer import cli
from maskformer.engine import main as train_net
config, output = sys.argv[1:]
assert train_net.main(["--config-file", config, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", "1",
                       "DATASETS.TEST", "('shapes_panoptic_val',)", "TEST.PICTURES", "0"]) == 0
assert cli.main(["--help"]) == 0
import maskformer.predictor, maskformer.integrations.huggingface, maskformer.convert, maskformer.model_zoo
parts = [name.split(".") for name in sys.modules]
print("IMPORTED", [".".join(part) for part in parts if "detectron2" in part])
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=240
    )


def test_a_native_run_imports_nothing_of_detectron2(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = run_python(NATIVE_RUN, str(tmp_path / "tiny.yaml"), str(tmp_path / "output"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "IMPORTED []"
    assert (tmp_path / "output" / "metrics.json").is_file()


def test_only_its_own_package_and_tool_name_detectron2_in_an_import() -> None:
    own = PACKAGE / "integrations" / "detectron2"
    files = [path for path in PACKAGE.rglob("*.py") if own not in path.parents]
    files += [path for path in (REPOSITORY / "tools").glob("*.py") if path.name != "train_net_detectron2.py"]
    assert len(files) > 100
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path.name}: {name}" for name in names if "detectron2" in name.split(".")]
    assert found == []


def test_missing_detectron2_is_told_in_one_sentence() -> None:
    code = """
import sys
sys.modules["detectron2"] = None  # as if it were not installed
from maskformer.errors import UserError
try:
    import maskformer.integrations.detectron2
except ImportError as error:
    assert isinstance(error, UserError)
    print("ERROR", error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert message.startswith("ERROR maskformer.integrations.detectron2 needs Detectron2")
    assert message.endswith("build it from its source as docs/detectron2.md says")
