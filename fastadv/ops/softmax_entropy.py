"""softmax_entropy: the entropy of softmax(logits / T), per sample.

    q = softmax(z / T),  H_i = -sum_c q_c log(q_c + offset)

logits z: [B, C]; H: [B], float32 for halves. Differentiable in logits.
"""

import math

import torch

from ._library import expect_tensors
from ._logits import addresses, check_logits, define_loss
from ._native import CPU, DTYPES, run
from ._reference import at_least_fp32


def _check(logits, temperature, offset, grad):
    check_logits(logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be positive and finite")
    if not 0 <= offset < math.inf:
        raise ValueError(f"offset is {offset}, must be at least 0 and finite")


def reference(logits, temperature, offset, grad):
    """H = -sum_c q_c log(q_c + offset) [B] of q = softmax(logits / T), logits [B, C], and its
    gradient -q (g - sum_c q_c g_c) / T, g = log(q + offset) + q / (q + offset).

    With offset 0 the exact entropy: 0 log 0 = 0.
    """
    log_q = (at_least_fp32(logits) / temperature).log_softmax(dim=1)
    q = log_q.exp()
    if offset == 0:
        log = slope = log_q.masked_fill(q == 0, 0)  # and 1 in g, which cancels
    else:
        log = (q + offset).log()
        slope = log + q / (q + offset)
    loss = -(q * log).sum(dim=1)
    gradient = -q * (slope - (q * slope).sum(dim=1, keepdim=True)) / temperature
    return loss, gradient.to(logits.dtype) if grad else logits.new_empty(0)


def _kernel(loss, gradient, logits, temperature, offset):
    run(
        "softmax_entropy",
        CPU,
        *addresses(loss, gradient, logits),
        *logits.shape,
        temperature,
        offset,
        DTYPES[logits.dtype],
    )


def _triton():
    from ..kernels.softmax_entropy import softmax_entropy

    return softmax_entropy


_softmax_entropy = define_loss(
    "softmax_entropy",
    "float temperature, float offset",
    check=_check,
    reference=reference,
    kernel=_kernel,
    triton=_triton,
)


def softmax_entropy(logits, temperature=1.0, offset=0.0):
    """-sum_c q_c log(q_c + offset) as [B], q = softmax(logits / temperature).

    The op under `losses.entropy`, which has the arguments, errors and edge cases.
    """
    expect_tensors(logits=logits)
    grad = logits.requires_grad and torch.is_grad_enabled()
    return _softmax_entropy(logits, temperature, offset, grad)[0]
