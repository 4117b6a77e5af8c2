"""At home in Detectron2: importing this registers our modules in Detectron2's registries, under the published names.

Nothing else of the project imports Detectron2; see docs/detectron2.md for how to have it.
"""

from maskformer.integrations.detectron2._presence import MissingDetectron2Error
from maskformer.integrations.detectron2.config import add_maskformer_config

__all__ = ["MissingDetectron2Error", "add_maskformer_config"]
