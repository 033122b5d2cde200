"""The attack engine: an inference network's convolutions and what belongs to them, input gradient
only.

`lower` turns the leading part of a network, its trunk, into a plan of stages, each a convolution
with all that follows it up to the next one; `Trunk` runs the plan forward and backward in kernels
of our own on CPUs, `Folded` in torch's convolutions on other devices.
"""

from .folded import Folded
from .lower import lower
from .stage import Unsupported
from .trunk import Trunk

__all__ = ["Folded", "Trunk", "Unsupported", "lower"]
