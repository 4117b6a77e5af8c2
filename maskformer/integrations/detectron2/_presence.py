"""Whether Detectron2 is there, asked before anything else of this package is imported."""

from __future__ import annotations

import importlib

from maskformer.errors import UserError


class MissingDetectron2Error(UserError, ImportError):
    """Detectron2 is not installed, or cannot be imported."""


try:
    # Its models, not only the package: those need the compiled part too.
    importlib.import_module("detectron2.modeling")
except ImportError as error:
    raise MissingDetectron2Error(
        f"maskformer.integrations.detectron2 needs Detectron2, which cannot be imported ({error}): "
        "build it from its source as docs/detectron2.md says"
    ) from error
