"""cross_entropy: of softmax(logits) with labels or probabilities, per sample.

    q = (1 - a) t + a / C,  loss_i = -sum_c q_c log softmax(z)_c

logits z: [B, C]; target t: [B, C], or int64 [B], whose one-hot it then is; a: label_smoothing;
loss: [B], float32 for halves, 0 where a label is ignore_index; or the sum, or the mean of the
others. Differentiable in logits.
"""

import math

import torch

from ._library import expect, expect_constant, expect_tensors
from ._logits import (
    addresses,
    check_int64_labels,
    check_logits,
    check_range,
    define_loss,
    int64_labels,
    loss_dtype,
)
from ._native import CPU, DTYPES, contiguous, run
from ._reference import at_least_fp32, valid_label


def _check(logits, target, label_smoothing, ignore_index, reduction, grad):
    check_logits(logits)
    if target.dtype == torch.int64:
        check_int64_labels(target, logits, "target")
    elif target.dtype.is_floating_point:
        dtype = loss_dtype(logits.dtype)
        expect("target", target, dtype=dtype, like=logits, shape=logits.shape)
    else:
        raise TypeError(f"target is {target.dtype}, must be integer labels or floating point")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 1]")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, must be 'none', 'sum' or 'mean'")


def _check_values(logits, target, label_smoothing, ignore_index, reduction, grad):
    if target.dtype == torch.int64:
        check_range(target, logits.shape[1], "target", ignore_index)


def reference(logits, target, label_smoothing, ignore_index, reduction, grad):
    """-sum_c q_c log p_c [B] and its gradient p sum_c q_c - q [B, C], p = softmax(logits) and
    q = (1 - label_smoothing) t + label_smoothing / C, t the target or the one-hot of its labels;
    or the sum of all, or the mean over the samples whose label is not ignore_index.

    logits [B, C]; target int64 [B] or [B, C]. A class with q_c = 0 counts 0. A label that is
    ignore_index: 0, gradient 0; any other outside [0, C): NaN, gradient 0. Label smoothing: Szegedy
    et al. 2016, section 7.
    """
    wide, classes, valid = at_least_fp32(logits), logits.shape[1], None
    if target.dtype == torch.int64:
        valid, label = valid_label(target, logits)
        ignored = target == ignore_index
        valid = valid & ~ignored
        wide = wide.masked_fill(ignored[:, None], 0)  # a NaN there must not reach a gradient
        target = torch.zeros_like(wide).scatter(1, label, 1)
    q = (1 - label_smoothing) * target + label_smoothing / classes
    log_p = wide.log_softmax(dim=1)
    loss = -(q * log_p).masked_fill(q == 0, 0).sum(dim=1)
    gradient = log_p.exp() * q.sum(dim=1, keepdim=True) - q
    if valid is not None:
        loss = torch.where(valid, loss, torch.where(ignored, 0.0, math.nan))
        gradient = torch.where(valid[:, None], gradient, 0)
    if reduction == "mean":
        kept = torch.ones_like(loss) if valid is None else (~ignored).to(loss.dtype)
        factor = 1 / kept.sum().clamp(min=1)
        loss, gradient = loss * factor, gradient * factor
    loss = loss if reduction == "none" else loss.sum()
    return loss, gradient.to(logits.dtype) if grad else logits.new_empty(0)


def _kernel(loss, gradient, logits, target, label_smoothing, ignore_index, reduction):
    if target.dtype == torch.int64:
        targets = *contiguous(CPU, torch.int64, target=target), 0
    else:
        targets = 0, *contiguous(CPU, torch.float32, target=target)
    return run(
        "cross_entropy",
        CPU,
        *addresses(loss, gradient, logits),
        *targets,
        *logits.shape,
        label_smoothing,
        ignore_index,
        reduction,
        DTYPES[logits.dtype],
    )


def _triton():
    from ..kernels.cross_entropy import cross_entropy

    return cross_entropy


_cross_entropy = define_loss(
    "cross_entropy",
    "Tensor target, float label_smoothing, int ignore_index, str reduction",
    check=_check,
    reference=reference,
    kernel=_kernel,
    triton=_triton,
    check_values=_check_values,
    reduced=lambda *args: args[3] != "none",
)


def cross_entropy(logits, target, label_smoothing=0.0, ignore_index=-100, reduction="none"):
    """-sum_c q_c log softmax(logits)_c as [B], or its sum or mean, in one pass with its gradient.

    The op under `losses.cross_entropy`, which has the arguments and edge cases. target: integers
    [B], or [B, C] in float32 (float64 with float64 logits), which must not require grad. TypeError
    or ValueError that names the argument at fault.
    """
    expect_tensors(logits=logits, target=target)
    expect_constant("target", target)
    grad = logits.requires_grad and torch.is_grad_enabled()
    rest = label_smoothing, ignore_index, reduction, grad
    return _cross_entropy(logits, int64_labels(target), *rest)[0]
