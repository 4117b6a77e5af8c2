"""Weights and checkpoints: reading every family of weight files safely, writing atomically, resuming a run."""

from maskformer.checkpoint.exporting import export_published, published_state_dict
from maskformer.checkpoint.loading import LoadingReport, load_weights, read_state_dict
from maskformer.checkpoint.metadata import checkpoint_metadata, metadata_in
from maskformer.checkpoint.training import (
    FINAL_NAME,
    find_last_checkpoint,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    save_model,
)

__all__ = [
    "FINAL_NAME",
    "LoadingReport",
    "checkpoint_metadata",
    "export_published",
    "find_last_checkpoint",
    "load_checkpoint",
    "load_weights",
    "metadata_in",
    "published_state_dict",
    "read_state_dict",
    "restore_model",
    "save_checkpoint",
    "save_model",
]
