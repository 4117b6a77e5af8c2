"""Backbones: (B, 3, H, W) images in, a dict of feature maps res2 … res5 out."""

from maskformer.modeling.backbones.build import build_backbone, needed_features
from maskformer.modeling.backbones.freezing import Backbone
from maskformer.modeling.backbones.recomputation import recompute_activations
from maskformer.modeling.backbones.swin import SwinBackbone
from maskformer.modeling.backbones.timm import TimmBackbone, make_resnet, make_timm_pyramid

__all__ = [
    "Backbone",
    "SwinBackbone",
    "TimmBackbone",
    "build_backbone",
    "make_resnet",
    "make_timm_pyramid",
    "needed_features",
    "recompute_activations",
]
