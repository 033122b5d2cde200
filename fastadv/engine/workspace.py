"""What a trunk on the CPU needs for images of one shape: index tables, and memory to write into."""

import sys
from collections import defaultdict

import torch

from ..ops import _native
from .packed import CHANNELS, IMAGES, blocks_of
from .plan import Unsupported
from .taps import LayerTaps, image_offsets, output_size, patch_offsets


class Workspace:
    """The tables and the memory of a trunk for images of one shape and one dense layout.

    key: (shape, strides) of one image of x. taps: of each layer. offsets, image_offsets: how images
    become patches, and back. sizes: {layer: (height, width) of its `out`}. form: what decides which
    weights it needs.
    """

    def __init__(self, plan, x, key, dtype):
        self.key = self.shape, self.strides = key
        self.taps, self.memory, self.scratch, self.most_blocks = [], Memory(), Memory(), 0
        self.sizes = sizes = {}
        for layer in plan:
            size = sizes[layer.source.layer] if layer.source else tuple(x.shape[2:])
            sizes[layer] = layer.adaptive or output_size(size, *layer.geometry)
            if min(sizes[layer]) < 1:
                raise ValueError(f"x is {x.shape[2]} x {x.shape[3]}, too small for this network")
            if layer.before is not None and sizes[layer.before.layer] != sizes[layer]:
                raise Unsupported("it adds features of different sizes")
            if layer.source is None and layer.conv is not None:
                self.offsets = patch_offsets(x.stride()[1:], x.shape[1], size, *layer.geometry)
                self.image_offsets = image_offsets(self.offsets, x[0].numel())
            self.taps.append(LayerTaps(layer, size, sizes[layer], dtype))
            if self.taps[-1].tilings is not None:
                both = blocks_of(layer.source.layer.channels) + blocks_of(layer.channels)
                self.most_blocks = max(self.most_blocks, both)

        self.form = key, tuple(taps.tilings is None for taps in self.taps)

    def points(self):
        """Memory in which `_blocks.winograd` works, enough for any layer."""
        per_block = _native.constant("winograd_points") * _native.constant("winograd_rows")
        shape = torch.get_num_threads(), self.most_blocks * per_block * CHANNELS
        return self.scratch.take(shape, torch.float32)

    def blocks(self, groups, pixels, channels, dtype):
        """Memory for the blocks of `groups` groups of images."""
        return self.memory.take((groups, pixels, blocks_of(channels), IMAGES, CHANNELS), dtype)


class Memory:
    """Tensors to write into, each taken again once nobody else refers to it: memory fresh from the
    system would cost a page fault every 4 KB, a third of a pass."""

    def __init__(self):
        self.tensors, self.groups = defaultdict(list), None

    def take(self, shape, dtype):
        """A tensor of this shape, with any values in it."""
        if shape[0] != self.groups:  # the batch has another size: none of the others fits
            self.tensors.clear()
            self.groups = shape[0]
        tensor = _unreferenced(self.tensors[shape, dtype], ALONE)
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            self.tensors[shape, dtype].append(tensor)
        return tensor


def _unreferenced(items, count=None):
    """The first item that nobody but `items` refers to, or None. Without `count` it returns what
    sys.getrefcount says of such an item here, a number that differs between versions of Python."""
    for item in items:
        references = sys.getrefcount(item)
        if count is None:
            return references
        if references == count:
            return item
    return None


ALONE = _unreferenced([object()])
