"""A network behind the normalisation of its input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Numbers = Tensor | Sequence[float]


class Normalized(nn.Module):
    """`net` on (x - mean) / std: [B, C, H, W] images in [0, 1] -> the logits of `net`.

    `mean` and `std`, tensors [C] or sequences of C numbers, become the buffers `mu` and `sigma`
    [1, C, 1, 1], RobustBench's names. Raises ValueError for a `net` that normalises its input
    itself and for other numbers, TypeError for what has no numbers.
    """

    STATISTICS = ("mu", "sigma")

    def __init__(self, net: nn.Module, mean: Numbers, std: Numbers):
        if hasattr(net, "STATISTICS"):
            raise ValueError(f"net is a {type(net).__name__}, which normalises its input already")
        super().__init__()
        self.net = net
        self.register_buffer("mu", _by_channel("mean", mean))
        self.register_buffer("sigma", _by_channel("std", std))
        if self.mu.shape != self.sigma.shape:
            raise ValueError(
                f"mean has {self.mu.numel()} numbers and std {self.sigma.numel()}, must both have"
                " one per channel"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mu) / self.sigma)


def _by_channel(name: str, values: Numbers) -> Tensor:
    """The statistic `name` of the input as a tensor of its own, [1, C, 1, 1]."""
    try:
        dtype = values.dtype if isinstance(values, Tensor) else torch.get_default_dtype()
        numbers = torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or not numbers.is_floating_point():
        raise TypeError(f"{name} is {values!r}, must be one number per channel")
    return numbers.reshape(1, -1, 1, 1).clone()
