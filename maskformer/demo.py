"""The command that segments images and saves them as coloured overlays: ``maskformer demo``, ``tools/demo.py``."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskformer.errors import UserError

INTERRUPTED = 130  # what shells report for Ctrl-C
SWITCHES = {"semantic": "SEMANTIC_ON", "panoptic": "PANOPTIC_ON", "instance": "INSTANCE_ON"}


class Job(NamedTuple):
    """An image to segment.

    Attributes:
        image: file to read.
        output: path of the pictures without their ending, such as ``out/street``.
    """

    image: Path
    output: Path


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Segment images and save them as coloured overlays with names and a legend.",
        epilog="example: %(prog)s --config-file configs/quickstart/shapes_panoptic.yaml "
        "--weights output/quickstart/model_final.pth --input my_photos --output overlays",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or a shipped configs/... path")
    parser.add_argument("--weights", metavar="FILE", help="weight file; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="images, or folders of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the overlays")
    parser.add_argument(
        "--task",
        choices=["auto", *SWITCHES],
        default="auto",
        help="what is drawn; auto: everything that the config switches on",
    )
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was found")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys to override, such as MODEL.DEVICE cpu; must come last",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, or 2 if an input was wrong (other images are done nevertheless), or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        broken = run(arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        return _fail([str(error)])
    except KeyboardInterrupt:
        return INTERRUPTED
    return _fail(broken) if broken else 0


def run(arguments: argparse.Namespace) -> list[str]:
    """Segment all images.

    Returns:
        One sentence for each image that could not be done.

    Raises:
        UserError: if nothing can be done at all.
    """
    jobs = find_images([Path(path).expanduser() for path in arguments.input], Path(arguments.output).expanduser())
    # Here, so that a mistake in the arguments, and --help, need not wait for PyTorch.
    from maskformer.predictor import Predictor

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    overrides = list(arguments.opts)
    if arguments.task != "auto":
        overrides += [f"MODEL.MASK_FORMER.TEST.{SWITCHES[arguments.task]}", "True"]
    predictor = Predictor(arguments.config_file, arguments.weights, overrides=overrides)
    metadata = predictor.metadata
    _say(f"{predictor.report.path}: {len(metadata.classes)} classes of {metadata.name}, on {predictor.model.device}")
    broken: list[str] = []
    start = time.perf_counter()
    for job in _progress(jobs):
        try:
            _segment(predictor, job, arguments.task)
        except UserError as error:
            if arguments.debug:
                traceback.print_exc()
            broken.append(str(error))
    done = len(jobs) - len(broken)
    _say(f"{done} of {len(jobs)} images in {time.perf_counter() - start:.1f} s, overlays in {arguments.output}")
    return broken


def _segment(predictor: Any, job: Job, task: str) -> None:
    from maskformer.evaluation.predictions import write_png

    prediction = predictor(job.image)
    for name in prediction.tasks if task == "auto" else [task]:
        write_png(prediction.overlay(name), job.output.with_name(f"{job.output.name}_{name}.png"))


def find_images(inputs: Sequence[Path], output: Path) -> list[Job]:
    """The images to segment, and where each one's pictures go; a folder's subfolders are kept.

    A named file is taken whatever it is (if it is no image, that is reported); in folders, files with another ending
    than those of images, hidden ones and those in `output` are left out.

    Raises:
        UserError: if a folder has no image, or overlays would be written among the images.
    """
    from maskformer.data.image_io import IMAGE_SUFFIXES

    found: list[tuple[Path, Path]] = []  # file, and where its pictures go below the output folder
    for path in inputs:
        if not path.is_dir():
            found.append((path, Path(path.name)))
            continue
        if path.resolve() == output.resolve():
            raise UserError(f"--output {output} is the folder of the images; name another one for the overlays")
        below = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
        own = [
            (path / file, file)
            for file in below
            if not any(part.startswith(".") for part in file.parts)
            and output.resolve() not in (path / file).resolve().parents
        ]
        if not own:
            raise UserError(f"--input {path} has no image in it (known endings: {' '.join(sorted(IMAGE_SUFFIXES))})")
        found += own
    return _with_outputs(found, output)


def _with_outputs(found: Iterable[tuple[Path, Path]], output: Path) -> list[Job]:
    """Names of the pictures: the image's stem, with its ending or a number where that would overwrite another one's."""
    jobs: list[Job] = []
    taken: set[Path] = set()
    for file, below in found:
        numbered = (below.with_name(f"{below.name}_{number}") for number in itertools.count(2))
        candidates = itertools.chain([below.with_suffix(""), below], numbered)
        chosen = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(chosen)
        jobs.append(Job(file, output / chosen))
    return jobs


def _progress(jobs: Sequence[Job]) -> Iterable[Job]:
    """The jobs, with a bar on a terminal, else with a line for each."""
    if sys.stdout.isatty():
        from rich.progress import track

        yield from track(jobs, description="segmenting", transient=True)
        return
    for number, job in enumerate(jobs, start=1):
        start = time.perf_counter()
        yield job
        _say(f"{number}/{len(jobs)} {job.image} ({time.perf_counter() - start:.2f} s)")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _fail(sentences: Sequence[str]) -> int:
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    sys.exit(main())
