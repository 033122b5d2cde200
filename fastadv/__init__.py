"""fastadv: compiled kernels, attacks and a small trainer for adversarial robustness in PyTorch."""

__version__ = "0.1.0"

from . import ops

__all__ = ["ops"]
