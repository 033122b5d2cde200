"""cross_entropy: of softmax(logits) with labels or probabilities, per sample.

    q = (1 - a) t + a / C,  loss_i = -sum_c q_c log softmax(z)_c

logits z: [B, C]; target t: [B, C], or int64 [B], whose one-hot it then is; a: label_smoothing;
loss: [B], float32 for halves. Differentiable in logits.
"""

import torch

from .. import reference
from .._library import expect
from ._logits import check_labels, check_logits, define_loss


def _check(logits, target, label_smoothing, grad):
    check_logits(logits)
    if target.dtype == torch.int64:
        check_labels(target, logits, "target")
    elif target.dtype.is_floating_point:
        dtype = reference.loss_dtype(logits.dtype)
        expect("target", target, dtype=dtype, like=logits, shape=logits.shape)
    else:
        raise TypeError(f"target is {target.dtype}, must be int64 labels or floating point")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 1]")


_cross_entropy = define_loss("cross_entropy", "Tensor target, float label_smoothing", _check)


def cross_entropy(logits, target, label_smoothing=0.0):
    """-sum_c q_c log softmax(logits)_c as [B], in one pass with its gradient.

    The op under `losses.cross_entropy`, which has the arguments and edge cases. target: int64 [B],
    or [B, C] in float32 (float64 with float64 logits), which must not require grad. TypeError
    or ValueError that names the argument at fault.
    """
    if target.requires_grad:
        raise ValueError(
            "target requires grad, must be a constant: detach it, or use losses.kl on the logits "
            "behind it, which is differentiable in both"
        )
    grad = logits.requires_grad and torch.is_grad_enabled()
    return _cross_entropy(logits, target, label_smoothing, grad)[0]
