"""dlr: the difference of logits ratio, per sample.

    loss_i = -(z_{y_i} - max_{c != y_i} z_c) / (z_pi1 - z_pi3 + 1e-12),  z_pi1 >= z_pi2 >= z_pi3 ...

logits z: [B, C], C >= 3; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import math

import torch

from ._library import expect_tensors
from ._logits import define_labelled, int64_labels
from ._reference import at_least_fp32, valid_label


def reference(logits, y, grad):
    """-n / d [B], n = z_y - max_{c != y} z_c, d = z_pi1 - z_pi3 + 1e-12 with z_pi1 >= z_pi2 >= ...,
    and its gradient [B, C]: -1 / d at y, 1 / d at the maximum, n / d^2 at pi1, -n / d^2 at pi3.

    logits [B, C >= 3], y int64 [B]. Of equal logits the first comes first; NaN is the largest. y
    outside [0, C): NaN, gradient 0. Croce & Hein 2020, equation 6.
    """
    valid, label = valid_label(y, logits)
    wide = at_least_fp32(logits)
    top, order = (v[:, :3] for v in wide.sort(dim=1, descending=True, stable=True))
    other = (order[:, :1] == label).long()
    n = (wide.gather(1, label) - top.gather(1, other))[:, 0]
    d = top[:, 0] - top[:, 2] + 1e-12
    loss = torch.where(valid, -n / d, math.nan)
    if not grad:
        return loss, logits.new_empty(0)
    at = torch.cat([label, order.gather(1, other), order[:, :1], order[:, 2:]], dim=1)
    slope = torch.stack([-1 / d, 1 / d, n / d / d, -n / d / d], dim=1)
    slope = torch.where(valid[:, None], slope, 0)
    return loss, torch.zeros_like(wide).scatter_add(1, at, slope).to(logits.dtype)


def _triton():
    from ..kernels.dlr import dlr

    return dlr


_dlr = define_labelled("dlr", least=3, reference=reference, triton=_triton)


def dlr(logits, y):
    """-(z_y - max_{c != y} z_c) / (z_pi1 - z_pi3 + 1e-12) as [B] (Croce & Hein 2020, equation 6).

    logits: float32, bfloat16 or float16 [B, C] with C >= 3 (float64 runs as plain torch); y:
    integers [B]. Positive where the model is wrong, and at least -1. The gradient goes through
    numerator and denominator; of equal logits the first counts as the larger. The result is float32
    for halves. NaN is the largest logit: it makes its row's loss NaN, and the gradient at the
    classes in the formula. A label outside [0, C) raises ValueError on a CPU; on a GPU and under
    torch.func it gives NaN with gradient 0.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(logits=logits, y=y)
    return _dlr(logits, int64_labels(y), logits.requires_grad and torch.is_grad_enabled())[0]
