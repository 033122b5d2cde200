"""A training run: its Config, its folder on the disk, checkpoints, log, and its processes."""

from .config import Config

__all__ = ["Config"]
