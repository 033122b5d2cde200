"""mart_bce: the boosted cross-entropy of MART, per sample.

    q = softmax(z), y'_i = argmax_{c != y_i} z_c
    loss_i = -log q_{y_i} - log(1.0001 - q_{y'_i} + 1e-12)

logits z: [B, C], C >= 2; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import torch

from ._library import expect_tensors
from ._logits import as_labels, define_labelled

_mart_bce = define_labelled("mart_bce", least=2)


def mart_bce(logits, y):
    """-log q_y - log(1.0001 - q_{y'} + 1e-12) as [B], q the softmax and y' the likeliest class but
    y (Wang et al. 2020, equation 6, with the constants of its authors' code).

    The op under `losses.mart_bce`, which has the arguments, errors and edge cases.
    """
    expect_tensors(logits=logits, y=y)
    return _mart_bce(logits, as_labels(y), logits.requires_grad and torch.is_grad_enabled())[0]
