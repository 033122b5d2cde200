"""From a network to the plan of its trunk, by torch.fx."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..ops._torch import hooked
from .folded import Folded
from .stage import Ref, Stage, Unsupported, pair
from .trunk import Trunk


def lower(net, dtype):
    """(trunk, head) of a network in eval mode: head(trunk(x)) are its logits. The trunk is a Trunk
    where the parameters are on a CPU, elsewhere a Folded.

    It takes convolutions (any stride, padding and dilation; dense, or one filter per
    channel), BatchNorm, ReLU, ReLU6, SiLU, residual sums, zero padding, average pooling and the
    input's normalisation; the head, what follows them, runs in torch. Raises Unsupported when the
    network cannot be traced, has a convolution after something else, branches otherwise, or is
    spread over devices.
    """
    devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
    if len(devices) != 1:
        raise Unsupported(f"its tensors are on {len(devices)} devices")
    kind = devices.pop().type
    autocast = kind if torch.amp.is_autocast_available(kind) else "cpu"
    for name, module in net.named_modules():
        if "forward" in vars(module):
            raise Unsupported(f"the forward of {name or type(net).__name__} was replaced")
        if hooked(module):
            raise Unsupported(f"{name or type(net).__name__} has hooks")
    try:
        with torch.autocast(autocast, enabled=False):  # the caller's is none of its own
            graph = Tracer(autocast).trace(net)
    except Exception as error:  # whatever a network's own Python raises on a proxy
        raise Unsupported(f"torch.fx cannot trace it: {error}") from error
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Unsupported("it makes tensors of its own, which a trace would fix")
    lowering = Lowering(net, graph)
    boundary = lowering.boundary()
    head = _head(net, graph, lowering.found, boundary)
    executor = Trunk if kind == "cpu" else Folded
    stages = lowering.finished(boundary)
    others = {str(t.dtype) for stage in stages for t in stage.tensors()} - {"torch.float32"}
    if others:
        raise Unsupported(f"its weights are {', '.join(sorted(others))}")
    affine = functools.partial(image_affine, net, stages[0].conv.weight, lowering.image.steps)
    return executor(stages, affine, dtype), head


def image_affine(net, weight, steps):
    """(scale, shift) [C] of the image before the first convolution, of this weight."""
    exact = {"dtype": torch.float32, "device": weight.device}
    scale, shift = torch.ones(weight.shape[1], **exact), torch.zeros(weight.shape[1], **exact)
    for operation, constant in steps:
        if isinstance(constant, str):
            constant = operator.attrgetter(constant)(net).flatten().float()
        if operation in (torch.mul, torch.div):
            scale = operation(scale, constant)
        shift = operation(shift, constant)
    return scale.contiguous(), shift.contiguous()


class Tracer(fx.Tracer):
    """Keeps buffers symbolic, and sums in place apart from others."""

    proxy_buffer_attributes = True

    def __init__(self, autocast):
        super().__init__()
        self.autocast = autocast  # the kind of device

    def proxy(self, node):
        return Proxy(node, self)

    def create_node(self, *args, **kwargs):
        if torch.is_autocast_enabled(self.autocast):
            raise Unsupported("its forward enters autocast, which a trace would forget")
        return super().create_node(*args, **kwargs)


def _recorded(function):
    def record(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class Proxy(fx.Proxy):
    __iadd__ = _recorded(operator.iadd)
    __isub__ = _recorded(operator.isub)
    __imul__ = _recorded(operator.imul)
    __itruediv__ = _recorded(operator.itruediv)


class Image:
    """The network's input after `steps`, pairs of an operation and its constant."""

    def __init__(self, steps=()):
        self.steps = steps


