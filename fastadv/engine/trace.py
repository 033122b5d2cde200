"""From a network to a torch.fx graph that does the same."""

import copy
import itertools
import operator

import torch
from torch import fx

from ..ops._torch import hooked
from .plan import Unsupported


@torch.inference_mode(False)  # the caller's modes are not the network's
@torch.enable_grad()
def trace(net, kind):
    """The graph of a network on this kind of device. Raises Unsupported where torch.fx cannot trace
    the network, or would leave out something that it does."""
    for name, module in net.named_modules():
        if "forward" in vars(module):
            raise Unsupported(f"the forward of {name or type(net).__name__} was replaced")
        if hooked(module):
            raise Unsupported(f"{name or type(net).__name__} has hooks")
    autocast = kind if torch.amp.is_autocast_available(kind) else "cpu"
    # Its forward may store what it computes, which in a trace is no tensor: in a copy, then.
    traced = copy.deepcopy(net, {id(t): t for t in (*net.parameters(), *net.buffers())})
    before = attributes(traced)
    try:
        with torch.autocast(autocast, enabled=False):
            graph = Tracer(autocast).trace(traced)
    except Exception as error:  # whatever a network's own Python raises on a proxy
        raise Unsupported(f"torch.fx cannot trace it: {error}") from error
    if not same(before, attributes(traced)):
        raise Unsupported("its forward sets attributes, which a trace would forget")
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Unsupported("it makes tensors of its own, which a trace would fix")
    return graph


def attributes(net):
    """[(name, value)] of all that the modules of a network keep."""
    modules = net.modules()
    kept = ({**vars(m), **m._parameters, **m._buffers, **m._modules} for m in modules)
    return [item for one in kept for item in one.items()]


def same(first, second):
    """Whether two lists of `attributes` have the same names and objects."""
    pairs = itertools.zip_longest(first, second, fillvalue=("", None))
    return all(a == b and x is y for (a, x), (b, y) in pairs)


class Tracer(fx.Tracer):
    """A tracer that keeps buffers symbolic and tells sums in place from others; it refuses to enter
    autocast on devices of the kind `autocast`, which would be no part of the graph."""

    proxy_buffer_attributes = True

    def __init__(self, autocast):
        super().__init__()
        self.autocast = autocast

    def create_args_for_root(self, *args, **kwargs):
        """With the defaults of the forward's further arguments, which a twin is never given."""
        fn, (root, *given) = super().create_args_for_root(*args, **kwargs)
        further = (arg.node.args[0] if arg.node.args else arg for arg in given[1:])
        return fn, [root, *given[:1], *further]

    def proxy(self, node):
        return Proxy(node, self)

    def create_node(self, *args, **kwargs):
        if torch.is_autocast_enabled(self.autocast):
            raise Unsupported("its forward enters autocast, which a trace would forget")
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise Unsupported("its forward enters no_grad, which a trace would forget")
        return super().create_node(*args, **kwargs)


def _in_place(function):
    """The method of a proxy that notes a call of this function: of its own, fx would note `a += b`
    as `a + b`."""

    def note(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return note


_ARITHMETIC = "add sub mul truediv floordiv mod pow and or xor lshift rshift"
IN_PLACE = [f"__i{name}__" for name in _ARITHMETIC.split()]


class Proxy(fx.Proxy):
    pass


for _name in IN_PLACE:
    setattr(Proxy, _name, _in_place(getattr(operator, _name)))
