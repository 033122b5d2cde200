"""From a network to a torch.fx graph that does the same."""

import copy
import functools
import itertools
import operator
import random
import sys
import types

import numpy as np
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
    before = list(kept(traced))
    sources = list(generators(before))
    drawn = drawing(sources)
    try:
        with torch.autocast(autocast, enabled=False):
            graph = Tracer(autocast).trace(traced)
    except Exception as error:  # whatever a network's own Python raises on a proxy
        raise Unsupported(f"torch.fx cannot trace it: {error}") from error
    if drawing(sources) != drawn:
        raise Unsupported("its forward draws random numbers, which a trace would fix")
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Unsupported("it makes tensors of its own, which a trace would fix")
    if not same(before, list(kept(traced))):
        raise Unsupported("its forward changes what it keeps, which a trace would forget")
    for further in graph.find_nodes(op="placeholder")[1:]:
        if not further.users:
            graph.erase_node(further)
    forget_dimensions(graph)
    return graph


GENERATORS = {
    random.Random: random.Random.getstate,
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: generator.get_state(legacy=False),
    torch.Generator: torch.Generator.get_state,
}


def drawing(sources):
    """The states, as text, of all that a network's forward may draw random numbers from: those of
    Python, numpy and torch, and of the `generators` in `sources`."""
    of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    states = [random.getstate(), of_numpy, torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    for value in sources:
        states += [state(value) for kind, state in GENERATORS.items() if isinstance(value, kind)]
    with np.printoptions(threshold=sys.maxsize):
        return [str(s.tolist() if isinstance(s, torch.Tensor) else s) for s in states]


def generators(held):
    """Yields the generators of random numbers among `held`, all that a network keeps, and those
    that the functions of its classes name, or functions that these name. What the operating system
    draws is not seen."""
    classes = {c for value in held if not isinstance(value, OPAQUE) for c in type(value).__mro__}
    waiting, seen = [*held, *(v for c in classes for v in vars(c).values())], {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, tuple(GENERATORS)):
            yield value
        elif isinstance(value, types.FunctionType):
            if (value.__module__ or "").partition(".")[0] != "torch":
                waiting += names(value)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, CACHED):
            waiting.append(value.__wrapped__)
        else:  # methods, as `generator.random` is one, and properties
            within = (name for name in WITHIN if hasattr(type(value), name))
            waiting += [getattr(value, name, None) for name in within]


CACHED = type(functools.cache(abs))
WITHIN = "__self__", "__func__", "fget"


def names(function):
    """The values of the names that a function uses, of its file, of modules that it names there and
    of functions around it, and those of its defaults."""
    codes, used = [function.__code__], set()
    while codes:
        code = codes.pop()
        used.update(code.co_names)
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    found = [function.__globals__[name] for name in used & function.__globals__.keys()]
    for module in [value for value in found if isinstance(value, types.ModuleType)]:
        found += [vars(module)[name] for name in used & vars(module).keys()]
    found += [c.cell_contents for c in function.__closure__ or () if c != types.CellType()]
    return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def forget_dimensions(graph):
    """Takes assertions on a number of dimensions out of a graph: with images [B, C, H, W] they hold
    always or never. What they read has one reader less."""
    for node in reversed(graph.nodes):
        condition = node.args[0] if node.target is torch._assert else None
        left = condition.args[0] if getattr(condition, "target", None) is operator.eq else None
        asserts = getattr(left, "target", None) is getattr and left.args[1] == "ndim"
        if asserts or (node.target in (operator.eq, getattr) and not node.users):
            graph.erase_node(node)


def kept(net):
    """Yields all that a network keeps in its modules' attributes, and in what these hold."""
    waiting, seen = [net], set()
    while waiting:
        value = waiting.pop()
        yield value
        if id(value) in seen or isinstance(value, OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [part for item in value.items() for part in item]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting += vars(value).values()


OPAQUE = torch.Tensor, torch.jit.ScriptModule, type, types.ModuleType, types.FunctionType
PLAIN = bool, int, float, str, type(None)


def same(first, second):
    """Whether two lists of what is `kept` are of the same objects, or of equal numbers."""
    pairs = itertools.zip_longest(first, second)
    return all(a is b or (type(a) is type(b) and type(a) in PLAIN and a == b) for a, b in pairs)


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
        return fn, [root, *given[:1], *map(default, given[1:])]

    def proxy(self, node):
        return Proxy(node, self)

    def create_node(self, *args, **kwargs):
        if torch.is_autocast_enabled(self.autocast):
            raise Unsupported("its forward enters autocast, which a trace would forget")
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise Unsupported("its forward enters no_grad, which a trace would forget")
        return super().create_node(*args, **kwargs)


def default(argument):
    """The value of an argument that is not given; the argument itself where it must be."""
    name, values = argument.node.target, argument.node.args
    if name.startswith("*"):
        return {} if name.startswith("**") else ()
    return values[0] if values else argument


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
