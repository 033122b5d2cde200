"""Training: `train(config)` runs what a `fastadv.runs.Config` describes."""

from .loop import train

__all__ = ["train"]
