"""Runs a network whose segments the engine computes, and torch what is between them."""

import torch
from torch import nn


class Mixed(nn.Module):
    """fp32 images [B, C, H, W] -> what `body` returns, a module that computes the network and calls
    the `segments`, each a Trunk or a Folded. dtype: of the segments, and of torch's own part by
    autocast, float32 or bfloat16."""

    channels = None  # of images: where they do not fit, torch itself says so

    def __init__(self, body, segments, dtype):
        super().__init__()
        self.body, self.dtype = body, dtype
        self.segments = tuple(segments)
        self.eval()

    @property
    def device(self):
        return self.segments[0].device

    @property
    def weight(self):
        return self.segments[0].weight

    @property
    def opaque(self):
        """Whether a dispatch mode of torch would not see all that runs."""
        return any(segment.opaque for segment in self.segments)

    def refresh(self):
        """Has all segments follow the present weights."""
        for segment in self.segments:
            segment.refresh()

    def forward(self, x):
        low = self.dtype == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            return self.body(x)


class Part(nn.Module):
    """A segment as the module that a graph calls."""

    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def forward(self, x):
        return self.executor(x)
