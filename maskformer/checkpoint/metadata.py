"""What the classes of a checkpoint mean, read from the file itself, so that its data set need not be there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskformer.checkpoint.files import read_torch_file, recognise
from maskformer.checkpoint.sources import local_source
from maskformer.data.dataset import Metadata
from maskformer.errors import UserError

CONFIG_SECTION = "maskformer"
_NEEDED = {"classes", "things", "colors", "ignore_label"}


def checkpoint_metadata(weights: str | Path) -> Metadata | None:
    """Names, things, colours and ignore label kept in a checkpoint of ours; None for weight files without them.

    Args:
        weights: anything that `sources.open_weights` reads.

    Raises:
        UserError: if the file cannot be had or is damaged.
    """
    path = local_source(weights)
    if path is None:
        return None
    if path.is_dir():
        return metadata_in({"metadata": _kept_in_config(path / "config.json")}, path)
    content = read_torch_file(path, mapped=True) if recognise(path) == "torch" else None
    return metadata_in(content, path) if isinstance(content, Mapping) else None


def _kept_in_config(path: Path) -> Any:
    """What `integrations.huggingface` keeps of the classes in a ``config.json``; others only have names there."""
    try:
        section = json.loads(path.read_text(encoding="utf-8")).get(CONFIG_SECTION)
    except OSError:
        return None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): download or copy it again") from error
    return section


def metadata_in(checkpoint: Mapping[str, Any], path: Path) -> Metadata | None:
    """The same of a checkpoint that has been read; `path` is named in errors.

    Raises:
        UserError: if what the file says about its classes contradicts itself.
    """
    fields = checkpoint.get("metadata")
    if not isinstance(fields, Mapping) or not fields.keys() >= _NEEDED:
        return None
    try:
        classes = [str(name) for name in fields["classes"]]
        return Metadata(
            name=str(fields.get("name", path.name)),
            classes=classes,
            things=[bool(thing) for thing in fields["things"]],
            colors=[(int(r), int(g), int(b)) for r, g, b in fields["colors"]],
            ignore_label=int(fields["ignore_label"]),
            evaluators=tuple(fields.get("evaluators", ())),
            dataset_ids=list(fields.get("dataset_ids", range(len(classes)))),
            truth=tuple(fields.get("truth", ())),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has damaged metadata ({error}): name another checkpoint of that run") from error
