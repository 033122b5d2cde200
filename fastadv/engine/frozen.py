"""freeze(model) makes the attack-time twin of a model: a network for inference whose only gradient
is that to its input."""

import copy
import functools
import logging
from collections import defaultdict

import torch
from torch import nn

from ..ops import _library, _native
from ..ops._torch import copy_all, hooked, observed, transformed, uncompiled
from .lower import lower
from .plan import Unsupported
from .query import cast_to, dtype_of, logits_of
from .trunk import check_refreshes

_log = logging.getLogger("fastadv")


class InPrecision(nn.Module):
    """A network that computes in `dtype` and returns its logits (see `logits_of`) in float32, or in
    float64 if that is its dtype.

    dtype: None for that of the network's parameters, or bfloat16 for autocast over float32
    parameters; ValueError for others. Images are cast to the dtype of the parameters.
    """

    def __init__(self, net, dtype=None):
        super().__init__()
        _check(dtype)
        own = dtype_of(net, dtype)
        if dtype not in (None, own) and (own, dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, must be that of the net's parameters, {own}")
        self.net = net
        self.dtype = dtype or own or torch.float32

    def forward(self, x):
        x = cast_to(self.net, x)
        low = self.is_low() and dtype_of(self.net) == torch.float32
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
            logits = logits_of(self.net(x))
        exact = torch.float64 in (self.dtype, dtype_of(self.net))
        return logits.to(torch.float64 if exact else torch.float32)

    def is_low(self):
        """Whether it computes in bfloat16."""
        return self.dtype == torch.bfloat16


class Frozen(InPrecision):
    """The twin that `freeze` returns: the model as it was at the last `refresh()`.

    net: a copy of the model, with parameters and buffers of its own. trunk: computes the
    convolutions of `net` with weights folded from these; None where the engine cannot.
    """

    @torch.inference_mode(False)  # tensors made in inference mode cannot be written to outside it
    def __init__(self, model, dtype=None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {model!r}, must be a torch.nn.Module")
        _check(dtype)
        theirs, cast = _tensors(model), _cast(model, dtype)
        copies = {id(tensor): _copied(tensor, cast) for _, _, tensor in theirs.values()}
        super().__init__(copy.deepcopy(model, copies), dtype)
        self.eval()
        self._source = [model]  # in a list, so that it is no submodule
        self._asked, self._inventory = dtype, _inventory(theirs)
        self._own, self._modules_within = _tensors(self.net), [*self.net.modules()]
        self.refreshes = 0
        self.trunk, self._head = None, []
        on_cpu = all(p.is_cpu for p in self.net.parameters())
        # Without the kernels nobody knows what the CPU has.
        known = on_cpu and not _native.missing
        self._widened = known and _native.isa() not in _native.WITH_BF16
        backends = ("auto", "native") if on_cpu else ("auto", "native", "triton", "cuda")
        if _library.backend() not in backends or self.dtype == torch.float64:
            return
        try:
            trunk, head = lower(self.net, torch.bfloat16 if self.is_low() else torch.float32)
            vars(self)["trunk"] = trunk  # so that it is no submodule either
            self._head.append(head)
        except Unsupported as reason:
            self._go_without(reason)

    def is_low(self):
        """Whether it computes in bfloat16: not on a CPU that has no products of it."""
        return self.dtype == torch.bfloat16 and not self._widened

    def train(self, mode=True):
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def load_state_dict(self, *args, **kwargs):
        """Raises RuntimeError: the trunk would not follow, and the next refresh would undo it."""
        raise RuntimeError("a twin follows its model: load into the model, then call refresh()")

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self):
        """Copies the model's present parameters and buffers into the twin's own, which stay where
        they are in memory unless the model's have another layout, dtype or device than before.
        Raises RuntimeError if the model has other parameters or buffers than when it was frozen, or
        parameters of another shape."""
        (model,) = self._source
        theirs, cast = _tensors(model), _cast(model, self._asked)
        if _inventory(theirs) != self._inventory:
            raise RuntimeError(
                f"{type(model).__name__} has other parameters or buffers, by name, shape or which "
                "are shared, than when it was frozen: freeze it anew"
            )
        self.dtype = self._asked or dtype_of(model)
        pairs = defaultdict(list)
        for name, (held, key, mine) in self._own.items():
            held[key] = mine
            if self._inventory[name][0] == name:
                its = theirs[name][-1]
                _make_room(mine, its, cast)
                pairs[mine.dtype, its.dtype].append((mine, its))
        for group in pairs.values():
            copy_all(*zip(*group, strict=True))
        self.refreshes += 1
        if self._has_trunk():
            self.trunk.refresh()

    def forward(self, x):
        logits = self._by_trunk(x) if self._has_trunk() and self._suits(x) else None
        if logits is None:
            logits = super().forward(x)
        hooks = logits is not x and not torch.compiler.is_compiling() and not transformed()
        if logits.requires_grad and hooks:
            # After a refresh torch would refuse a backward pass too, but not say why.
            logits.register_hook(functools.partial(check_refreshes, self, self.refreshes))
        return logits

    def _by_trunk(self, x):
        """The logits by trunk and head; None where the trunk cannot compute them after all."""
        (head,) = self._head
        try:
            with torch.autocast(x.device.type, enabled=False):
                return logits_of(head(self.trunk(x))).float()
        except Unsupported as reason:
            self._go_without(reason)
            return None

    def _has_trunk(self):
        """Whether there is a trunk, and the weights still have the device and dtype that it
        needs."""
        if self.trunk is None:
            return False
        weight = self.trunk.weight
        return weight.device == self.trunk.device and weight.dtype == torch.float32

    def _suits(self, x):
        """Whether the trunk can compute this input, and nothing is active that must see the modules
        run: a hook, a dispatch mode, a transform, or tensors lent by functional_call."""
        channels = self.trunk.channels
        return (
            type(x) in (torch.Tensor, nn.Parameter)
            and (x.device == self.trunk.device and x.dtype == torch.float32)
            and (x.dim() == 4 and channels in (None, x.shape[1]) and len(x) > 0)
            and not (self.trunk.opaque and observed())
            and not hooked(*self._modules_within)
            and (torch.compiler.is_compiling() or (self._whole() and not transformed()))
        )

    def _whole(self):
        """Whether the net has its own tensors: torch.func.functional_call lends it others."""
        return all(held.get(key) is mine for held, key, mine in self._own.values())

    def _go_without(self, reason):
        """Drops the trunk, for good."""
        self.trunk = None
        _say(f"freeze: {type(self.net).__name__} runs as plain torch, slower: {reason}")


def original(model):
    """The model that a twin follows; a model that is no twin is returned as it is."""
    return model._source[0] if isinstance(model, Frozen) else model


def refresh(model):
    """Brings a twin up to date, also one under torch.compile; does nothing to other models."""
    model = uncompiled(model)
    if isinstance(model, Frozen):
        model.refresh()


def _check(dtype):
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(
            f"dtype is {dtype}, must be torch.float32, torch.bfloat16 or torch.float64, or None for"
            " that of the model"
        )


def _cast(model, dtype):
    """The dtype to which a twin in `dtype` casts the model's floating point tensors; None for no
    cast."""
    if dtype in (None, dtype_of(model, dtype)):
        return None
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _tensors(net):
    """{name: (dict that holds the tensor, its key there, tensor)} of all parameters and buffers; a
    tensor that modules share is there under each of its names."""
    return {
        f"{path}.{key}": (held, key, tensor)
        for path, module in net.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    }


def _inventory(tensors):
    """{name: (the first name of the same tensor, a parameter's shape)}"""
    first = {}
    return {
        name: (
            first.setdefault(id(tensor), name),
            tensor.shape if isinstance(tensor, nn.Parameter) else None,
        )
        for name, (*_, tensor) in tensors.items()
    }


def _copied(tensor, cast):
    """A twin's own copy of a parameter or buffer, in the same layout."""
    dtype = cast if cast and tensor.is_floating_point() else tensor.dtype
    mine = tensor.detach().to(dtype, copy=True)
    return nn.Parameter(mine, False) if isinstance(tensor, nn.Parameter) else mine


def _make_room(mine, tensor, cast):
    """Gives `mine`, the twin's own, the form that `_copied` would give it, and new memory only if
    that is another form."""
    dtype = cast if cast and tensor.is_floating_point() else tensor.dtype
    if _form(mine) == (*_form(tensor)[:-1], dtype):
        return
    fresh = _copied(tensor, cast)
    if _form(mine) != _form(fresh):  # a copy of an expanded or sliced tensor is dense
        mine.data = fresh
        torch.autograd.graph.increment_version(mine)  # so that torch refuses a pending backward


def _form(tensor):
    return tensor.shape, tensor.stride(), tensor.device, tensor.dtype


@functools.cache
def _say(message):
    """Logs a warning, each only once."""
    _log.warning(message)


def freeze(model, dtype=None):
    """The attack-time twin of `model`: frozen parameters, always in eval mode, logits in float32.

    The twin is the model as it was at the last `refresh()`, with which every attack call begins. It
    has copies of all parameters and buffers, and so takes as much memory again; a change of the
    model does not show in the twin before the next refresh, and a change of anything else, such as
    a number that a module keeps, never does. After a refresh the backward passes of earlier forward
    passes are refused. Only the input gets a gradient; the model's mode and `.grad` stay as they
    are. The model may return anything that `logits_of` takes.

    dtype: of the computation, to which parameters are cast: float32, bfloat16 (by autocast) or
    float64 (in plain torch, with float64 logits); None for the model's own. Raises ValueError for
    another dtype, TypeError if the model is no module.

    Convolutions run with BatchNorm folded into further copies of their weights: in kernels of our
    own (`fastadv.engine`), differentiable once, where those are faster on this CPU (see
    `engine.lower.fastest`), otherwise in torch's convolutions, in `dtype` and channels_last, with
    weights that keep their addresses. What the engine does not know, torch computes in between. On
    a CPU without products of bfloat16 (which AMX and AVX512-BF16 have) a twin in bfloat16 computes
    in float32. In float32 the logits agree with the model's to rounding, or to a few times that
    where Winograd's algorithm computes 3 x 3 convolutions.

    A network that cannot be traced (see `engine.lower`) runs in its own modules: a warning then
    says once why, and `trunk` is None. So does every network under a torch.func
    transform or a forward-mode derivative.
    """
    return Frozen(original(model), dtype)
