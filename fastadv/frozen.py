"""freeze(model): the attack-time twin of a model, an inference network with one gradient, to the
input."""

import copy

import torch
from torch import nn


class InPrecision(nn.Module):
    """A network computing in `dtype` (float32 or bfloat16, by autocast) that returns float32."""

    def __init__(self, net, dtype=torch.float32):
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, must be torch.float32 or torch.bfloat16")
        self.net = net
        self.dtype = dtype

    def forward(self, x):
        low = self.dtype == torch.bfloat16
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
            return self.net(x).float()


class Frozen(InPrecision):
    """What `freeze` returns: `net` shares the memory of the model's parameters and buffers."""

    def __init__(self, model, dtype=torch.float32):
        shared = {id(b): b for b in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        super().__init__(copy.deepcopy(model, shared), dtype)
        self.eval()
        self._source = [model]  # in a list, so that it is no submodule

    def train(self, mode=True):
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def refresh(self):
        """Follows the model to its present tensors; in-place updates show without it."""
        (model,) = self._source
        for mine, its in zip(self.net.parameters(), model.parameters(), strict=True):
            mine.data = its.detach()
        for mine, its in zip(self.net.buffers(), model.buffers(), strict=True):
            if mine is not its:
                mine.data = its


def freeze(model, dtype=torch.float32):
    """The attack-time twin of `model`: frozen parameters, always in eval mode, float32 logits.

    It is exact in float32: the twin shares the model's memory, so nothing is copied and every
    update of the model shows at once; `refresh()`, which each attack call runs first, also follows
    tensors that were replaced (`.data =`, `.to()`). The model's own mode and `.grad` stay as they
    are. dtype bfloat16 runs the same network under autocast. Raises ValueError for other dtypes.
    """
    return Frozen(model, dtype)
