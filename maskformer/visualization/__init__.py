"""Pictures of results: overlays with names and legends, legible from 128 pixels to 4k."""

from maskformer.visualization.canvas import LegendEntry, add_legend, add_title, read_array, side_by_side
from maskformer.visualization.overlays import (
    Overlay,
    draw_instances,
    draw_panoptic,
    draw_semantic,
    instance_overlay,
    panoptic_overlay,
    semantic_overlay,
)

__all__ = [
    "LegendEntry",
    "Overlay",
    "add_legend",
    "add_title",
    "draw_instances",
    "draw_panoptic",
    "draw_semantic",
    "instance_overlay",
    "panoptic_overlay",
    "read_array",
    "semantic_overlay",
    "side_by_side",
]
