"""Runs the plan of a trunk: forward, and backward to the image."""

import functools
import sys
import threading
from collections import defaultdict

import numpy as np
import torch

from ..ops import _native
from ..ops._torch import transformed
from .stage import CHANNELS, IMAGES, Ref, Unsupported, blocks_of
from .taps import (
    adaptive_pairs,
    image_offsets,
    lists,
    means,
    output_size,
    pairs,
    patch_offsets,
)


class Trunk:
    """fp32 images [B, C, H, W] on the CPU -> fp32 features [B, C', H', W'], differentiable once and
    with respect to the images only.

    stages: in order of computation, the last one's `out` being the result. image_affine: () ->
    (scale, shift) [C], the normalisation before the first convolution. dtype: of the activations,
    weights and gradients between stages, float32 or bfloat16; sums are fp32. Weights are folded in
    the first forward pass after a `refresh()`. An image's features do not depend on the others of
    its batch.
    """

    device = torch.device("cpu")

    def __init__(self, stages, image_affine, dtype):
        self.stages = stages
        self.image_affine = image_affine
        self.dtype = dtype
        self.plan = None  # for the latest shape and layout of images
        self.refreshes, self.stale = 0, True
        self.number = number = {stage: n for n, stage in enumerate(stages)}
        for stage in stages:
            for ref in {stage.source, stage.before} - {None}:
                ref.stage.readers[ref.side].append(stage)
        self.forward_ends = [[] for _ in stages]  # the blocks that nobody reads after stage n
        self.backward_ends = [[] for _ in stages]  # the gradients that nobody reads after it
        for stage in stages:
            for side, readers in stage.readers.items():
                if readers:
                    last = max(number[reader] for reader in readers)
                    self.forward_ends[last].append((stage, side))
            read = [number[r.stage] for r in (stage.source, stage.before) if r is not None]
            if read:
                self.backward_ends[min(read)].append(stage)

    def refresh(self):
        """Weights are folded anew when they are next needed; the backward passes of earlier forward
        passes are refused from now on."""
        self.refreshes += 1
        self.stale = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self):
        """Folds and packs the weights."""
        for stage in self.stages:
            stage.fold(self.dtype)
        scale, shift = self.image_affine()
        taps = self.stages[0].conv.weight[0, 0].numel()
        size = blocks_of(len(scale) * taps) * CHANNELS
        self.scale, self.shift = scale.new_zeros(2, size)
        self.scale[: len(scale) * taps] = scale.repeat_interleave(taps)
        self.shift[: len(scale) * taps] = shift.repeat_interleave(taps)
        self.per_channel = scale
        self.stale = False

    @torch.compiler.disable
    def guarded(self, logits):
        """These, their backward pass refused once there was a refresh, before torch refuses that of
        the head in other words."""
        if logits.requires_grad:
            logits.register_hook(functools.partial(self.check, self.refreshes))
        return logits

    def check(self, refreshes, _=None):
        """RuntimeError where there was a refresh after so many."""
        if refreshes != self.refreshes:
            raise RuntimeError("the twin was refreshed between this forward pass and its backward")

    @torch.compiler.disable
    def __call__(self, x):
        channels = self.stages[0].conv.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be [B, {channels}, H, W]")
        with FOLDING:
            if self.stale:
                self.fold()
        x = x.resolve_neg()
        x = x if _native.is_dense(x) else x.contiguous()
        key, plan = (x.shape[1:], x.stride()[1:]), self.plan
        if plan is None or plan.key != key:
            plan = self.plan = Plan(self.stages, x, key)
        return _Run.apply(x, self, plan)

    def __getstate__(self):
        return self.__dict__ | {"plan": None}

    def forward(self, x, plan, slopes):
        """Features of x; fills `slopes`, stage by stage, unless it is None."""
        groups = -(-len(x) // IMAGES)
        found = {}
        for stage, step in zip(self.stages, plan.steps, strict=True):
            if stage.source is None:
                blocks = plan.blocks(groups, len(plan.offsets), plan.offsets.shape[1], self.dtype)
                _native.patches(blocks, x, plan.offsets, self.scale, self.shift)
            else:
                blocks = found[stage.source.stage, stage.source.side]
            finish = {"bias": stage.bias}
            if stage.readers["out"] or stage is self.stages[-1]:
                finish["out"] = plan.blocks(groups, step.pixels, stage.channels, self.dtype)
                found[stage, "out"] = finish["out"]
            if stage.before is not None:
                finish["before"] = found[stage.before.stage, stage.before.side]
            if stage.readers["active"]:
                finish["active"] = plan.blocks(groups, step.pixels, stage.channels, self.dtype)
                found[stage, "active"] = finish["active"]
                finish |= {"activation": stage.activation, "cap": stage.cap}
                finish |= {"scale": stage.scale, "shift": stage.shift}
                if slopes is not None and stage.activation != "none":
                    bits = stage.activation == "relu"
                    shape = tuple(finish["active"].shape)
                    slope = (shape[:4], torch.int32) if bits else (shape, self.dtype)
                    finish["slope"] = slopes[stage] = plan.memory.take(*slope)
            self._convolve(blocks, len(x), stage, step, 0, blocks_of(stage.channels), finish)
            for dead in self.forward_ends[self.number[stage]]:
                del found[dead]
        blocks = found[self.stages[-1], "out"]
        features = blocks.permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
        features = features[: len(x), : self.stages[-1].channels].unflatten(2, plan.size)
        return features.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def backward(self, grad, plan, slopes):
        """The gradient of the images, laid out as they are, given that of the features."""
        batch, channels, groups = len(grad), blocks_of(grad.shape[1]), -(-len(grad) // IMAGES)
        blocks = grad.new_zeros(groups * IMAGES, channels * CHANNELS, grad.shape[2:].numel())
        blocks[:batch, : grad.shape[1]] = grad.flatten(2)
        blocks = blocks.view(groups, IMAGES, channels, CHANNELS, -1).permute(0, 4, 2, 1, 3)
        grads = {self.stages[-1]: blocks.to(self.dtype).contiguous()}
        for stage in reversed(self.stages[:-1]):
            finish = {}
            if stage.readers["active"]:
                finish = {"activation": stage.activation, "scale": stage.scale}
                finish["slope"] = slopes.get(stage)
                if stage.readers["out"]:
                    finish["after"] = self._collect(stage, "out", batch, grads, plan, {})
            side = "active" if stage.readers["active"] else "out"
            grads[stage] = self._collect(stage, side, batch, grads, plan, finish)
            for dead in self.backward_ends[self.number[stage]]:
                del grads[dead]
        first = self.stages[0]
        patches = self._back(first, batch, grads[first], plan, plan.offsets.shape[1], {})
        shape, size = (batch, *plan.shape), plan.shape.numel()
        image = grad.new_empty_strided(shape, (size, *plan.strides))
        flat = image.as_strided((batch, size), (size, 1))
        _native.patches_backward(flat, patches, plan.image_offsets, self.image_scale(plan))
        return image

    def image_scale(self, plan):
        """The normalisation's scale for each element of an image, in its order of memory."""
        scale = self.per_channel[:, None, None].expand(plan.shape)
        order = sorted(range(3), key=lambda d: -plan.strides[d])
        return scale.permute(order).contiguous()

    def _collect(self, stage, side, batch, grads, plan, finish):
        """The sum of the gradients that the readers of this side of a stage send, finished."""
        convolved = [r for r in stage.readers[side] if r.source == Ref(stage, side)]
        added = [r for r in stage.readers[side] if r.before == Ref(stage, side)]
        before = grads[added[0]] if added else None
        for reader in convolved[:-1]:
            added_up = {"before": before}
            before = self._back(reader, batch, grads[reader], plan, stage.channels, added_up)
        if not convolved:
            return before
        finish = finish | {"before": before}
        last = convolved[-1]
        return self._back(last, batch, grads[last], plan, stage.channels, finish)

    def _back(self, reader, batch, grad, plan, channels, finish):
        """The gradient that a stage sends to what it convolves."""
        step = plan.steps[self.number[reader]]
        out = plan.blocks(len(grad), len(step.backward[0]) - 1, channels, self.dtype)
        finish = finish | {"out": out, "backward": True}
        self._convolve(grad, batch, reader, step, 1, blocks_of(channels), finish)
        return out

    def _convolve(self, blocks, batch, stage, step, direction, out_blocks, finish):
        taps = (step.forward, step.backward)[direction]
        weight = stage.weights[direction] if stage.weights else step.mean
        _native.convolution(
            blocks,
            batch,
            weight,
            taps,
            out_blocks,
            depthwise=stage.depthwise,
            dtype=self.dtype,
            **finish,
        )


class Memory:
    """Tensors to write into, each taken again once nobody else refers to it: memory fresh from the
    system would cost a page fault every 4 KB, a third of a pass."""

    def __init__(self):
        self.tensors, self.groups = defaultdict(list), None

    def take(self, shape, dtype):
        if shape[0] != self.groups:  # another size of batch
            self.tensors.clear()
            self.groups = shape[0]
        tensor = _unreferenced(self.tensors[shape, dtype], ALONE)
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            self.tensors[shape, dtype].append(tensor)
        return tensor


def _unreferenced(items, count=None):
    """The first that nobody but `items` refers to. Without `count`, what getrefcount says of such a
    one here, which is a matter of the Python version."""
    for item in items:
        references = sys.getrefcount(item)
        if count is None:
            return references
        if references == count:
            return item
    return None


ALONE = _unreferenced([object()])


class Plan:
    """What a trunk needs for images of one shape and one dense layout: index tables and memory."""

    def __init__(self, stages, x, key):
        self.key = self.shape, self.strides = key
        self.steps, self.memory, sizes = [], Memory(), {}
        for stage in stages:
            size = sizes[stage.source.stage] if stage.source else tuple(x.shape[2:])
            sizes[stage] = stage.adaptive or output_size(size, *stage.geometry)
            if min(sizes[stage]) < 1:
                raise ValueError(f"x is {x.shape[2]} x {x.shape[3]}, too small for this network")
            if stage.before is not None and sizes[stage.before.stage] != sizes[stage]:
                raise Unsupported("it adds features of different sizes")
            if stage.source is None:
                self.offsets = patch_offsets(x.stride()[1:], x.shape[1], size, *stage.geometry)
                self.image_offsets = image_offsets(self.offsets, x[0].numel())
            self.steps.append(Step(stage, size, sizes[stage]))
        self.size = sizes[stages[-1]]

    def blocks(self, groups, pixels, channels, dtype):
        """Memory for as many blocks."""
        return self.memory.take((groups, pixels, blocks_of(channels), IMAGES, CHANNELS), dtype)


class Step:
    """The taps of one stage, forward and backward, and the weights of a mean."""

    def __init__(self, stage, size, output):
        self.pixels, self.mean = output[0] * output[1], None
        if stage.source is None:  # a product with patches
            out = source = np.arange(self.pixels)
            size, tap, taps = output, np.zeros_like(out), 1
        elif stage.conv is not None:
            out, source, tap = pairs(size, *stage.geometry)
            taps = stage.conv.weight[0, 0].numel()
        else:
            out, source = (
                adaptive_pairs(size, stage.adaptive)
                if stage.adaptive
                else pairs(size, *stage.geometry)[:2]
            )
            tap, weights = means(out)
            taps = len(weights)
            channels = blocks_of(stage.channels) * CHANNELS
            self.mean = weights[:, None].expand(-1, channels).contiguous()
        self.forward = lists(out, source, tap, self.pixels, taps)
        self.backward = lists(source, out, tap, size[0] * size[1], taps)


FOLDING = threading.Lock()  # threads may share a trunk


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trunk, plan):
        ctx.trunk, ctx.plan, ctx.slopes, ctx.weights = trunk, plan, {}, trunk.refreshes
        return trunk.forward(x.detach(), plan, ctx.slopes if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx, grad):
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # by is_grads_batched
        if torch.is_grad_enabled() or transformed() or batched:
            raise RuntimeError(
                "a twin's trunk on the CPU has plain first-order gradients only: for create_graph, "
                "batched or forward-mode ones call the model itself, in eval mode"
            )
        ctx.trunk.check(ctx.weights)
        return ctx.trunk.backward(grad, ctx.plan, ctx.slopes), None, None
