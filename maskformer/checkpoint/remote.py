"""From a path or an address to a file on this machine: downloads, the cache, and checksums.

Beside each downloaded file lies its SHA-256 as ``<file>.sha256``, in the format of ``sha256sum``; a file that was
damaged since is downloaded again. What an address promises (``#sha256=…``, or the digits at the end of the names on
download.pytorch.org) must hold as well.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from maskformer.checkpoint.files import atomic_write, write_text
from maskformer.errors import UserError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MASKFORMER_CACHE"
_SHORT = {"detectron2://": "https://dl.fbaipublicfiles.com/detectron2/"}
_TIMEOUT_SECONDS = 30
_BLOCK = 1 << 20
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f]*:[0-9a-f:.]*")
_LONGEST = 1000
_LONGEST_PART = 180  # bytes; file systems take 255, and the names of unfinished files and of checksums are longer
_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{64})")
_DIGITS_IN_NAME = re.compile(r".*-([0-9a-f]{8,64})\.\w+")
_HOSTS_WITH_DIGITS = ("download.pytorch.org",)

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
        source: a path, an ``https://`` URL, or ``detectron2://X`` (Detectron2's public file store); addresses may end
            in ``#sha256=<64 hexadecimal digits>``.

    Raises:
        UserError: no such file, the URL cannot be had, or what is there is not what was promised; the message says
            which file to put where.
    """
    text = str(source)
    if not text:
        raise UserError("No weight file is named: set MODEL.WEIGHTS")
    for short, full in _SHORT.items():
        if text.startswith(short):
            text = full + text.removeprefix(short)
    if "://" not in text:
        return _existing(Path(source).expanduser())
    url, path = _cached_at(text, source)
    promised = _promised(url, source)
    if path.is_file():
        problem = _damage(path)
        if not problem and sha256(path).startswith(promised):
            return path
        if not problem:
            raise UserError(
                f"{path} has SHA-256 {sha256(path)}, not the {promised} of {source}: delete it to download it again"
            )
        logger.warning("%s %s; it is downloaded again", path, problem)
    _download(urllib.parse.urlunsplit(url._replace(fragment="")), path, promised)
    return path


def _cached_at(address: str, source: str | Path) -> tuple[urllib.parse.SplitResult, Path]:
    """The parts of an ``https://`` address, and where in the cache its file lies: by host and path.

    What else tells addresses apart, query and port, is in the name as a few digits of its SHA-256.
    """
    try:
        url = urllib.parse.urlsplit(address)
        host, port = url.hostname or "", url.port
        inside = PurePosixPath(urllib.parse.unquote(url.path, errors="strict").lstrip("/"))
    except ValueError as error:
        raise UserError(f"{source!a:.200} is no address ({error}): correct it") from error
    safe = str(inside).isprintable() and "\\" not in str(inside) and ".." not in inside.parts
    if url.scheme != "https" or not _HOST.fullmatch(host) or not inside.name or not safe:
        raise UserError(
            f"{source} is not an address weights can be read from: use a file, https://, detectron2://, hf:// or timm://"
        )
    if len(str(inside)) > _LONGEST or any(len(part.encode()) > _LONGEST_PART for part in (host, *inside.parts)):
        raise UserError(
            f"{source!a:.200} has a part of more than {_LONGEST_PART} bytes, or {_LONGEST} in all, too long for the "
            f"name of a file in the cache: "
            f"download it elsewhere and set MODEL.WEIGHTS to the file"
        )
    if url.query or port not in (None, 443):
        told_apart = hashlib.sha256(f"{port or 443}?{url.query}".encode()).hexdigest()[:12]
        inside = inside.with_name(f"{inside.stem}-{told_apart}{inside.suffix}")
    path = cache_folder() / host / inside
    in_the_way = next((each for each in path.parents if each.is_file()), path if path.is_dir() else None)
    if in_the_way is not None:
        kind = "folder where a file" if in_the_way == path else "file where a folder"
        raise UserError(
            f"{in_the_way} is a {kind} of the cache must be for {source}: delete it, or set {CACHE_VARIABLE} to "
            f"another folder"
        )
    return url, path


def sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; calculated once for each state of the file."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _sha256(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _promised(url: urllib.parse.SplitResult, source: str | Path) -> str:
    """What the SHA-256 must begin with; "" if the address promises nothing."""
    if url.fragment:
        match = _FRAGMENT.fullmatch(url.fragment)
        if match is None:
            raise UserError(
                f"{source} ends in #{url.fragment}: only #sha256= and 64 hexadecimal digits may stand there"
            )
        return match[1].lower()
    digits = _DIGITS_IN_NAME.fullmatch(url.path) if url.hostname in _HOSTS_WITH_DIGITS else None
    return digits[1] if digits else ""


def _kept_sum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _damage(path: Path) -> str:
    """How a cached file differs from the one that was downloaded; "" if it does not, or if it was put there by hand."""
    kept = _kept_sum(path)
    try:
        expected = kept.read_text(encoding="utf-8").split()[0] if kept.is_file() else ""
    except (OSError, ValueError, IndexError):
        return f"has an unreadable checksum {kept.name}"
    if not expected or expected == sha256(path):
        return ""
    return "was damaged since it was downloaded (its SHA-256 is another)"


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weight file: name the file in it")
    origin = _ORIGINS.get(path.name)
    if origin is None:
        raise UserError(f"The weight file {path} does not exist: correct MODEL.WEIGHTS")
    original = path.with_name(origin.rsplit("/", 1)[1])
    if original.is_file():
        raise UserError(f"The weight file {path} does not exist but {original} does: set MODEL.WEIGHTS to that one")
    raise UserError(
        f"The weight file {path} does not exist: download {origin} and set MODEL.WEIGHTS to it (it is read as it is)"
    )


def _download(url: str, path: Path, promised: str) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "maskformer"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            _store(response, path, promised)
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, UnicodeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} cannot be downloaded ({reason}): fetch it elsewhere and put it at {path}, "
            f"or set MODEL.WEIGHTS to a file on this machine"
        ) from error


def _store(response: HTTPResponse, path: Path, promised: str) -> None:
    """Writes what arrives; it appears under its name only when it is complete and what was promised."""
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdigit() else None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    received, digest = 0, hashlib.sha256()
    with Progress(*columns, TimeRemainingColumn()) as progress, atomic_write(path) as file:
        task = progress.add_task(path.name, total=total)
        while block := _read(response):
            file.write(block)
            digest.update(block)
            received += len(block)
            progress.update(task, completed=received)
        if total is not None and received != total:
            raise ConnectionError(f"the connection ended after {received} of {total} bytes")
        if not digest.hexdigest().startswith(promised):
            raise ConnectionError(f"what arrives has SHA-256 {digest.hexdigest()}, not {promised}")
        # Before the file itself appears: a sum without its file is harmless, a stale one beside a new file is not.
        write_text(_kept_sum(path), f"{digest.hexdigest()}  {path.name}\n")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except OSError as error:  # told apart from an error of the disk, which has another remedy
        raise ConnectionError(str(error)) from error
