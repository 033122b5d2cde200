"""margin: how far the strongest other class is ahead of the label, per sample.

    loss_i = max_{c != y_i} z_c - z_{y_i}

logits z: [B, C]; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import math

import torch

from ._library import expect_tensors
from ._logits import define_labelled, int64_labels
from ._reference import at_least_fp32, valid_label


def reference(logits, y, grad):
    """max_{c != y} z_c - z_y [B], and its gradient [B, C]: +1 at the first maximum, -1 at y.

    logits [B, C], y int64 [B]. NaN is the largest logit. y outside [0, C): NaN, gradient 0; no
    other logit above -inf: -inf, gradient 0. Carlini & Wagner 2017, f6.
    """
    valid, label = valid_label(y, logits)
    wide = at_least_fp32(logits)
    top, other = wide.scatter(1, label, -math.inf).max(dim=1)
    own = wide.gather(1, label)[:, 0]
    own = torch.where(top == -math.inf, own.detach(), own)  # no gradient there either
    loss = torch.where(valid, top - own, math.nan)
    if not grad:
        return loss, logits.new_empty(0)
    one = (valid & (top != -math.inf)).to(logits.dtype)[:, None]
    zero = logits.new_zeros(logits.shape)
    return loss, zero.scatter(1, other[:, None], one).scatter(1, label, -one)


def _triton():
    from ..kernels.margin import margin

    return margin


_margin = define_labelled("margin", least=1, reference=reference, triton=_triton)


def margin(logits, y):
    """max_{c != y} z_c - z_y as [B]: positive where the model is wrong (Carlini & Wagner 2017, f6).

    logits: float32, bfloat16 or float16 [B, C] (float64 runs as plain torch); y: integers [B].
    The gradient is +1 at the strongest other class, the first of equals, and -1 at the label.
    The result is float32 for halves, and exact. NaN is the largest logit; no other logit above -inf
    (C = 1) gives -inf with gradient 0. A label outside [0, C) raises ValueError on a CPU; on a GPU
    and under torch.func it gives NaN with gradient 0.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(logits=logits, y=y)
    return _margin(logits, int64_labels(y), logits.requires_grad and torch.is_grad_enabled())[0]
