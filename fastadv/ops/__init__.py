"""The fused ops. Each is a file here, and under the same name in reference.py, kernels/, csrc/,
tests/ops/ and benchmarks/."""

from .feature_distance import feature_distance
from .margin import margin
from .pgd_step import pgd_step, pgd_step_

__all__ = ["feature_distance", "margin", "pgd_step", "pgd_step_"]
