"""From what a user writes in ``MODEL.WEIGHTS`` to a file on this machine."""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from maskformer.checkpoint.files import atomic_write
from maskformer.errors import UserError

CACHE_VARIABLE = "MASKFORMER_CACHE"
_SHORT = {"detectron2://": "https://dl.fbaipublicfiles.com/detectron2/"}
_TIMEOUT_SECONDS = 30
_BLOCK = 1 << 20

# Published recipes name these files without saying where they come from. The originals are read as they are.
_SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
_ORIGINS = {
    "R-50.pkl": "https://download.pytorch.org/models/resnet50-19c8e357.pth",
    "R-101.pkl": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "swin_tiny_patch4_window7_224.pkl": _SWIN + "swin_tiny_patch4_window7_224.pth",
    "swin_small_patch4_window7_224.pkl": _SWIN + "swin_small_patch4_window7_224.pth",
    "swin_base_patch4_window12_384_22k.pkl": _SWIN + "swin_base_patch4_window12_384_22k.pth",
    "swin_large_patch4_window12_384_22k.pkl": _SWIN + "swin_large_patch4_window12_384_22k.pth",
}


def cache_folder() -> Path:
    """The folder for downloaded weights: ``$MASKFORMER_CACHE``, or ``~/.cache/maskformer``."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "maskformer"


def local_file(source: str | Path) -> Path:
    """Finds the file that ``source`` means, and downloads a URL into the cache if it is not there yet.

    Args:
        source: a path, an ``https://`` URL, or ``detectron2://X`` (Detectron2's public file store).

    Raises:
        UserError: no such file, or the URL cannot be had; the message says which file to put where.
    """
    text = str(source)
    if not text:
        raise UserError("No weight file is named: set MODEL.WEIGHTS")
    for short, full in _SHORT.items():
        if text.startswith(short):
            text = full + text.removeprefix(short)
    if "://" not in text:
        return _existing(Path(source).expanduser())
    url = urllib.parse.urlsplit(text)
    inside = PurePosixPath(urllib.parse.unquote(url.path).lstrip("/"))
    if url.scheme != "https" or not url.hostname or not inside.name or ".." in inside.parts:
        raise UserError(f"{source} is not an address weights can be read from: use a file, https:// or detectron2://")
    path = cache_folder() / url.hostname / inside
    if not path.is_file():
        _download(text, path)
    return path


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weight file: name the file in it")
    origin = _ORIGINS.get(path.name)
    if origin is None:
        raise UserError(f"The weight file {path} does not exist: correct MODEL.WEIGHTS or leave it empty")
    original = path.with_name(origin.rsplit("/", 1)[1])
    if original.is_file():
        raise UserError(f"The weight file {path} does not exist but {original} does: set MODEL.WEIGHTS to that one")
    raise UserError(
        f"The weight file {path} does not exist: download {origin} and set MODEL.WEIGHTS to it (it is read as it is)"
    )


def _download(url: str, path: Path) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "maskformer"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            _store(response, path)
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} cannot be downloaded ({reason}): fetch it elsewhere and put it at {path}, "
            f"or set MODEL.WEIGHTS to a file on this machine"
        ) from error


def _store(response: HTTPResponse, path: Path) -> None:
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdigit() else None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    received = 0
    with Progress(*columns, TimeRemainingColumn()) as progress, atomic_write(path) as file:
        task = progress.add_task(path.name, total=total)
        while block := _read(response):
            file.write(block)
            received += len(block)
            progress.update(task, completed=received)
        if total is not None and received != total:
            raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except OSError as error:  # told apart from an error of the disk, which has another remedy
        raise ConnectionError(str(error)) from error
