"""The command that converts weights: ``maskformer convert``, ``tools/convert_weights.py``.

Whatever can be loaded can be converted, to the published names, to Hugging Face's layout or to a model file of ours.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskformer.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from maskformer.data.dataset import Metadata

INTERRUPTED = 130  # what shells report for Ctrl-C
ENDINGS = {"published": (".pkl", ".pth", ".safetensors"), "maskformer": (".pth",)}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Convert the weights of a whole model, and say what was converted.",
        epilog="example: %(prog)s --weights hf://facebook/maskformer-swin-tiny-ade --to maskformer "
        "--output maskformer_swin_tiny.pth",
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="SOURCE",
        help="file, folder of Hugging Face's layout, hf://owner/name, https://... or detectron2://...",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="of the model; not needed for Hugging Face's, whose config is read"
    )
    parser.add_argument(
        "--to", required=True, choices=["published", "huggingface", "maskformer"], help="names to write"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="published: a .pkl, .pth or .safetensors file; huggingface: a folder; maskformer: a .pth file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="NAME",
        help="of the weights, for the model card; cc-by-nc-4.0 for whatever comes from the published ones",
    )
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was found")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys to override; must come last",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, or 2 if something was wrong, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def run(arguments: argparse.Namespace) -> list[Path]:
    """Convert.

    Returns:
        The files written.

    Raises:
        UserError: if the weights do not fill the model completely, or cannot be written as asked.
    """
    output = Path(arguments.output).expanduser()
    check_output(output, arguments.to, arguments.overwrite)
    check_writable(output)
    derived = arguments.to == "maskformer" and not arguments.config_file
    if derived and output.with_suffix(".yaml").exists() and not arguments.overwrite:
        raise UserError(
            f"{output.with_suffix('.yaml')} exists, where the config goes: name another, or add --overwrite"
        )
    # Here, so that a mistake in the arguments, and --help, need not wait for PyTorch.
    from maskformer.build import build_model_to_fill
    from maskformer.checkpoint import load_weights

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    weights = find_weights(arguments.weights)
    cfg, metadata = describe(weights, arguments.config_file, arguments.opts)
    model = build_model_to_fill(cfg, metadata)
    _say(load_weights(model, weights, strict=True).summary())
    written = write(model, cfg, metadata, arguments.to, output, arguments.license)
    if derived:
        written.append(_write_config(cfg, output))
    for path in written:
        size = path.stat().st_size
        _say(f"wrote {path} ({f'{size / 2**20:.1f} MiB' if size >= 2**20 else f'{size / 2**10:.1f} KiB'})")
    return written


def check_output(output: Path, target: str, overwrite: bool) -> None:
    """Refuse, before anything is loaded, what cannot be written.

    Raises:
        UserError: if something is there, or the path does not fit what is to be written.
    """
    if target == "huggingface":
        if output.is_file():
            raise UserError(f"--output {output} is a file but --to huggingface writes a folder: name another")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise UserError(f"--output {output} is not empty: name another folder, or add --overwrite")
        return
    if output.suffix not in ENDINGS[target]:
        raise UserError(f"--output {output} must end in {' or '.join(ENDINGS[target])} for --to {target}")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder but --to {target} writes a file: name another")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output} exists: name another file, or add --overwrite")


def check_writable(output: Path) -> None:
    """Refuse, before anything is loaded, a place where no file can be made.

    Raises:
        UserError: the nearest folder that exists is no folder, or takes no files.
    """
    nearest = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    nearest = nearest.parent if nearest == output.absolute() and not nearest.is_dir() else nearest
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = "it is no folder" if not nearest.is_dir() else error.strerror
        raise UserError(f"--output {output} cannot be written in {nearest} ({reason}): name another place") from error


def find_weights(source: str) -> str:
    """What ``--weights`` means; an address of the Hub with its commit, so that all that is read is of one state.

    Raises:
        UserError: it cannot be had.
    """
    from maskformer.checkpoint.sources import fetch_source, pinned

    try:
        if "://" in source:
            return pinned(source)
        fetch_source(source)
    except UserError as error:
        raise UserError(str(error).replace("MODEL.WEIGHTS", "--weights")) from error
    return source


def describe(weights: str, config_file: str | None, overrides: Sequence[str]) -> tuple[Any, Metadata]:
    """The config of the model, and what its classes mean.

    Raises:
        UserError: if nothing says what model the weights are of.
    """
    from maskformer.checkpoint import checkpoint_metadata
    from maskformer.config import get_cfg
    from maskformer.integrations.huggingface import config_from_huggingface, is_huggingface, metadata_from_huggingface
    from maskformer.predictor import class_names

    overrides = ["MODEL.DEVICE", "cpu", *overrides]
    if config_file:
        cfg = get_cfg(config_file, overrides)
    elif is_huggingface(weights):
        cfg = config_from_huggingface(weights, overrides)
    else:
        raise UserError(
            f"{weights} does not say what model it is of: add --config-file (only Hugging Face's folders do)"
        )
    test = cfg.MODEL.MASK_FORMER.TEST
    named = bool(cfg.DATASETS.TRAIN or cfg.DATASETS.TEST or test.PANOPTIC_ON or test.INSTANCE_ON)
    if not named and is_huggingface(weights) and checkpoint_metadata(weights) is None:
        return cfg, metadata_from_huggingface(weights)
    return cfg, class_names(cfg, weights)


def write(model: nn.Module, cfg: Any, metadata: Metadata, target: str, output: Path, license_name: str) -> list[Path]:
    """Write a filled model in one of the three layouts; returns the files.

    Raises:
        UserError: if the layout has no place for something in it, or the path cannot be written.
    """
    from maskformer.checkpoint import export_published, save_model
    from maskformer.config import dump
    from maskformer.integrations.huggingface import export_huggingface

    if target == "huggingface":
        return export_huggingface(model, cfg, metadata, output, license_name=license_name)
    if target == "published":
        return [export_published(model, output)]
    return [save_model(output, model=model, metadata=metadata, config_text=dump(cfg))]


def _write_config(cfg: Any, output: Path) -> Path:
    """The derived config beside the model file, so that `Predictor` needs nothing else."""
    from maskformer.config import dump
    from maskformer.writing import write_text

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(output.resolve())
    cfg.MODEL.DEVICE = "auto"
    path = output.with_suffix(".yaml")
    write_text(path, dump(cfg))
    return path


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
