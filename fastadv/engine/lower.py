"""From a network to the plan of its trunk."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from .plan import FusedLayer, Ref, Unsupported, pair
from .trace import trace
from .trunk import Trunk


def lower(net, dtype, executor=Trunk):
    """(trunk, head) of a network in eval mode: head(trunk(x)) are its logits. The trunk is made by
    `executor`, Trunk for a CPU or Folded for any device; dtype: see there.

    The trunk has convolutions (any stride, padding and dilation; dense, or one filter per channel),
    BatchNorm, ReLU, ReLU6, SiLU, residual sums, zero padding, average pooling and the input's
    normalisation. The head is all that follows, and runs in torch. Raises Unsupported where the
    network cannot be traced, has a convolution behind an operation of another kind, branches other
    than by residual sums, or is spread over devices.
    """
    devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
    if len(devices) != 1:
        raise Unsupported(f"its tensors are on {len(devices)} devices")
    kind = devices.pop().type
    graph = trace(net, kind)
    lowering = Lowering(net, graph)
    boundary = lowering.boundary()
    head = _head(net, graph, lowering.found, boundary)
    plan = lowering.plan(boundary)
    others = {str(t.dtype) for layer in plan for t in layer.tensors()} - {"torch.float32"}
    if others:
        raise Unsupported(f"its weights are {', '.join(sorted(others))}")
    affine = functools.partial(image_affine, net, plan[0].conv.weight, lowering.image.steps)
    return executor(plan, affine, dtype), head


def image_affine(net, weight, steps):
    """(scale, shift) fp32 [C], to which these steps of an Image come; weight: that of the first
    convolution, which reads the image."""
    exact = {"dtype": torch.float32, "device": weight.device}
    scale, shift = torch.ones(weight.shape[1], **exact), torch.zeros(weight.shape[1], **exact)
    for operation, constant in steps:
        if isinstance(constant, str):
            constant = operator.attrgetter(constant)(net).flatten().float()
        if operation in (torch.mul, torch.div):
            scale = operation(scale, constant)
        shift = operation(shift, constant)
    return scale.contiguous(), shift.contiguous()


class Image:
    """The network's input after `steps`, each an operation of torch and its constant: a number, or
    the name of a buffer."""

    def __init__(self, steps=()):
        self.steps = steps


class Lowering:
    """Walks a graph and makes a plan of the nodes that a trunk can compute.

    found: {node: its result} of these nodes, as an Image, a Ref or, for zero padding, either of
    them with the zeros around it. layers: the FusedLayers so far. The methods that FUNCTIONS and
    MODULES name take a node, and its module if it calls one, and return its result, or None where
    the trunk cannot compute it.
    """

    def __init__(self, net, graph):
        self.net, self.graph = net, graph
        self.modules = dict(net.named_modules())
        self.found, self.layers = {}, []
        for node in graph.nodes:
            value = self.value(node)
            if value is not None:
                self.found[node] = value

    def value(self, node):
        """The result of a node, None for one that the trunk does not compute."""
        if node.op == "placeholder":
            return None if self.found else Image()
        if node.op in ("get_attr", "output"):
            return None
        module = self.modules[node.target] if node.op == "call_module" else None
        name = FUNCTIONS.get(node.target) if module is None else MODULES.get(type(module))
        if name is None or not node.args or not set(node.kwargs) <= KEYWORDS:
            return None
        return getattr(self, name)(node, module)

    def ref(self, node):
        """The Ref that is a node's result, or None."""
        value = self.found.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Ref) else None

    def convolve(self, node, conv):
        source, pad = self.source(node.args[0])
        depthwise = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if source is None or not plain or (conv.groups > 1 and not depthwise):
            return None
        if isinstance(source, Image):
            if depthwise or self.layers:
                return None
            self.image = source
            source = None
        elif not self.layers:
            return None
        top, left = pair(conv.padding)
        padding = tuple(p + q for p, q in zip(pad, (left, left, top, top), strict=True))
        return self.add_layer(FusedLayer(source, conv.out_channels, conv=conv, padding=padding))

    def source(self, node):
        """(result of a node, the zeros around it), as a convolution reads them."""
        value = self.found.get(node)
        return value if isinstance(value, tuple) else (value, (0, 0, 0, 0))

    def add_layer(self, layer):
        self.layers.append(layer)
        return layer.out

    def normalise(self, node, norm):
        ref, single = self.ref(node.args[0]), len(node.args[0].users) == 1
        if ref is None or ref.side == "active" or not norm.track_running_stats:
            return None
        layer = ref.layer
        fresh = layer.norm is None and layer.before is None and layer.activation is None
        if single and fresh and layer.conv is not None:
            layer.norm = norm
            return ref
        if layer.activation is not None:
            return None
        layer.affine, layer.activation = norm, "none"
        return layer.active

    def activate(self, node, module, activation="relu", cap=float("inf")):
        ref, single = self.ref(node.args[0]), len(node.args[0].users) == 1
        inplace = module.inplace if module else node.target == "relu_" or any(node.kwargs.values())
        if ref is None or (inplace and not single):
            return None
        pending = ref.side == "active" and ref.layer.activation == "none" and single
        if not pending and (ref.side == "active" or ref.layer.activation is not None):
            return None
        ref.layer.activation, ref.layer.cap = activation, cap
        return ref.layer.active

    def relu6(self, node, module):
        return self.activate(node, module, cap=6.0)

    def silu(self, node, module):
        return self.activate(node, module, activation="silu")

    def same(self, node, _):
        return self.found.get(node.args[0]) if len(node.args[0].users) == 1 else None

    def dropout(self, node, _):
        return self.same(node, _) if node.kwargs.get("training") is False else None

    def add(self, node, _):
        refs = [self.ref(arg) for arg in node.args]
        if len(refs) != 2 or None in refs:
            return self.image_step(node, _)
        if node.target in (operator.iadd, "add_") and len(node.args[0].users) > 1:
            return None
        order = sorted(range(2), key=lambda i: self.layers.index(refs[i].layer))
        into, other = refs[order[1]], refs[order[0]]
        layer, single = into.layer, len(node.args[order[1]].users) == 1
        free = into.side == "out" and layer.before is None and layer.activation is None
        if not (free and single and layer is not other.layer and layer.conv is not None):
            return None
        if layer.channels != other.layer.channels:
            return None
        layer.before = other
        return into

    def image_step(self, node, _):
        """The image plus or times a constant: a number, or a buffer of one value per channel."""
        image = self.found.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        operation = STEPS.get(node.target)
        if operation is None or not isinstance(image, Image) or len(node.args) != 2:
            return None
        constant = node.args[1]
        if isinstance(constant, fx.Node):
            if constant.op != "get_attr":
                return None
            constant = constant.target
            shape = operator.attrgetter(constant)(self.net).shape
            if shape.numel() > 1 and (len(shape) < 3 or shape[-3] != shape.numel()):
                return None
        elif not isinstance(constant, (int, float)):
            return None
        return Image((*image.steps, (operation, constant)))

    def pad(self, node, _):
        (source, before), pad = self.source(node.args[0]), node.args[1]
        zeros = node.kwargs.get("mode") == "constant" and not node.kwargs.get("value")
        known = zeros and len(node.args) == 2 and len(node.all_input_nodes) == 1  # fixed widths
        if source is None or not known or len(pad) != 4 or min(pad) < 0:
            return None
        return source, tuple(p + q for p, q in zip(before, pad, strict=True))

    def pool(self, node, module):
        ref = self.ref(node.args[0])
        size, stride = (
            (module.kernel_size, module.stride)
            if module
            else (node.args[1], node.args[2] if len(node.args) > 2 else None)
        )
        odd = module and (module.padding or module.ceil_mode or module.divisor_override)
        if ref is None or odd or len(node.args) > 3 or len(node.all_input_nodes) > 1:
            return None
        window = pair(size), pair(size if stride is None else stride)
        return self.add_layer(FusedLayer(ref, ref.layer.channels, window=window))

    def adaptive_pool(self, node, module):
        ref, size = self.ref(node.args[0]), module.output_size if module else node.args[1]
        if ref is None or len(node.all_input_nodes) > 1 or None in pair(size):
            return None
        return self.add_layer(FusedLayer(ref, ref.layer.channels, adaptive=pair(size)))

    def boundary(self):
        """The one node of the trunk that the head reads; Unsupported if there are others, or if
        the head has a convolution."""
        beyond = [n for n in self.graph.nodes if n not in self.found and n.op != "get_attr"]
        read = {source for node in beyond for source in node.all_input_nodes} & self.found.keys()
        for node in beyond:
            if node.op == "call_module" and isinstance(self.modules[node.target], nn.Conv2d):
                raise Unsupported(f"{self.describe(beyond[0])} is not known to the engine")
        if len(read) != 1 or self.ref(next(iter(read))) is None:
            raise Unsupported("it does not end in one path of features")
        return next(iter(read))

    def describe(self, node):
        """A node in words: a module by path and class, another one by its name."""
        if node.op != "call_module":
            return node.name
        return f"{node.target} ({type(self.modules[node.target]).__name__}, as it is set)"

    def plan(self, boundary):
        """The layers that the boundary needs, in order of computation. The last one has `out` as
        its only result: where the boundary is something else, an average over 1 x 1 copies it."""
        ref = self.found[boundary]
        if ref.side != "out" or ref.layer.conv is not None:
            ref = self.add_layer(FusedLayer(ref, ref.layer.channels, window=((1, 1), (1, 1))))
        needed = {ref.layer}
        for layer in reversed(self.layers):
            if layer in needed:
                needed |= {read.layer for read in layer.reads}
        layers = [layer for layer in self.layers if layer in needed]
        for layer in layers:
            added = [other.before for other in layers]
            convolved = [other.source for other in layers]
            for read in (layer.out, layer.active):
                alone = read.side == "active" and read in added and read not in convolved
                if added.count(read) > 1 or alone:
                    raise Unsupported("a residual branches in a way that is not known")
        return layers


