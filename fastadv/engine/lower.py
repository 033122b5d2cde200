"""From a network to what computes it: its segments by the engine, the rest by torch."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..ops import _native
from .folded import Folded
from .mixed import Mixed, Part
from .plan import Ref, Unsupported
from .segments import Lowering
from .trace import IN_PLACE, trace
from .trunk import Trunk
from .winograd import takes


def lower(net, dtype, executor=None):
    """(trunk, head) of a network in eval mode: head(trunk(x)) are its logits. dtype: see Trunk.

    The trunk computes all up to the last convolution. If that is one segment (see `Lowering`), it
    is an executor of it, Trunk or Folded. If torch has to compute something before or between
    segments, it is a Mixed. The head is what follows, in torch and in float32; it is part of the
    trunk if it has several linear layers. executor: of all segments; None for that which
    `fastest` says of each.

    Raises Unsupported where the network cannot be traced, has no convolution that the engine knows,
    looks into memory layouts, changes a tensor in place that others may see, or is spread over
    devices or dtypes.
    """
    devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
    if len(devices) != 1:
        raise Unsupported(f"its tensors are on {len(devices)} devices")
    parts = Parts(net, trace(net, devices.pop().type))
    boundary, head = parts.split()
    first = parts.segments[0]
    if boundary in parts.exits and len(parts.segments) == 1 and first.steps is not None:
        return _computed(net, first, dtype, executor), head
    computed = [_computed(net, each, dtype, executor, inner=True) for each in parts.segments]
    return Mixed(parts.body(boundary, computed), computed, dtype), head


def _computed(net, segment, dtype, executor, inner=False):
    """What computes a segment."""
    others = {str(t.dtype) for layer in segment.layers for t in layer.tensors()} - {"torch.float32"}
    if others:
        raise Unsupported(f"its weights are {', '.join(sorted(others))}")
    affine = segment.steps is not None and functools.partial(image_affine, net, segment)
    if any(layer.grouped for layer in segment.layers):
        executor = Folded
    executor = executor or fastest(segment, inner, dtype)
    return executor(segment, affine or None, dtype, inner)


def fastest(segment, inner, dtype):
    """The executor of a segment, by what benchmarks/bench_networks.py and bench_attack.py measured.

    That is Folded where much of the blocks of 32 channels would stay empty, or few convolutions
    would have to pay for rearranging features into blocks and back; depthwise ones pay sooner in
    bfloat16, of which torch's are slow. Else it is Trunk on a CPU with
    vectors of 512 bits. With vectors of 256 bits torch's dense convolutions are as fast, but for
    those that Winograd's algorithm takes, and its depthwise ones are not.
    """
    isa = "scalar" if _native.missing else _native.isa()
    if segment.weight.device.type != "cpu" or isa == "scalar":
        return Folded
    layers, products, paid = zip(*segment.products(), strict=True)
    if sum(products) < FILLED * sum(paid):
        return Folded
    fewer = [n for layer, n in zip(layers, products, strict=True) if takes(layer, dtype)]
    by_winograd = len(fewer) >= 1 + inner and sum(fewer) >= HALF * sum(products)
    depthwise = any(layer.depthwise for layer in layers)
    worth = WORTH if dtype == torch.float32 or not depthwise else WORTH_DEPTHWISE
    wide = isa != "avx2" or depthwise
    return Trunk if by_winograd or (wide and not (inner and len(layers) < worth)) else Folded


WORTH = 8  # convolutions between two rearrangements
WORTH_DEPTHWISE = 3  # in bfloat16, if any of them is depthwise
FILLED = 0.6  # of all products of a segment that are not with zeros
HALF = 0.5  # of them that are in layers which Winograd's algorithm computes


def image_affine(net, segment):
    """(scale, shift) fp32 [C], to which a segment's steps come."""
    weight = segment.layers[0].conv.weight
    exact = {"dtype": torch.float32, "device": weight.device}
    scale, shift = torch.ones(weight.shape[1], **exact), torch.zeros(weight.shape[1], **exact)
    for operation, constant in segment.steps:
        if isinstance(constant, str):
            constant = operator.attrgetter(constant)(net).flatten().float()
        if operation in (torch.mul, torch.div):
            scale = operation(scale, constant)
        shift = operation(shift, constant)
    return scale.contiguous(), shift.contiguous()


