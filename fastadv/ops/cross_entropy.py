"""cross_entropy: of softmax(logits) with labels or probabilities, per sample.

    q = (1 - a) t + a / C,  loss_i = -sum_c q_c log softmax(z)_c

logits z: [B, C]; target t: [B, C], or int64 [B], whose one-hot it then is; a: label_smoothing;
loss: [B], float32 for halves, 0 where a label is ignore_index; or the sum, or the mean of the
others. Differentiable in logits.
"""

import torch

from . import _native, reference
from ._library import expect, expect_constant, expect_tensors
from ._logits import as_labels, check_labels, check_logits, check_range, define_loss


def _check(logits, target, label_smoothing, ignore_index, reduction, grad):
    check_logits(logits)
    if target.dtype == torch.int64:
        check_labels(target, logits, "target")
    elif target.dtype.is_floating_point:
        dtype = reference.loss_dtype(logits.dtype)
        expect("target", target, dtype=dtype, like=logits, shape=logits.shape)
    else:
        raise TypeError(f"target is {target.dtype}, must be integer labels or floating point")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 1]")
    if reduction not in _native.REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, must be 'none', 'sum' or 'mean'")


def _check_values(logits, target, label_smoothing, ignore_index, reduction, grad):
    if target.dtype == torch.int64:
        check_range(target, logits.shape[1], "target", ignore_index)


_cross_entropy = define_loss(
    "cross_entropy",
    "Tensor target, float label_smoothing, int ignore_index, str reduction",
    _check,
    _check_values,
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
    return _cross_entropy(logits, as_labels(target), *rest)[0]
