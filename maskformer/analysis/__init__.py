"""What a model costs: parameters, multiply-adds, time and memory, measured without data."""

from maskformer.analysis.flops import FlopCounts, count_flops
from maskformer.analysis.inputs import counting_size, random_samples, training_size
from maskformer.analysis.memory import measure_training_memory
from maskformer.analysis.parameters import PartParameters, count_parts
from maskformer.analysis.speed import measure_speed
from maskformer.analysis.structure import ModuleCosts, module_costs

__all__ = [
    "FlopCounts",
    "ModuleCosts",
    "PartParameters",
    "count_flops",
    "count_parts",
    "counting_size",
    "measure_speed",
    "measure_training_memory",
    "module_costs",
    "random_samples",
    "training_size",
]