# Arguments that a node may have by keyword. fx has those of torch.nn.functional so.
KEYWORDS = {"inplace", "mode", "value", "p", "training"}
MODULES = {
    nn.Conv2d: "convolve",
    nn.BatchNorm2d: "normalise",
    nn.ReLU: "activate",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Identity: "same",
    nn.Dropout: "same",
    nn.Dropout2d: "same",
    nn.AvgPool2d: "pool",
    nn.AdaptiveAvgPool2d: "adaptive_pool",
}
# The operations on an image that are its normalisation, none of them in place.
STEPS = {
    operator.add: torch.add,
    torch.add: torch.add,
    "add": torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
}
FUNCTIONS = {
    F.relu: "activate",
    torch.relu: "activate",
    "relu": "activate",
    "relu_": "activate",
    F.relu6: "relu6",
    F.silu: "silu",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add": "add",
    "add_": "add",
    operator.sub: "image_step",
    operator.mul: "image_step",
    operator.truediv: "image_step",
    F.dropout: "dropout",
    F.pad: "pad",
    F.avg_pool2d: "pool",
    F.adaptive_avg_pool2d: "adaptive_pool",
}


def _head(net, graph, found, boundary):
    """A module that computes what follows the boundary from the boundary's result."""
    head, copies = fx.Graph(), {}
    copies[boundary] = head.placeholder("features")
    for node in graph.nodes:
        if node in found:
            continue
        if any(source not in copies for source in node.all_input_nodes):
            raise Unsupported("it does not end in one path of features")
        copies[node] = head.node_copy(node, copies.__getitem__)
    return fx.GraphModule(net, head).eval()
