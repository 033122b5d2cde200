"""From a network's graph to its segments, the parts of it that the engine computes."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from .plan import ITSELF, FusedLayer, Ref, Segment, pair

FEW = 8  # So few channels are read as patches, which would be large for more.


class Image:
    """The network's input after `steps`, each an operation of torch and its constant: a number, or
    the name of a buffer."""

    def __init__(self, node, steps=()):
        self.node, self.steps = node, steps


class Lowering:
    """Walks a graph and finds its segments. A segment is all that follows from one tensor by
    convolutions (any stride, padding, dilation and groups), BatchNorm, ReLU, ReLU6, SiLU, residual
    sums, zero padding and average pooling; of the input also its normalisation.

    found: {node: its result} of what the segments compute, as an Image, a Ref or, for zero padding,
    either of them with the zeros around it. segments: {layer: the segment that has it}. begins:
    {segment: the node that it reads}. entries: {node that torch computes: the Ref with which a
    segment begins there}. same_as: {node: the one whose result it passes on}. The methods that
    FUNCTIONS and MODULES name take a node, and its module if it calls one, and return its result,
    or None where it is left to torch.
    """

    def __init__(self, net, graph):
        self.net, self.graph = net, graph
        self.modules = dict(net.named_modules())
        self.found, self.segments, self.begins, self.entries = {}, {}, {}, {}
        self.same_as = {}
        for node in graph.nodes:
            value = self.value(node)
            if value is not None:
                self.found[node] = value

    def value(self, node):
        """The result of a node, None for one that is left to torch."""
        if node.op == "placeholder":
            return None if self.found else Image(node)
        if node.op in ("get_attr", "output"):
            return None
        module = self.modules[node.target] if node.op == "call_module" else None
        name = FUNCTIONS.get(node.target) if module is None else MODULES.get(type(module))
        if name is None or not node.args or not set(node.kwargs) <= KEYWORDS:
            return None
        return getattr(self, name)(node, module)

    def ref(self, node):
        """The Ref that is a node's result, or with which a segment begins there; or None."""
        value = self.found.get(node) if isinstance(node, fx.Node) else None
        value = self.entries.get(node) if value is None else value
        return value if isinstance(value, Ref) else None

    def begin(self, node, steps=None):
        """A new segment that reads a node's result."""
        segment = Segment(steps)
        self.begins[segment] = node
        return segment

    def alone(self, node):
        """Whether one node reads a result, under whatever name."""
        before = self.same_as.get(node)
        return len(node.users) == 1 and (before is None or self.alone(before))

    def enter(self, node, channels):
        """The Ref with which a segment begins at a node that torch computes."""
        if node not in self.entries:
            entry = FusedLayer(None, channels, window=ITSELF)
            self.entries[node] = self.add_layer(entry, self.begin(node))
        return self.entries[node]

    def convolve(self, node, conv):
        source, pad = self.source(node.args[0])
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        segment = None
        if isinstance(source, Image) and conv.groups == 1 and conv.in_channels <= FEW:
            source, segment = None, self.begin(source.node, source.steps)
        elif not isinstance(source, Ref):
            source, pad = self.enter(node.args[0], conv.in_channels), (0, 0, 0, 0)
        top, left = pair(conv.padding)
        padding = tuple(p + q for p, q in zip(pad, (left, left, top, top), strict=True))
        layer = FusedLayer(source, conv.out_channels, conv=conv, padding=padding)
        return self.add_layer(layer, segment)

    def source(self, node):
        """(result of a node, the zeros around it), as a convolution reads them."""
        value = self.found.get(node)
        return value if isinstance(value, tuple) else (value, (0, 0, 0, 0))

    def add_layer(self, layer, segment=None):
        """Adds a layer to the segment that has its source."""
        segment = segment or self.segments[layer.source.layer]
        self.segments[layer] = segment
        segment.layers.append(layer)
        return layer.out

    def normalise(self, node, norm):
        source, single = node.args[0], self.alone(node.args[0])
        if not norm.track_running_stats or (source in self.found and not self.ref(source)):
            return None
        ref = self.ref(source) or self.enter(source, norm.num_features)
        layer = ref.layer
        if ref.side == "active":
            return None
        fresh = layer.norm is None and layer.before is None and layer.activation is None
        if single and fresh and layer.conv is not None:
            layer.norm = norm
            return ref
        if layer.activation is not None:
            return None
        layer.affine, layer.activation = norm, "none"
        return layer.active

    def batch_norm(self, node, _):
        """F.batch_norm with the tensors of a BatchNorm2d, as timm's subclasses of that call it."""
        given = [*node.args[1:], node.kwargs.get("weight"), node.kwargs.get("bias")]
        names = [tensor.target if isinstance(tensor, fx.Node) else None for tensor in given]
        owner = str(names[0]).rpartition(".")[0]
        norm = self.modules.get(owner)
        own = [f"{owner}.{name}" for name in ("running_mean", "running_var", "weight", "bias")]
        training, eps = node.kwargs.get("training"), node.kwargs.get("eps")
        if not isinstance(norm, nn.BatchNorm2d) or names != own or training is not False:
            return None
        return self.normalise(node, norm) if eps == norm.eps else None

    def activate(self, node, module, activation="relu", cap=float("inf")):
        ref, single = self.ref(node.args[0]), self.alone(node.args[0])
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
        self.same_as[node] = node.args[0]
        return self.found.get(node.args[0])

    def dropout(self, node, _):
        return self.same(node, _) if node.kwargs.get("training") is False else None

    def add(self, node, _):
        refs = [self.ref(arg) for arg in node.args]
        if len(refs) != 2 or None in refs:
            return self.image_step(node, _)
        if node.target in (operator.iadd, "add_") and not self.alone(node.args[0]):
            return None
        homes = [self.segments[ref.layer] for ref in refs]
        if homes[0] is not homes[1]:
            return None
        order = sorted(range(2), key=lambda i: homes[0].layers.index(refs[i].layer))
        into, other = refs[order[1]], refs[order[0]]
        layer, single = into.layer, self.alone(node.args[order[1]])
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
        return Image(image.node, (*image.steps, (operation, constant)))

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
        if window == ITSELF:
            return self.same(node, None)
        return self.add_layer(FusedLayer(ref, ref.layer.channels, window=window))

    def adaptive_pool(self, node, module):
        ref, size = self.ref(node.args[0]), module.output_size if module else node.args[1]
        if ref is None or len(node.all_input_nodes) > 1 or None in pair(size):
            return None
        return self.add_layer(FusedLayer(ref, ref.layer.channels, adaptive=pair(size)))


# Arguments that a node may have by keyword. fx has those of torch.nn.functional so.
KEYWORDS = {"inplace", "mode", "value", "p", "training", "weight", "bias", "momentum", "eps"}
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
    F.batch_norm: "batch_norm",
    F.dropout: "dropout",
    F.pad: "pad",
    F.avg_pool2d: "pool",
    F.adaptive_avg_pool2d: "adaptive_pool",
}
