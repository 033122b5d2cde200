"""Runs a segment in torch's own convolutions, on any device."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import bias_relu, fold_bn_
from .plan import Unsupported, parts

# Whether bias, residual sum and ReLU of a convolution run as one op on a GPU. Provisional: a
# launch less each, and a bit for an activation in the backward pass, but timed on no GPU yet.
FUSED_RELU = False


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
        self.fusible = [
            layer.conv is not None
            and layer.affine is None
            and layer.activation == "relu"
            and (n, "out") not in self.wanted
            for n, layer in enumerate(plan)
        ]
        self.layers = nn.ModuleList(FoldedLayer(layer, dtype) for layer in plan)
        for name in ("scale", "shift"):
            size = (1, segment.channels, 1, 1) if image_affine else 0
            self.register_buffer(name, self.weight.new_empty(size), persistent=False)
        self.eval()
        self.refresh()

    @property
    def fused_relu(self):
        """Whether ReLUs run in `bias_relu`."""
        return FUSED_RELU and self.weight.is_cuda

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
        fused = self.fused_relu and not torch.compiler.is_compiling()  # which fuses by itself
        found = {}  # of each value one or two copies, for as many readers

        def read(key):
            return found[key].pop() if len(found[key]) > 1 else found[key][0]

        for n, layer in enumerate(self.layers):
            source, before = self.reads[n]
            source = x if source is None else read(source)
            before = None if before is None else read(before)
            if fused and self.fusible[n]:
                found[n, "active"] = [*layer.relu(source, before)]
            else:
                out = layer(source)
                out = out if before is None else out + before
                if (n, "out") in self.wanted:
                    found[n, "out"] = [out]
                if (n, "active") in self.wanted:
                    found[n, "active"] = [layer.active(out)]
            for dead in self.ends[n]:
                del found[dead]
        results = tuple(found[exit][0] for exit in self.exits)
        if self.inner:
            return results if len(results) > 1 else results[0]
        (out,) = results
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

    def forward(self, source, bias=True):
        """The convolution, or pooling; without its bias if asked."""
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
        bias = self.bias if bias else None
        return F.conv2d(source, self.weight, bias, stride, padding, dilation, groups)

    def relu(self, source, before):
        """(y, y), for two readers: the activation after a convolution and a residual, in one op."""
        out = self(source, bias=False).contiguous(memory_format=torch.channels_last)
        if before is not None:
            before = before.contiguous(memory_format=torch.channels_last)
        return bias_relu(out, self.bias, before, self.layer.cap)

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
