"""At home in Detectron2: importing this registers our modules in Detectron2's registries, under the published names.

Nothing else of the project imports Detectron2; see docs/detectron2.md for how to have it.
"""

from maskformer.integrations.detectron2._presence import MissingDetectron2Error
from maskformer.integrations.detectron2.backbones import D2SwinTransformer, Detectron2Backbone, TimmBackbone
from maskformer.integrations.detectron2.catalog import register_datasets
from maskformer.integrations.detectron2.config import add_maskformer_config
from maskformer.integrations.detectron2.data import MaskFormerMapper
from maskformer.integrations.detectron2.evaluation import MaskFormerEvaluator
from maskformer.integrations.detectron2.heads import MaskFormerHead, PerPixelBaselineHead, PerPixelBaselinePlusHead
from maskformer.integrations.detectron2.meta_arch import MaskFormer
from maskformer.integrations.detectron2.pixel_decoders import BasePixelDecoder, TransformerEncoderPixelDecoder
from maskformer.integrations.detectron2.results import to_detectron2
from maskformer.integrations.detectron2.training import Trainer
from maskformer.integrations.detectron2.weights import MaskFormerCheckpointer

__all__ = [
    "BasePixelDecoder",
    "D2SwinTransformer",
    "Detectron2Backbone",
    "MaskFormer",
    "MaskFormerCheckpointer",
    "MaskFormerEvaluator",
    "MaskFormerHead",
    "MaskFormerMapper",
    "MissingDetectron2Error",
    "PerPixelBaselineHead",
    "PerPixelBaselinePlusHead",
    "TimmBackbone",
    "Trainer",
    "TransformerEncoderPixelDecoder",
    "add_maskformer_config",
    "register_datasets",
    "to_detectron2",
]

register_datasets()
