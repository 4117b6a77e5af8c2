"""Data sets by name, augmentation recipes and loaders."""

from maskformer.data.catalog import Dataset, Metadata, dataset_names, get_dataset, get_metadata, register_dataset
from maskformer.data.checks import check_dataset_against_config
from maskformer.data.loading import TestLoader, TrainLoader, build_test_loader, build_train_loader
from maskformer.data.recipes import build_recipe

__all__ = [
    "Dataset",
    "Metadata",
    "TestLoader",
    "TrainLoader",
    "build_recipe",
    "build_test_loader",
    "build_train_loader",
    "check_dataset_against_config",
    "dataset_names",
    "get_dataset",
    "get_metadata",
    "register_dataset",
]
