"""The inference engine: `freeze(model)` makes a twin of a network, which computes the logits and
their gradient to the images fast, and nothing else.

- `frozen`: the twin itself, and when it follows the model.
- `trace`, `lower`, `plan`: the network becomes a graph, and the leading part of the graph, the
  trunk, a plan of layers: each is a convolution with all that follows it up to the next one.
- `trunk`: runs a plan on CPUs, in kernels of our own, forward and backward; its weights are in
  `packed`, its memory in `workspace`, its index tables in `taps`.
- `folded`: runs a plan on other devices, in torch's convolutions.
- `student`: makes a network in training faster, instead of its frozen twin.
- `query`, `features`: ask any network for its logits or its features.
"""

from .features import forward_features
from .frozen import Frozen, freeze, refresh

__all__ = ["Frozen", "forward_features", "freeze", "refresh"]
