"""The inference engine: `freeze(model)` is a twin of a network, which computes the logits and their
gradient to the images fast, and nothing else.

`lower` turns the leading part of a network, its trunk, into a plan of stages, each a convolution
with all that follows it up to the next one; `Trunk` runs the plan forward and backward in kernels
of our own on CPUs, `Folded` in torch's convolutions on other devices; `Frozen` is the twin. What a
student in training computes faster is in `student`, what a network returns in `logits` and
`features`.
"""

from .features import forward_features
from .frozen import Frozen, freeze, refresh

__all__ = ["Frozen", "forward_features", "freeze", "refresh"]