class Lowering:
    """Walks the graph; `found` maps the nodes that the trunk covers to an Image or a Ref."""

    def __init__(self, net, graph):
        self.net, self.graph = net, graph
        self.modules = dict(net.named_modules())
        self.found, self.stages = {}, []
        for node in graph.nodes:
            value = self.value(node)
            if value is not None:
                self.found[node] = value

    def value(self, node):
        """What the trunk makes of this node, None for the head's."""
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
        """The Ref behind a node, or None."""
        value = self.found.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Ref) else None

    def convolve(self, node, conv):
        source, pad = self.source(node.args[0])
        depthwise = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if source is None or not plain or (conv.groups > 1 and not depthwise):
            return None
        if isinstance(source, Image):
            if depthwise or self.stages:
                return None
            self.image = source
            source = None
        elif not self.stages:
            return None
        top, left = pair(conv.padding)
        padding = tuple(p + q for p, q in zip(pad, (left, left, top, top), strict=True))
        return self.add_stage(Stage(source, conv.out_channels, conv=conv, padding=padding))

    def source(self, node):
        """(what a convolution reads, the zeros around it)."""
        value = self.found.get(node)
        return value if isinstance(value, tuple) else (value, (0, 0, 0, 0))

    def add_stage(self, stage):
        self.stages.append(stage)
        return Ref(stage, "out")

    def normalise(self, node, norm):
        ref, single = self.ref(node.args[0]), len(node.args[0].users) == 1
        if ref is None or ref.side == "active" or not norm.track_running_stats:
            return None
        stage = ref.stage
        fresh = stage.norm is None and stage.before is None and stage.activation is None
        if single and fresh and stage.conv is not None:
            stage.norm = norm
            return ref
        if stage.activation is not None:
            return None
        stage.affine, stage.activation = norm, "none"
        return Ref(stage, "active")

    def activate(self, node, module, activation="relu", cap=float("inf")):
        ref, single = self.ref(node.args[0]), len(node.args[0].users) == 1
        inplace = module.inplace if module else node.target == "relu_" or any(node.kwargs.values())
        if ref is None or (inplace and not single):
            return None
        pending = ref.side == "active" and ref.stage.activation == "none" and single
        if not pending and (ref.side == "active" or ref.stage.activation is not None):
            return None
        ref.stage.activation, ref.stage.cap = activation, cap
        return Ref(ref.stage, "active")

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
        order = sorted(range(2), key=lambda i: self.stages.index(refs[i].stage))
        into, other = refs[order[1]], refs[order[0]]
        stage, single = into.stage, len(node.args[order[1]].users) == 1
        free = into.side == "out" and stage.before is None and stage.activation is None
        if not (free and single and stage is not other.stage and stage.conv is not None):
            return None
        if stage.channels != other.stage.channels:
            return None
        stage.before = other
        return into

    def image_step(self, node, _):
        """A constant added to the image, or times it: a number, or a buffer per channel."""
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
        return self.add_stage(Stage(ref, ref.stage.channels, window=window))

    def adaptive_pool(self, node, module):
        ref, size = self.ref(node.args[0]), module.output_size if module else node.args[1]
        if ref is None or len(node.all_input_nodes) > 1 or None in pair(size):
            return None
        return self.add_stage(Stage(ref, ref.stage.channels, adaptive=pair(size)))

    def boundary(self):
        """The one node of the trunk that the head reads."""
        beyond = [n for n in self.graph.nodes if n not in self.found and n.op != "get_attr"]
        read = {source for node in beyond for source in node.all_input_nodes} & self.found.keys()
        for node in beyond:
            if node.op == "call_module" and isinstance(self.modules[node.target], nn.Conv2d):
                raise Unsupported(f"{self.describe(beyond[0])} is not known to the engine")
        if len(read) != 1 or self.ref(next(iter(read))) is None:
            raise Unsupported("it does not end in one path of features")
        return next(iter(read))

    def describe(self, node):
        """A module by path and class, anything else by its name."""
        if node.op != "call_module":
            return node.name
        return f"{node.target} ({type(self.modules[node.target]).__name__}, as it is set)"

    def finished(self, boundary):
        """The stages up to the boundary, the last of which is read as `out` and has no more."""
        ref = self.found[boundary]
        if ref.side != "out" or ref.stage.conv is not None:
            ref = self.add_stage(Stage(ref, ref.stage.channels, window=((1, 1), (1, 1))))
        needed = {ref.stage}
        for stage in reversed(self.stages):
            if stage in needed:
                needed |= {read.stage for read in (stage.source, stage.before) if read}
        stages = [stage for stage in self.stages if stage in needed]
        for stage in stages:
            added = [other.before for other in stages]
            convolved = [other.source for other in stages]
            for read in (Ref(stage, "out"), Ref(stage, "active")):
                alone = read.side == "active" and read in added and read not in convolved
                if added.count(read) > 1 or alone:
                    raise Unsupported("a residual branches in a way that is not known")
        return stages


KEYWORDS = {"inplace", "mode", "value", "p", "training"}  # fx spells out those of F
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
STEPS = {
    operator.add: torch.add,
    torch.add: torch.add,
    "add": torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
}  # of an image, none of them in place
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
    """What follows the boundary, as a module of its input."""
    head, copies = fx.Graph(), {}
    copies[boundary] = head.placeholder("features")
    for node in graph.nodes:
        if node in found:
            continue
        if any(source not in copies for source in node.all_input_nodes):
            raise Unsupported("it does not end in one path of features")
        copies[node] = head.node_copy(node, copies.__getitem__)
    return fx.GraphModule(net, head).eval()
