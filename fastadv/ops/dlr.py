"""dlr: the difference of logits ratio, per sample.

    loss_i = -(z_{y_i} - max_{c != y_i} z_c) / (z_pi1 - z_pi3 + 1e-12),  z_pi1 >= z_pi2 >= z_pi3 ...

logits z: [B, C], C >= 3; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import torch

from ._library import expect_tensors
from ._logits import as_labels, define_labelled

_dlr = define_labelled("dlr", least=3)


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
    return _dlr(logits, as_labels(y), logits.requires_grad and torch.is_grad_enabled())[0]
