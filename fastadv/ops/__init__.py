"""The fused ops. Each is a file here, and under the same name in reference.py, kernels/, csrc/,
tests/ops/ and benchmarks/."""

from .augment import augment
from .pgd_step import pgd_step, pgd_step_
from .random_start import random_start

__all__ = ["augment", "pgd_step", "pgd_step_", "random_start"]
