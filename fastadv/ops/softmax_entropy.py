"""softmax_entropy: the entropy of softmax(logits / T), per sample.

    q = softmax(z / T),  H_i = -sum_c q_c log(q_c + offset)

logits z: [B, C]; H: [B], float32 for halves. Differentiable in logits.
"""

import math

import torch

from ._library import expect_tensors
from ._logits import check_logits, define_loss


def _check(logits, temperature, offset, grad):
    check_logits(logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be positive and finite")
    if not 0 <= offset < math.inf:
        raise ValueError(f"offset is {offset}, must be at least 0 and finite")


_softmax_entropy = define_loss("softmax_entropy", "float temperature, float offset", _check)


def softmax_entropy(logits, temperature=1.0, offset=0.0):
    """-sum_c q_c log(q_c + offset) as [B], q = softmax(logits / temperature).

    The op under `losses.entropy`, which has the arguments, errors and edge cases.
    """
    expect_tensors(logits=logits)
    grad = logits.requires_grad and torch.is_grad_enabled()
    return _softmax_entropy(logits, temperature, offset, grad)[0]
