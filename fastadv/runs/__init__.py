"""A run and what is on the disk of it: its Config, its folder, checkpoints, log and processes."""

from .config import Config

__all__ = ["Config"]
