"""Runs a segment in torch's own convolutions, on any device."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import fold_bn_
from .plan import Unsupported, parts


class Folded(nn.Module):
    """Images or features [B, C, H, W] -> features [B, C', H', W'], a tuple of them if the segment
    has several exits; differentiable to what it reads only.

    segment, image_affine, inner: as for Trunk. dtype: of the weights and of all activations,
    float32 or bfloat16; activations are channels_last. Weights are those of the last `refresh()`,
    which overwrites them in place, so that captured CUDA graphs and compiled code follow.
    """

    opaque = False  # torch sees all that it does

    @torch.inference_mode(False)  # whose tensors could not be saved for a backward pass
    def __init__(self, segment, image_affine, dtype, inner=False):
        super().__init__()
        self.segment, self.plan = segment, segment.layers
        self.image_affine = image_affine if segment.steps else None
        self.dtype, self.inner = dtype, inner
        plan = self.plan
        number = {layer: n for n, layer in enumerate(plan)}
        # Refs as (number of the layer, side), which torch.compile can follow.
        self.reads = [
            tuple(ref and (number[ref.layer], ref.side) for ref in (layer.source, layer.before))
            for layer in plan
        ]
        self.exits = [(number[layer], "out") for layer in segment.exits]
        last = {key: n for n, keys in enumerate(self.reads) for key in keys if key is not None}
        self.wanted = {*last, *self.exits}
        self.ends = [[key for key in last if last[key] == n] for n in range(len(plan))]
        self.layers = nn.ModuleList(FoldedLayer(layer, dtype) for layer in plan)
        for name in ("scale", "shift"):
            size = (1, segment.channels, 1, 1) if image_affine else 0
            self.register_buffer(name, self.weight.new_empty(size), persistent=False)
        self.eval()
        self.refresh()

    @property
    def weight(self):
        return self.segment.weight

    @property
    def channels(self):
        return self.segment.channels

    @property
    def device(self):
        return self.scale.device

    @torch.no_grad()
    def refresh(self):
        """Folds the weights anew."""
        fold_bn_(*zip(*[fold for layer in self.layers for fold in layer.folds()], strict=True))
        if self.image_affine:
            for buffer, values in zip((self.scale, self.shift), self.image_affine(), strict=True):
                buffer.copy_(values.view_as(buffer))

    def forward(self, x):
        if self.inner and x.dim() != 4:
            raise Unsupported(f"a convolution reads {x.dim()} dimensions, must be 4")
        if self.image_affine:
            x = torch.addcmul(self.shift, x, self.scale)
        x = x.to(self.dtype, memory_format=torch.channels_last)
        found = {}
        for n, layer in enumerate(self.layers):
            source, before = self.reads[n]
            out = layer(x if source is None else found[source])
            if before is not None:
                out = out + found[before]
            if (n, "out") in self.wanted:
                found[n, "out"] = out
            if (n, "active") in self.wanted:
                found[n, "active"] = layer.active(out)
            for dead in self.ends[n]:
                del found[dead]
        if self.inner:
            results = tuple(found[exit] for exit in self.exits)
            return results if len(results) > 1 else results[0]
        return out.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class FoldedLayer(nn.Module):
    """One FusedLayer, without its residual. Buffers in `dtype`, None for what the layer does not
    have: weight, bias, and scale and shift [C, 1, 1] of its `affine`."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.layer = layer
        left, right, top, bottom = layer.padding
        self.even = left == right and top == bottom
        empty = dict.fromkeys(("weight", "bias", "scale", "shift", "ones"))
        if layer.conv is not None:
            weight = layer.conv.weight
            empty["weight"] = torch.empty_like(
                weight, dtype=dtype, memory_format=torch.channels_last, requires_grad=False
            )
            if layer.norm is not None or layer.conv.bias is not None:
                empty["bias"] = weight.new_empty(len(weight), dtype=dtype)
        if layer.affine is not None:
            ones = torch.ones_like(layer.affine.running_mean)[:, None, None]
            empty["ones"] = ones  # what the affine multiplies, as a convolution's weights
            empty |= {name: torch.empty_like(ones, dtype=dtype) for name in ("scale", "shift")}
        for name, buffer in empty.items():
            self.register_buffer(name, buffer, persistent=False)

    def folds(self):
        """Yields (weight_out, bias_out, weight, bias, norm) of `fold_bn_` for the convolution and
        for `affine`, where the layer has them."""
        layer = self.layer
        if layer.conv is not None:
            norm = layer.norm and parts(layer.norm)
            yield self.weight, self.bias, layer.conv.weight, layer.conv.bias, norm
        if layer.affine is not None:
            yield self.scale, self.shift.flatten(), self.ones, None, parts(layer.affine)

    def forward(self, source):
        layer = self.layer
        if layer.adaptive is not None:
            return F.adaptive_avg_pool2d(source, layer.adaptive)
        if layer.conv is None:
            size, stride = layer.window
            return source if size == stride == (1, 1) else F.avg_pool2d(source, size, stride)
        _, stride, dilation, (left, right, top, bottom) = layer.geometry
        padding = (top, left)
        if not self.even:
            source, padding = F.pad(source, (left, right, top, bottom)), 0
        groups = layer.conv.groups
        return F.conv2d(source, self.weight, self.bias, stride, padding, dilation, groups)

    def active(self, out):
        """activation(affine(out))"""
        if self.scale is not None:
            out = torch.addcmul(self.shift, out, self.scale)
        activation, cap = self.layer.activation, self.layer.cap
        if activation == "silu":
            return F.silu(out)
        if activation == "none":
            return out
        return F.relu(out) if cap == float("inf") else F.hardtanh(out, 0.0, cap)
