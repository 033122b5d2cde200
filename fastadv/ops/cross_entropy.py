"""cross_entropy: of softmax(logits) with labels or probabilities, per sample.

    q = (1 - a) t + a / C,  loss_i = -sum_c q_c log softmax(z)_c

logits z: [B, C]; target t: [B, C], or int64 [B], whose one-hot it then is; a: label_smoothing;
loss: [B], float32 for halves. Differentiable in logits.
"""

import torch

from .. import _native, reference
from .._library import define, expect, gradients_from_forward
from ._logits import check_labels, check_logits, outputs


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


def _cpu(logits, target, label_smoothing, grad):
    if logits.dtype == torch.float64:
        return reference.cross_entropy(logits, target, label_smoothing, grad)
    loss, gradient = outputs(logits, grad)
    args = logits.contiguous(), target.contiguous(), label_smoothing
    _native.cross_entropy(loss, gradient, *args)
    return loss, gradient


def _fake(logits, target, label_smoothing, grad):
    _check(logits, target, label_smoothing, grad)
    return outputs(logits, grad)


_cross_entropy = define(
    "cross_entropy(Tensor logits, Tensor target, float label_smoothing, bool grad) "
    "-> (Tensor, Tensor)",
    check=_check,
    reference=reference.cross_entropy,
    native=_cpu,
    fake=_fake,
)
gradients_from_forward(_cross_entropy, (0,))


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
