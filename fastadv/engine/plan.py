"""What a segment computes, layer by layer, and nothing of how or in which memory."""

from dataclasses import dataclass, field

from torch import nn

ITSELF = (1, 1), (1, 1)  # the window of a pooling that changes nothing


class Unsupported(Exception):
    """The network has something that the engine cannot compute; the message says what."""


@dataclass(eq=False)
class FusedLayer:
    """A convolution, or an average pooling, and all that follows it up to the next one:

        out = conv(source) + before;  active = activation(affine(out))

    source: the Ref that the layer convolves, None for the image. channels: of `out`. conv: the
    nn.Conv2d, None for average pooling, which has either a `window`, its size and stride as two
    pairs, or `adaptive`, the (height, width) of its output. padding: zeros to the left, right, top
    and bottom. norm: the BatchNorm to fold into the convolution's weights. before: the Ref of the
    residual. affine: a BatchNorm between `out` and the activation. activation: "none", "relu" (up
    to `cap`) or "silu"; None where the layer has no `active`. out, active: the Refs of the two.
    """

    source: "Ref | None"
    channels: int
    conv: nn.Conv2d | None = None
    window: tuple | None = None
    adaptive: tuple | None = None
    padding: tuple = (0, 0, 0, 0)
    norm: nn.BatchNorm2d | None = None
    before: "Ref | None" = None
    affine: nn.BatchNorm2d | None = None
    activation: str | None = None
    cap: float = float("inf")

    def __post_init__(self):
        self.out, self.active = Ref(self, "out"), Ref(self, "active")

    @property
    def depthwise(self):
        """Whether each channel is computed from the same channel of `source` alone."""
        conv = self.conv
        return conv is None or 1 < conv.groups == conv.in_channels == conv.out_channels

    @property
    def grouped(self):
        """Whether a channel is computed from some of the channels of `source`, more than one."""
        return self.conv is not None and self.conv.groups > 1 and not self.depthwise

    @property
    def geometry(self):
        """(kernel, stride, dilation, padding) of a convolution or a pooling by windows."""
        if self.conv is None:
            return *self.window, (1, 1), self.padding
        conv = self.conv
        return *map(pair, (conv.kernel_size, conv.stride, conv.dilation)), self.padding

    @property
    def reads(self):
        """The Refs that the layer reads, each once."""
        return {self.source, self.before} - {None}

    def tensors(self):
        """The parameters and statistics that the layer computes with."""
        found = [] if self.conv is None else [self.conv.weight, self.conv.bias]
        for norm in (self.norm, self.affine):
            found += [] if norm is None else parts(norm)[:-1]
        return [tensor for tensor in found if tensor is not None]


@dataclass(eq=False)
class Ref:
    """One of the two results of a layer: side is "out" or "active". A layer makes both; there are
    no others of it, so that they are told apart, and looked up, by identity."""

    layer: FusedLayer
    side: str


@dataclass(eq=False)
class Segment:
    """A part of a network that follows from one tensor.

    steps: those of the Image, where that is the network's input; None for features. layers: in
    order of computation; the first convolves the images, or is the features themselves as blocks.
    exits: the layers whose `out` others read; no layer of the segment reads it.
    """

    steps: tuple | None = None
    layers: list = field(default_factory=list)
    exits: list = field(default_factory=list)

    @property
    def convolutions(self):
        return [layer.conv for layer in self.layers if layer.conv is not None]

    @property
    def weight(self):
        """The first convolution's weight, whose device and dtype are those of all."""
        return self.convolutions[0].weight

    @property
    def channels(self):
        """How many channels there are of the images or features."""
        first = self.layers[0]
        return first.channels if first.conv is None else first.conv.in_channels

    def products(self):
        """[(layer, its products, those of whole blocks of 32 channels)] of all convolutions; the
        numbers are per pixel of what the segment reads."""
        pixels, found = {}, []
        for layer in self.layers:
            here = pixels[layer.source.layer] if layer.source else 1.0
            if layer.adaptive:
                here = 0
            else:
                _, stride, _, _ = layer.geometry
                here /= stride[0] * stride[1]
            pixels[layer] = here
            if layer.conv is not None:
                of_channels = here * layer.conv.weight[0, 0].numel()
                out, into = layer.conv.weight.shape[:2]
                patched = layer.source is None or layer.depthwise
                blocks = _up(out) * (into if patched else _up(into))
                found.append((layer, of_channels * out * into, of_channels * blocks))
        return found

    def close(self, refs):
        """Keeps the layers that these results need, and gives each result an exit of its own, an
        average over 1 x 1 where need be."""
        readers = {read for layer in self.layers for read in layer.reads}
        for ref in refs:
            pooled = ref.side == "out" and ref.layer.conv is None and ref.layer.source is not None
            layer = ref.layer
            if not pooled or ref in readers:
                layer = FusedLayer(ref, ref.layer.channels, window=ITSELF)
                self.layers.append(layer)
            self.exits.append(layer)
        needed = set(self.exits)
        for layer in reversed(self.layers):
            if layer in needed:
                needed |= {read.layer for read in layer.reads}
        self.layers = [layer for layer in self.layers if layer in needed]
        self._separate_residuals()

    def _separate_residuals(self):
        """Has every result added once at most, and an activation only if it is also convolved: an
        average over 1 x 1 stands in where it is not."""
        convolved, added = {layer.source for layer in self.layers}, set()
        for layer in list(self.layers):
            ref = layer.before
            if ref is None:
                continue
            if ref in added or (ref.side == "active" and ref not in convolved):
                copied = FusedLayer(ref, ref.layer.channels, window=ITSELF)
                self.layers.insert(self.layers.index(layer), copied)
                convolved.add(ref)
                ref = layer.before = copied.out
            added.add(ref)


def _up(channels):
    """The channels of whole blocks."""
    return -(-channels // 32) * 32


def parts(norm):
    """(mean, var, gamma, beta, eps) of a BatchNorm; gamma and beta are None where it has none."""
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def pair(size):
    """(height, width) of what torch takes as one number or two."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size
