"""Runs a segment on a CPU in kernels of our own: forward, and backward to what it reads."""

import threading

import torch

from ..ops import _blocks, _native
from ..ops._torch import batched, disable_compiler, transformed
from .packed import CHANNELS, IMAGES, PackedLayer, blocks_of, from_blocks, to_blocks
from .plan import Unsupported
from .workspace import Workspace


class Trunk:
    """Images or features [B, C, H, W] on the CPU -> features [B, C', H', W'], a tuple of them if
    the segment has several exits; differentiable once and with respect to what it reads only.

    image_affine: () -> (scale, shift) [C], the normalisation before the first convolution, of a
    segment that begins with images; None of one that begins with features. dtype: of the
    activations and gradients between layers, float32 or bfloat16, and of the weights that are no
    depthwise ones or Winograd's; sums are fp32. inner:
    whether the results are for more of the network, and so in `dtype` and channels_last; otherwise
    in float32 and contiguous. Weights are folded in the first forward pass after a `refresh()`. An
    image's features do not depend on the others of its batch.
    """

    device = torch.device("cpu")
    opaque = True  # to torch's dispatch modes

    def __init__(self, segment, image_affine, dtype, inner=False):
        self.segment, self.plan = segment, segment.layers
        self.image_affine, self.dtype, self.inner = image_affine, dtype, inner
        plan = self.plan
        self.packed = {layer: PackedLayer(layer) for layer in plan}
        self.workspace = None  # for the latest shape and layout of images
        self.refreshes, self.folded = 0, set()  # the forms of workspaces
        self.exits = segment.exits
        self.number = number = {layer: n for n, layer in enumerate(plan)}
        self.readers = {}  # {Ref: the layers that read it}
        for layer in plan:
            for ref in layer.reads:
                self.readers.setdefault(ref, []).append(layer)
        # What is done with once layer n was computed: results going forward, gradients going back.
        self.forward_ends, self.backward_ends = [[] for _ in plan], [[] for _ in plan]
        for ref, readers in self.readers.items():
            self.forward_ends[number[readers[-1]]].append(ref)
        for layer in plan:
            if layer.reads:
                first = min(number[ref.layer] for ref in layer.reads)
                self.backward_ends[first].append(layer)

    def refresh(self):
        """Has the weights folded anew when they are next needed, and the backward passes of earlier
        forward passes refused."""
        with FOLDING:  # a fold under way is of the weights of before
            self.refreshes += 1
            self.folded.clear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self, workspace):
        """Folds and packs the weights that images of the workspace's shape need."""
        for packed, taps in zip(self.packed.values(), workspace.taps, strict=True):
            packed.fold(self.dtype, taps.tilings is not None)
        if self.image_affine:
            scale, shift = self.image_affine()
            taps = self.plan[0].conv.weight[0, 0].numel()
            size = blocks_of(len(scale) * taps) * CHANNELS
            both = scale.new_zeros(2, size)
            both[:, : len(scale) * taps] = torch.stack([scale, shift]).repeat_interleave(taps, 1)
            # Made before they are seen: other threads may be reading those of before.
            (self.scale, self.shift), self.per_channel = both, scale
        self.folded.add(workspace.form)

    @property
    def weight(self):
        return self.segment.weight

    @property
    def channels(self):
        return self.segment.channels

    @disable_compiler
    def __call__(self, x):
        channels = self.segment.channels
        if x.dim() != 4 or x.shape[1] != channels or not len(x):
            raise (Unsupported if self.inner else ValueError)(
                f"x has shape {tuple(x.shape)}, must be [B, {channels}, H, W]"
            )
        x = x.resolve_neg()
        x = x if _native.is_dense(x) else x.contiguous()
        key, workspace = (x.shape[1:], x.stride()[1:]), self.workspace
        if workspace is None or workspace.key != key:
            workspace = self.workspace = Workspace(self.plan, x, key, self.dtype)
        with FOLDING:
            if workspace.form not in self.folded:
                self.fold(workspace)
        return _Run.apply(x, self, workspace)

    def __getstate__(self):
        return self.__dict__ | {"workspace": None}

    def forward(self, x, workspace, slopes):
        """The features of x. Fills `slopes`, {layer: the derivative of its activation}, unless
        that is None."""
        groups, results = -(-len(x) // IMAGES), {}
        for layer, taps in zip(self.plan, workspace.taps, strict=True):
            packed, out, active = self.packed[layer], layer.out, layer.active
            size = groups, taps.pixels, layer.channels, self.dtype
            finish = {"bias": packed.bias}
            if layer.source is not None:
                blocks = results[layer.source]
            elif layer.conv is None:
                results[out] = blocks = to_blocks(x, workspace.blocks(*size))
            else:
                blocks = workspace.blocks(groups, *workspace.offsets.shape, self.dtype)
                _blocks.patches(blocks, x, workspace.offsets, self.scale, self.shift)
            if out not in results and (out in self.readers or layer in self.exits):
                finish["out"] = results[out] = workspace.blocks(*size)
            if layer.before is not None:
                finish["before"] = results[layer.before]
            if active in self.readers:
                finish["active"] = results[active] = workspace.blocks(*size)
                finish |= {"activation": layer.activation, "cap": layer.cap}
                finish |= {"scale": packed.scale, "shift": packed.shift}
                if slopes is not None and layer.activation != "none":
                    bits = layer.activation == "relu"
                    shape = tuple(finish["active"].shape)
                    slope = (shape[:4], torch.int32) if bits else (shape, self.dtype)
                    finish["slope"] = slopes[layer] = workspace.memory.take(*slope)
            if layer.source is not None or "out" in finish or "active" in finish:
                self._convolve(
                    blocks, len(x), layer, workspace, 0, blocks_of(layer.channels), finish
                )
            for dead in self.forward_ends[self.number[layer]]:
                del results[dead]
        found = []
        for layer in self.exits:
            size = len(x), layer.channels, *workspace.sizes[layer]
            features = from_blocks(results[layer.out], size)
            if not self.inner:
                features = features.float().contiguous()
            found.append(features)
        return tuple(found) if len(found) > 1 else found[0]

    def backward(self, grads_of_exits, workspace, slopes):
        """The gradient of what the segment reads, laid out as that is, given those of its exits."""
        batch, grads = len(grads_of_exits[0]), {}  # of each layer's `out`
        for layer, grad in zip(self.exits, grads_of_exits, strict=True):
            groups, pixels = -(-batch // IMAGES), grad.shape[2:].numel()
            size = groups, pixels, blocks_of(layer.channels), IMAGES, CHANNELS
            grads[layer] = to_blocks(grad, grad.new_empty(size, dtype=self.dtype))
        for layer in reversed(self.plan):
            if layer in self.exits:
                continue
            finish, ref, active = {}, layer.out, layer.active
            if active in self.readers:
                finish = {"activation": layer.activation, "scale": self.packed[layer].scale}
                finish["slope"] = slopes.get(layer)
                if ref in self.readers:
                    finish["after"] = self._collect(ref, batch, grads, workspace, {})
                ref = active
            grads[layer] = self._collect(ref, batch, grads, workspace, finish)
            for dead in self.backward_ends[self.number[layer]]:
                del grads[dead]
        first, shape = self.plan[0], (batch, *workspace.shape)
        if first.conv is None:
            return from_blocks(grads[first], shape)
        size = workspace.offsets.shape[1]
        patches = self._back(first, batch, grads[first], workspace, size, {})
        size = workspace.shape.numel()
        image = self.per_channel.new_empty_strided(shape, (size, *workspace.strides))
        flat = image.as_strided((batch, size), (size, 1))
        scale = self._image_scale(workspace)
        _blocks.patches_backward(flat, patches, workspace.image_offsets, scale)
        return image

    def _image_scale(self, workspace):
        """The normalisation's scale for each element of an image, in its order of memory."""
        scale = self.per_channel[:, None, None].expand(workspace.shape)
        order = sorted(range(3), key=lambda d: -workspace.strides[d])
        return scale.permute(order).contiguous()

    def _collect(self, ref, batch, grads, workspace, finish):
        """The sum of the gradients that the readers of a layer's result send to it, finished."""
        convolved = [reader for reader in self.readers[ref] if reader.source is ref]
        added = [reader for reader in self.readers[ref] if reader.before is ref]
        before, channels = grads[added[0]] if added else None, ref.layer.channels
        for reader in convolved[:-1]:
            so_far = {"before": before}
            before = self._back(reader, batch, grads[reader], workspace, channels, so_far)
        if not convolved:
            return before
        finish, last = finish | {"before": before}, convolved[-1]
        return self._back(last, batch, grads[last], workspace, channels, finish)

    def _back(self, reader, batch, grad, workspace, channels, finish):
        """The gradient that a layer sends to its source, given that of its `out`."""
        taps = workspace.taps[self.number[reader]]
        out = workspace.blocks(len(grad), len(taps.backward[0]) - 1, channels, self.dtype)
        finish = finish | {"out": out, "backward": True}
        self._convolve(grad, batch, reader, workspace, 1, blocks_of(channels), finish)
        return out

    def _convolve(self, blocks, batch, layer, workspace, direction, out_blocks, finish):
        """A layer's convolution or pooling, forward (direction 0) or backward (1), and its finish:
        all that the kernel does to a sum before it writes it."""
        packed, taps = self.packed[layer], workspace.taps[self.number[layer]]
        if taps.tilings is not None:
            _blocks.winograd(
                blocks,
                batch,
                packed.points[direction],
                taps.tilings[direction],
                out_blocks,
                workspace.points(),
                dtype=self.dtype,
                **finish,
            )
            return
        weights = packed.weights
        _blocks.convolution(
            blocks,
            batch,
            taps.mean if weights is None else weights[direction],
            (taps.forward, taps.backward)[direction],
            out_blocks,
            depthwise=layer.depthwise,
            dtype=self.dtype,
            **finish,
        )


FOLDING = threading.Lock()  # threads may share a trunk


def check_refreshes(refreshed, count, _=None):
    """Raises RuntimeError where a twin or trunk has had more than `count` refreshes by now."""
    if count != refreshed.refreshes:
        raise RuntimeError("the twin was refreshed between this forward pass and its backward")


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trunk, workspace):
        ctx.trunk, ctx.workspace, ctx.refreshes = trunk, workspace, trunk.refreshes
        ctx.slopes = {} if ctx.needs_input_grad[0] else None
        return trunk.forward(x.detach(), workspace, ctx.slopes)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled() or transformed() or any(map(batched, grads)):
            raise RuntimeError(
                "a twin's trunk on the CPU has plain first-order gradients only: for create_graph, "
                "batched or forward-mode ones call the model itself, in eval mode"
            )
        check_refreshes(ctx.trunk, ctx.refreshes)
        return ctx.trunk.backward(grads, ctx.workspace, ctx.slopes), None, None
