"""Builds the package: requirements, and the recipes of configs/ as data inside the wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

REQUIREMENTS = [
    "torch>=2.6",
    "torchvision>=0.21",
    "timm>=1.0",
    "numpy>=1.26",
    "scipy>=1.11",
    "pillow>=10.1",
    "opencv-python-headless>=4.8",
    "yacs>=0.1.8",
    "pyyaml>=6.0",
    "rich>=13.0",
    "tensorboard>=2.15",
    "safetensors>=0.4",
    "huggingface_hub>=0.25",  # hf:// addresses; timm needs it too
    "pycocotools>=2.0.7",
]

EXTRAS = {
    "test": [
        "pytest>=8.0",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.11",
        "mypy>=1.15",
        "setuptools>=77",  # builds the wheel whose content a test looks at
        "types-PyYAML",
        # Compared with in tests; never needed to train or predict.
        "transformers>=4.50",
        "h5py>=3.10",
    ],
    # Reads the label files of COCO-Stuff-10k, once, while they are prepared.
    "prepare": ["h5py>=3.10"],
    "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"],
    "docs": ["sphinx>=7.0", "myst-parser>=3.0", "furo>=2024.1.29"],
    "app": ["gradio>=5.0"],
    "wandb": ["wandb>=0.19"],
    # What Detectron2 needs besides itself; Detectron2 is not on any index and is built from its own source.
    "detectron2": [
        "fvcore>=0.1.5",
        "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1",
        "hydra-core>=1.1",
        "cloudpickle",
        "matplotlib",
        "tabulate",
        "termcolor>=1.1",
        "tqdm>4.29",
    ],
}


class BuildWithConfigs(build_py):
    """Copies configs/ to maskformer/_configs; an editable install reads the checkout's own folder instead."""

    def run(self) -> None:
        """Build the modules, then lay the recipes beside them."""
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / "maskformer" / "_configs"
        shutil.rmtree(target, ignore_errors=True)
        for source in self._recipes():
            copy = target / source.relative_to("configs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)

    @staticmethod
    def _recipes() -> list[Path]:
        return sorted(Path("configs").rglob("*.yaml"))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All built files, the recipes included."""
        target = Path(self.build_lib) / "maskformer" / "_configs"
        recipes = [str(target / source.relative_to("configs")) for source in self._recipes()]
        return [*super().get_outputs(include_bytecode), *recipes]

    def get_source_files(self) -> list[str]:
        """All sources, the recipes included: they belong into a source distribution too."""
        return [*super().get_source_files(), *(str(source) for source in self._recipes())]


setup(
    packages=find_packages(include=["maskformer", "maskformer.*"]),
    package_data={"maskformer": ["py.typed", "data/metadata/*.json"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithConfigs},
)
