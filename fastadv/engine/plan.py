"""The plan of a trunk: the layers that it computes, and nothing of how or in which memory."""

from dataclasses import dataclass

from torch import nn


class Unsupported(Exception):
    """The network has something that no trunk can compute; the message says what."""


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
        return self.conv is None or self.conv.groups > 1

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


def parts(norm):
    """(mean, var, gamma, beta, eps) of a BatchNorm; gamma and beta are None where it has none."""
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def pair(size):
    """(height, width) of what torch takes as one number or two."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size
