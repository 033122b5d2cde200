"""softmax_entropy: the entropy of softmax(logits / T), per sample.

    q = softmax(z / T),  H_i = -sum_c q_c log(q_c + offset)

logits z: [B, C]; H: [B], float32 for halves. Differentiable in logits.
"""

import math

import torch

from .. import _native, reference
from .._library import define, gradients_from_forward
from ._logits import check_logits, outputs


def _check(logits, temperature, offset, grad):
    check_logits(logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be positive and finite")
    if not 0 <= offset < math.inf:
        raise ValueError(f"offset is {offset}, must be at least 0 and finite")


def _cpu(logits, temperature, offset, grad):
    if logits.dtype == torch.float64:
        return reference.softmax_entropy(logits, temperature, offset, grad)
    loss, gradient = outputs(logits, grad)
    _native.softmax_entropy(loss, gradient, logits.contiguous(), temperature, offset)
    return loss, gradient


def _fake(logits, temperature, offset, grad):
    _check(logits, temperature, offset, grad)
    return outputs(logits, grad)


_softmax_entropy = define(
    "softmax_entropy(Tensor logits, float temperature, float offset, bool grad) "
    "-> (Tensor, Tensor)",
    check=_check,
    reference=reference.softmax_entropy,
    native=_cpu,
    fake=_fake,
)
gradients_from_forward(_softmax_entropy, (0,))


def softmax_entropy(logits, temperature=1.0, offset=0.0):
    """-sum_c q_c log(q_c + offset) as [B], q = softmax(logits / temperature).

    The op under `losses.entropy`, which has the arguments, errors and edge cases.
    """
    grad = logits.requires_grad and torch.is_grad_enabled()
    return _softmax_entropy(logits, temperature, offset, grad)[0]
