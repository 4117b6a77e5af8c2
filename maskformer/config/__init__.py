"""The config: :func:`get_cfg` reads it, :func:`dump` writes it, :func:`validate` checks it."""

from maskformer.config.loading import find_config, shipped_configs
from maskformer.config.tree import CfgNode, dump, get_cfg, validate

__all__ = ["CfgNode", "dump", "find_config", "get_cfg", "shipped_configs", "validate"]