class Parts:
    """A network taken apart: the segments of its graph, and the nodes that torch computes.

    entries: {segment: the node that it reads}. exits: {node: (number of its segment, number of its
    result there)} of the nodes of segments that torch reads. torch: the nodes that torch computes.
    """

    def __init__(self, net, graph):
        self.net, self.graph, self.modules = net, graph, dict(net.named_modules())
        lowering = Lowering(net, graph)
        found, home, self.same_as = lowering.found, lowering.segments, lowering.same_as
        segments = [s for s in dict.fromkeys(home.values()) if s.convolutions]
        refs = {
            node: ref
            for node, ref in found.items()
            if isinstance(ref, Ref) and home[ref.layer] in segments
        }
        on_demand = {node for node, value in found.items() if not isinstance(value, Ref)}
        read = {lowering.begins[segment] for segment in segments}  # by torch or by a segment
        self.torch = set()
        for node in reversed(graph.nodes):
            if node not in refs and (node in read or node not in on_demand):
                self.torch.add(node)
                read.update(node.all_input_nodes)
        self.segments, self.entries, self.exits = [], {}, {}
        for segment in segments:
            ends = {n: ref for n, ref in refs.items() if n in read and home[ref.layer] is segment}
            if not ends:
                continue  # a result that nobody asks for
            results = list(dict.fromkeys(ends.values()))
            segment.close(results)
            number = len(self.segments)
            self.exits |= {node: (number, results.index(ref)) for node, ref in ends.items()}
            self.segments.append(segment)
            self.entries[segment] = lowering.begins[segment]
        if not self.segments or not all(segment.convolutions for segment in self.segments):
            raise Unsupported("it has no convolution that the engine knows")

    def split(self):
        """(boundary, head): the node with which the trunk ends, and a module that computes the
        network's output of its result. Where what follows the last segment reads several results or
        has several linear layers the boundary is None, which stands for the output itself."""
        before, entries = set(), set(self.entries.values())
        for node in reversed(self.graph.nodes):
            if node in entries or not before.isdisjoint(node.users):
                before.add(node)
        after = [node for node in self.graph.nodes if node in self.torch - before]
        inputs = {source for node in after for source in node.all_input_nodes}
        read = {source for source in inputs.difference(after) if source.op != "get_attr"}
        linear = [node for node in after if isinstance(self.modules.get(node.target), nn.Linear)]
        if len(read) != 1 or len(linear) > 1:
            return None, nn.Identity()
        (boundary,) = read
        for node in after:
            self._check_name(node)
            if "out" in node.kwargs:
                raise Unsupported(f"{node.name} changes a tensor that others may read")
        for node in filter(self._writes, after):
            root = node.all_input_nodes[0]
            while root in after and root.args and isinstance(root.args[0], fx.Node):
                root = root.args[0]
            if root.op == "get_attr":
                raise Unsupported(f"{node.name} changes a tensor that others may read")
        head = fx.Graph()
        copies = {boundary: head.placeholder("features")}
        for node in self.graph.nodes:
            if node in after or (node in inputs and node.op == "get_attr"):
                copies[node] = head.node_copy(node, copies.__getitem__)
        self.torch -= set(after)
        return boundary, fx.GraphModule(self.net, head).eval()

    def body(self, boundary, computed):
        """A module that computes the boundary's result of images; computed: what computes each
        segment."""
        body, copies, calls = fx.Graph(), {}, {}
        root = {f"{OURS}.{number}": Part(each) for number, each in enumerate(computed)}
        for node in self.graph.nodes:
            if node in self.torch:
                self._check(node)
                copies[node] = copied = body.node_copy(node, copies.__getitem__)
                if node.op == "call_method":  # of channels_last maps there may be no such view
                    copied.target = VIEWS.get(node.target, node.target)
                if node.op in ("call_module", "get_attr"):
                    root[node.target] = operator.attrgetter(node.target)(self.net)
            elif node in self.exits:
                number, place = self.exits[node]
                segment = self.segments[number]
                if number not in calls:
                    calls[number] = body.call_module(
                        f"{OURS}.{number}", (copies[self.entries[segment]],)
                    )
                copies[node] = calls[number]
                if len(segment.exits) > 1:
                    copies[node] = body.call_function(operator.getitem, (calls[number], place))
        if boundary is not None:
            # As the model's own would be, in dtype and layout: a head may view them.
            result = body.call_method("float", (copies[boundary],))
            body.output(body.call_method("contiguous", (result,)))
        return fx.GraphModule(root, body).eval()

    def _check(self, node):
        """Raises Unsupported for a node that depends on when, or in which layout, it runs: one that
        looks into the memory, or writes where others may read."""
        self._check_name(node)
        name = getattr(node.target, "__name__", node.target)
        sizes = all(isinstance(size, (int, tuple, list, fx.Node)) for size in node.args[1:])
        if name == "view" and (node.kwargs or not sizes):
            raise Unsupported("view is given another dtype, or sizes by name")
        if name in LAYOUT:
            raise Unsupported(f"{name} depends on the memory layout")
        shared = self._writes(node) and not self._alone(node.all_input_nodes[0])
        if shared or "out" in node.kwargs:
            raise Unsupported(f"{node.name} changes a tensor that others may read")

    def _check_name(self, node):
        """Raises Unsupported for a part of the network whose name the graph's module needs."""
        top = node.target.partition(".")[0] if node.op in ("call_module", "get_attr") else ""
        if top == OURS or hasattr(fx.GraphModule, top) or top in ("graph", "code", "meta"):
            raise Unsupported(f"{top} is a name that a torch.fx.GraphModule needs")

    def _writes(self, node):
        """Whether a node that torch computes changes a tensor in place."""
        if node.op == "call_module":
            return getattr(self.modules[node.target], "inplace", False)
        name = getattr(node.target, "__name__", node.target)
        in_place = name in WRITE or (name.endswith("_") and not name.endswith("__"))
        in_place = in_place and node.op in ("call_function", "call_method")
        return in_place or node.kwargs.get("inplace")

    def _alone(self, node):
        """Whether a result is a tensor of its own that one node reads."""
        before = self.same_as.get(node)
        if len(node.users) > 1 or (before is not None and not self._alone(before)):
            return False
        if node in self.exits:
            return list(self.exits.values()).count(self.exits[node]) == 1
        fresh = isinstance(self.modules.get(node.target), FRESH) or node.target in FRESH_CALLS
        if fresh or before is not None:
            return True
        return self._writes(node) and self._alone(node.all_input_nodes[0])


# Methods and functions whose result depends on the memory layout, and that write into a tensor.
LAYOUT = {"as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", "untyped_storage"}
WRITE = {"setitem", *(name.strip("_") for name in IN_PLACE)}
OURS = "fastadv_segments"
VIEWS = {"view": "reshape", "view_as": "reshape_as"}
# Functions and modules whose result is a new tensor.
FRESH_CALLS = F.batch_norm, operator.add
FRESH = (
    nn.Conv2d,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.MaxPool2d,
)
