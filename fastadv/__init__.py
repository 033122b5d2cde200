"""fastadv: compiled kernels, attacks and a small trainer for adversarial robustness in PyTorch."""

__version__ = "0.1.0"

from . import attacks, losses, methods, ops
from .frozen import freeze

__all__ = ["attacks", "freeze", "losses", "methods", "ops"]
