"""freeze(model): the attack-time twin of a model, an inference network with one gradient, to the
input."""

import copy
import functools
import logging

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _library, _native
from .engine import Folded, Unsupported, lower
from .hooks import hooked

_log = logging.getLogger("fastadv")


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
    """What `freeze` returns. `net` shares the memory of the model's parameters and buffers; `trunk`
    computes its convolutions with folded copies of them, None where the engine cannot."""

    def __init__(self, model, dtype=torch.float32):
        shared = {id(b): b for b in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        super().__init__(copy.deepcopy(model, shared), dtype)
        self.eval()
        self._source = [model]  # in a list, so that it is no submodule
        self.trunk, self._head = None, []
        on_cpu = all(p.is_cpu for p in self.net.parameters())
        backends = ("auto", "native") if on_cpu else ("auto", "native", "triton", "cuda")
        if _library.backend() not in backends or (on_cpu and _native.missing):
            return
        if on_cpu and _native.isa() != "amx":
            dtype = torch.float32  # without tiles bfloat16 would gain nothing
        try:
            trunk, head = lower(self.net, dtype)
            vars(self)["trunk"] = trunk  # so that it is no submodule either
            self._head.append(head)
            self.refresh()
        except Unsupported as reason:
            self._go_without(reason)

    def train(self, mode=True):
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def refresh(self):
        """Follows the model to its present tensors, and folds the trunk's weights anew."""
        (model,) = self._source
        for mine, its in zip(self.net.parameters(), model.parameters(), strict=True):
            mine.data = its.detach()
        for mine, its in zip(self.net.buffers(), model.buffers(), strict=True):
            if mine is not its:
                mine.data = its
        if self._has_trunk():
            self.trunk.refresh()

    def forward(self, x):
        if not (self._has_trunk() and self._suits(x)):
            return super().forward(x)
        (head,) = self._head
        try:
            with torch.autocast(x.device.type, enabled=False):
                return head(self.trunk(x)).float()
        except Unsupported as reason:
            self._go_without(reason)
            return super().forward(x)

    def _has_trunk(self):
        """Whether there is a trunk, and the weights are still as it takes them."""
        if self.trunk is None:
            return False
        weight = self.trunk.stages[0].conv.weight
        return weight.device == self.trunk.device and weight.dtype == torch.float32

    def _suits(self, x):
        """Whether the trunk takes this input, and nothing waits for what only modules compute."""
        channels = self.trunk.stages[0].conv.in_channels
        return (
            type(x) in (torch.Tensor, nn.Parameter)
            and (x.device == self.trunk.device and x.dtype == torch.float32)
            and (x.dim() == 4 and x.shape[1] == channels and len(x) > 0)
            and (isinstance(self.trunk, Folded) or _get_current_dispatch_mode() is None)
            and not any(map(hooked, self.net.modules()))
        )

    def _go_without(self, reason):
        self.trunk = None
        _say(f"freeze: {type(self.net).__name__} runs as plain torch, slower: {reason}")


def refresh(model):
    """Brings a twin up to date, also one under torch.compile; other models are as they are."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, Frozen):
        model.refresh()


@functools.cache
def _say(message):
    """Warns once."""
    _log.warning(message)


def freeze(model, dtype=torch.float32):
    """The attack-time twin of `model`: frozen parameters, always in eval mode, float32 logits.

    BatchNorm is folded into copies of the convolutions' weights, which each attack call makes anew
    by `refresh()`: a change of the model in between shows in full after the next one. On a CPU the
    convolutions run in kernels of our own (`fastadv.engine`), in float32 or, on processors with
    AMX, in bfloat16 where that is the dtype; on other devices in torch's, in `dtype`, channels_last
    and with weights that keep their addresses. In float32, logits agree with the model's to
    rounding. What the engine does not know (see `engine.lower`; a warning says what, once, and
    `trunk` is then None) runs as the model's own modules on its own memory, under autocast for
    bfloat16. Only the input gets a gradient; the model's mode and `.grad` stay as they are.
    Raises ValueError for other dtypes.
    """
    if isinstance(model, Frozen):
        (model,) = model._source
    return Frozen(model, dtype)
