"""The fused ops. Each is a file here and, under the same name, in kernels/, csrc/cpu/, tests/ops/
and benchmarks/."""

from .apgd_step import apgd_step_
from .augment import augment
from .batch_norm import batch_norm
from .bias_relu import bias_relu
from .cross_entropy import cross_entropy
from .dlr import dlr
from .feature_distance import feature_distance
from .fold_bn import fold_bn_
from .ikl import ikl
from .margin import margin
from .mart_bce import mart_bce
from .pgd_step import pgd_step, pgd_step_
from .random_start import random_start
from .softmax_entropy import softmax_entropy
from .softmax_kl import softmax_kl

__all__ = [
    "apgd_step_",
    "augment",
    "batch_norm",
    "bias_relu",
    "cross_entropy",
    "dlr",
    "feature_distance",
    "fold_bn_",
    "ikl",
    "margin",
    "mart_bce",
    "pgd_step",
    "pgd_step_",
    "random_start",
    "softmax_entropy",
    "softmax_kl",
]
