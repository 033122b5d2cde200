"""Runs the plan of a trunk in torch's own convolutions, for devices other than CPUs."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import fold_bn_
from .stage import parts


class Folded(nn.Module):
    """fp32 images [B, C, H, W] -> fp32 features [B, C', H', W'], differentiable to the images only.

    stages, image_affine: as for Trunk. dtype: of the weights and of all between entry and exit,
    float32 or bfloat16; memory is channels_last in between. Weights are those of the last
    `refresh()`, which writes them where they are: captured CUDA graphs and compiled code follow.
    """

    @torch.inference_mode(False)  # whose tensors could not be saved for a backward pass
    def __init__(self, stages, image_affine, dtype):
        super().__init__()
        self.stages, self.image_affine, self.dtype = stages, image_affine, dtype
        number = {stage: n for n, stage in enumerate(stages)}
        self.reads = [
            tuple(ref and (number[ref.stage], ref.side) for ref in (stage.source, stage.before))
            for stage in stages
        ]
        last = {key: n for n, keys in enumerate(self.reads) for key in keys if key is not None}
        self.wanted = set(last)
        self.ends = [[key for key in last if last[key] == n] for n in range(len(stages))]
        self.layers = nn.ModuleList(Layer(stage, dtype) for stage in stages)
        weight = stages[0].conv.weight
        for name in ("scale", "shift"):
            self.register_buffer(name, weight.new_empty(1, weight.shape[1], 1, 1), persistent=False)
        self.eval()
        self.refresh()

    @property
    def device(self):
        return self.scale.device

    @torch.no_grad()
    def refresh(self):
        """Folds the weights anew."""
        fold_bn_(*zip(*[fold for layer in self.layers for fold in layer.folds()], strict=True))
        for buffer, values in zip((self.scale, self.shift), self.image_affine(), strict=True):
            buffer.copy_(values.view_as(buffer))

    def guarded(self, logits):
        """These: torch itself refuses a backward pass whose weights have been written to."""
        return logits

    def forward(self, x):
        image = torch.addcmul(self.shift, x, self.scale)
        image = image.to(self.dtype, memory_format=torch.channels_last)
        found = {}
        for n, layer in enumerate(self.layers):
            source, before = self.reads[n]
            out = layer(image if source is None else found[source])
            if before is not None:
                out = out + found[before]
            if (n, "out") in self.wanted:
                found[n, "out"] = out
            if (n, "active") in self.wanted:
                found[n, "active"] = layer.active(out)
            for dead in self.ends[n]:
                del found[dead]
        return out.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class Layer(nn.Module):
    """One stage, without its residual: weight, bias, and scale and shift [C, 1, 1] of its affine
    BatchNorm, in `dtype`; None for what it does not have."""

    def __init__(self, stage, dtype):
        super().__init__()
        self.stage = stage
        left, right, top, bottom = stage.padding
        self.even = left == right and top == bottom
        empty = dict.fromkeys(("weight", "bias", "scale", "shift", "ones"))
        if stage.conv is not None:
            weight = stage.conv.weight
            empty["weight"] = torch.empty_like(
                weight, dtype=dtype, memory_format=torch.channels_last, requires_grad=False
            )
            if stage.norm is not None or stage.conv.bias is not None:
                empty["bias"] = weight.new_empty(len(weight), dtype=dtype)
        if stage.affine is not None:
            ones = torch.ones_like(stage.affine.running_mean)[:, None, None]
            empty["ones"] = ones  # what the affine multiplies, as a convolution's weights
            empty |= {name: torch.empty_like(ones, dtype=dtype) for name in ("scale", "shift")}
        for name, buffer in empty.items():
            self.register_buffer(name, buffer, persistent=False)

    def folds(self):
        """(weight_out, bias_out, weight, bias, norm) of `fold_bn_`, for what this stage has."""
        stage = self.stage
        if stage.conv is not None:
            norm = stage.norm and parts(stage.norm)
            yield self.weight, self.bias, stage.conv.weight, stage.conv.bias, norm
        if stage.affine is not None:
            yield self.scale, self.shift.flatten(), self.ones, None, parts(stage.affine)

    def forward(self, source):
        stage = self.stage
        if stage.adaptive is not None:
            return F.adaptive_avg_pool2d(source, stage.adaptive)
        if stage.conv is None:
            size, stride = stage.window
            return source if size == stride == (1, 1) else F.avg_pool2d(source, size, stride)
        _, stride, dilation, (left, right, top, bottom) = stage.geometry
        padding = (top, left)
        if not self.even:
            source, padding = F.pad(source, (left, right, top, bottom)), 0
        groups = stage.conv.groups
        return F.conv2d(source, self.weight, self.bias, stride, padding, dilation, groups)

    def active(self, out):
        """activation(affine(out))"""
        if self.scale is not None:
            out = torch.addcmul(self.shift, out, self.scale)
        activation, cap = self.stage.activation, self.stage.cap
        if activation == "silu":
            return F.silu(out)
        if activation == "none":
            return out
        return F.relu(out) if cap == float("inf") else F.hardtanh(out, 0.0, cap)
