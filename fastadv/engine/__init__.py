"""The attack engine on CPUs: a network's convolutions in kernels of our own, input gradient only.

`lower` turns the leading part of a network, its trunk, into a plan of stages, each a convolution
with all that follows it up to the next one; `Trunk` runs the plan forward and backward.
"""

from .lower import hooked, lower
from .stage import Unsupported
from .trunk import Trunk

__all__ = ["Trunk", "Unsupported", "hooked", "lower"]
