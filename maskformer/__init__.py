"""MaskFormer: mask classification for semantic, panoptic and instance segmentation."""

__version__ = "0.1.0.dev0"
