"""Networks by name and their weight files. All take images in [0, 1] and return logits."""

from .normalized import Normalized
from .weights import export, load, load_weights
from .zoo import KNOWN, get, register

__all__ = ["KNOWN", "Normalized", "export", "get", "load", "load_weights", "register"]
