"""mart_bce: the boosted cross-entropy of MART, per sample.

    q = softmax(z), y'_i = argmax_{c != y_i} z_c
    loss_i = -log q_{y_i} - log(1.0001 - q_{y'_i} + 1e-12)

logits z: [B, C], C >= 2; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import math

import torch

from ._library import expect_tensors
from ._logits import define_labelled, int64_labels
from ._reference import at_least_fp32, valid_label


def reference(logits, y, grad):
    """-log q_y - log(u) [B], u = 1.0001 - q_{y'} + 1e-12, q = softmax(logits), y' the likeliest
    class but y, the first of equals; and its gradient q (1 - k) - [y] + k [y'], k = q_{y'} / u.

    logits [B, C >= 2], y int64 [B]. y outside [0, C): NaN, gradient 0. Wang et al. 2020, equation
    6, with the constants of the authors' code.
    """
    valid, label = valid_label(y, logits)
    log_q = at_least_fp32(logits).log_softmax(dim=1)
    top, other = log_q.scatter(1, label, -math.inf).max(dim=1, keepdim=True)
    u = 1.0001 - top.exp() + 1e-12
    loss = torch.where(valid, -(log_q.gather(1, label) + u.log())[:, 0], math.nan)
    if not grad:
        return loss, logits.new_empty(0)
    k = top.exp() / u
    gradient = (log_q.exp() * (1 - k)).scatter_add(1, label, -torch.ones_like(k))
    gradient = torch.where(valid[:, None], gradient.scatter_add(1, other, k), 0)
    return loss, gradient.to(logits.dtype)


def _triton():
    from ..kernels.mart_bce import mart_bce

    return mart_bce


_mart_bce = define_labelled("mart_bce", least=2, reference=reference, triton=_triton)


def mart_bce(logits, y):
    """-log q_y - log(1.0001 - q_{y'} + 1e-12) as [B], q the softmax and y' the likeliest class but
    y (Wang et al. 2020, equation 6, with the constants of its authors' code).

    The op under `losses.mart_bce`, which has the arguments, errors and edge cases.
    """
    expect_tensors(logits=logits, y=y)
    return _mart_bce(logits, int64_labels(y), logits.requires_grad and torch.is_grad_enabled())[0]
