"""margin: how far the strongest other class is ahead of the label, per sample.

    loss_i = max_{c != y_i} z_c - z_{y_i}

logits z: [B, C]; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import torch

from .. import _native, reference
from .._library import FLOATS, define, expect, gradients_from_forward


def _check(logits, y, grad):
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, must be [B, C] with C >= 1")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits is {logits.dtype}, must be one of {FLOATS}")
    expect("y", y, dtype=torch.int64, like=logits, shape=logits.shape[:1])


def _cpu(logits, y, grad):
    if logits.dtype == torch.float64:
        return reference.margin(logits, y, grad)
    loss = _native.empty(y.shape, logits, torch.float32)
    grad_logits = _native.empty(logits.shape if grad else (0,), logits)
    _native.margin(loss, grad_logits, logits.contiguous(), y.contiguous())
    return loss, grad_logits


def _fake(logits, y, grad):
    _check(logits, y, grad)
    loss = logits.new_empty(y.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, logits.new_empty(logits.shape if grad else (0,))


_margin = define(
    "margin(Tensor logits, Tensor y, bool grad) -> (Tensor, Tensor)",
    check=_check,
    reference=reference.margin,
    native=_cpu,
    fake=_fake,
)
gradients_from_forward(_margin, (0,))


def margin(logits, y):
    """max_{c != y} z_c - z_y as [B]: positive where the model is wrong (Carlini & Wagner 2017, f6).

    logits: float32, bfloat16 or float16 [B, C] (float64 runs as plain torch); y: int64 [B].
    The gradient is +1 at the strongest other class, the first of equals, and -1 at the label.
    The result is float32 for halves, and exact. NaN is the largest logit. A label outside
    [0, C) gives NaN with gradient 0; no other logit above -inf (C = 1) gives -inf with gradient 0.
    Raises TypeError or ValueError that names the argument at fault.
    """
    return _margin(logits, y, logits.requires_grad and torch.is_grad_enabled())[0]
