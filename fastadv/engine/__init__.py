"""The inference engine: `freeze(model)` makes a twin of a network, which computes the logits and
their gradient to the images fast, and nothing else.

- `frozen`: the twin itself, and when it follows the model.
- `trace`, `segments`, `plan`: the network becomes a graph, and the parts of it that the engine
  computes, its segments, become layers: each is a convolution with all that follows it up to the
  next one.
- `lower`: puts the network together again, each segment by its fastest executor.
- `trunk`: runs a segment on CPUs, in kernels of our own, forward and backward; its weights are in
  `packed`, its memory in `workspace`, its index tables in `taps`.
- `folded`: runs a segment on any device, in torch's convolutions.
- `mixed`: runs a network that torch computes in part.
- `student`: makes a network in training faster, instead of its frozen twin.
- `query`, `features`: ask any network for its logits or its features.
"""

from .features import forward_features
from .frozen import Frozen, freeze, refresh

__all__ = ["Frozen", "forward_features", "freeze", "refresh"]
