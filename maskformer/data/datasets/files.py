"""Finding the files of a data set: lists, pairs by stem, and what is missing, said before anything is read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maskformer.data.dataset import Record
from maskformer.data.image_io import IMAGE_SUFFIXES, image_size
from maskformer.errors import UserError

logger = logging.getLogger(__name__)


def require_folder(folder: Path, dataset: str, remedy: str) -> None:
    """Refuses a missing folder.

    Raises:
        UserError: naming the folder and what to do.
    """
    if not folder.is_dir():
        raise UserError(f"folder {str(folder)!r} of data set {dataset!r} does not exist: {remedy}")


def find_files(root: Path, pattern: str, dataset: str, remedy: str) -> dict[str, Path]:
    """All files that match a pattern, by what the wildcards stood for.

    Args:
        root: folder the pattern starts from.
        pattern: ``*`` within a name, ``**/`` for any folders between. One that ends in ``*`` takes image files of any
            type and the extension does not count.
        dataset: named in errors.
        remedy: what to do about a missing folder.

    Returns:
        Key → path, sorted by key.

    Raises:
        UserError: if the folder is missing, or two files have one key.
    """
    parts = (root / pattern).parts
    fixed = next((i for i, part in enumerate(parts) if "*" in part), None)
    if fixed is None:
        raise UserError(f"pattern {pattern!r} of data set {dataset!r} has no '*', which stands for the file's stem")
    base, rest = Path(*parts[:fixed]), "/".join(parts[fixed:])
    require_folder(base, dataset, remedy)
    regex = re.compile(re.escape(rest).replace(r"\*\*/", "(?:(.*)/)?").replace(r"\*", "([^/]*)"))
    found: dict[str, Path] = {}
    skipped: list[Path] = []
    for path in base.glob(rest):
        match = regex.fullmatch(path.relative_to(base).as_posix())
        if match is None or path.name.startswith(".") or not path.is_file():
            continue
        key = "/".join(group for group in match.groups() if group)
        if rest.endswith("*"):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                skipped.append(path)
                continue
            key = key[: len(key) - len(path.suffix)]
        if key in found:
            raise UserError(f"data set {dataset!r} has two files for {key!r}, {found[key].name!r} and {path.name!r}")
        found[key] = path
    if skipped:
        logger.warning("%s: %d files are no images and were left out, such as %s", dataset, len(skipped), skipped[0])
    return dict(sorted(found.items()))


def pair_files(
    images: dict[str, Path],
    masks: dict[str, Path],
    dataset: str,
    where: str,
    masks_where: str,
    remedy: str = "add the mask or remove the image",
    *,
    complete: bool = False,
) -> list[Record]:
    """Semantic records from images and label files with the same key.

    Args:
        images: key → file.
        masks: key → file.
        dataset: named in errors.
        where: where images were looked for.
        masks_where: where masks were looked for.
        remedy: what to do about a missing mask, or where there is no image at all.
        complete: refuse masks without an image too, as of a published data set, whose scores would silently be those
            of fewer images; otherwise they are a warning.

    Raises:
        UserError: if there is no image, or an image has no mask, or, where that matters, a mask no image.
    """
    if not images:
        raise UserError(f"data set {dataset!r} is empty: no image matches {where!r}: {remedy}")
    missing = [key for key in images if key not in masks]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(images)} images have none)" if len(missing) > 1 else ""
        raise UserError(
            f"image {str(images[missing[0]])!r} of data set {dataset!r} has no mask {missing[0]!r} in "
            f"{masks_where!r}{more}: {remedy}"
        )
    extra = [key for key in masks if key not in images]
    if extra and complete:
        more = f" (and {len(extra) - 1} more of {len(masks)} masks have none)" if len(extra) > 1 else ""
        raise UserError(
            f"mask {str(masks[extra[0]])!r} of data set {dataset!r} has no image {extra[0]!r} in {where!r}{more}: put "
            f"the image back, or remove the mask if the data set has no such picture ({remedy})"
        )
    if extra:
        logger.warning("%s: %d masks have no image and were left out, such as %s", dataset, len(extra), masks[extra[0]])
    return [
        {"file_name": str(path), "image_id": key, "sem_seg_file_name": str(masks[key])} for key, path in images.items()
    ]


def add_sizes(records: list[Record]) -> list[Record]:
    """Fills in ``height`` and ``width`` from the headers of the image files, several at a time.

    Raises:
        UserError: for the first file that is not an image.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        sizes = pool.map(image_size, [record["file_name"] for record in records], chunksize=64)
        for record, (height, width) in zip(records, sizes, strict=True):
            record["height"], record["width"] = height, width
    return records


def require_files(paths: Iterable[str], field: str, dataset: str, remedy: str) -> None:
    """Refuses a list of files of which some are missing; each folder is listed once, no file is opened.

    Raises:
        UserError: naming the first one and how many there are.
    """
    listings: dict[str, set[str]] = {}
    missing: list[str] = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = {f.name for f in Path(folder).iterdir()} if Path(folder).is_dir() else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{field} {missing[0]!r} of data set {dataset!r} does not exist{more}: {remedy}")


def semantic_records(image_root: Path, label_root: Path, label_suffix: str, dataset: str, remedy: str) -> list[Record]:
    """Semantic records of a published data set in two folders whose files have the same stems.

    Raises:
        UserError: if a folder, an image or a mask is missing or an image file is unreadable.
    """
    images = find_files(image_root, "*", dataset, remedy)
    masks = find_files(label_root, f"*{label_suffix}", dataset, remedy)
    return add_sizes(pair_files(images, masks, dataset, str(image_root), str(label_root), remedy, complete=True))
