"""margin: how far the strongest other class is ahead of the label, per sample.

    loss_i = max_{c != y_i} z_c - z_{y_i}

logits z: [B, C]; y: int64 [B]; loss: [B], float32 for halves. Differentiable in logits.
"""

import torch

from ._library import expect_tensors
from ._logits import as_labels, define_labelled

_margin = define_labelled("margin", least=1)


def margin(logits, y):
    """max_{c != y} z_c - z_y as [B]: positive where the model is wrong (Carlini & Wagner 2017, f6).

    logits: float32, bfloat16 or float16 [B, C] (float64 runs as plain torch); y: integers [B].
    The gradient is +1 at the strongest other class, the first of equals, and -1 at the label.
    The result is float32 for halves, and exact. NaN is the largest logit; no other logit above -inf
    (C = 1) gives -inf with gradient 0. A label outside [0, C) raises ValueError on a CPU; on a GPU
    and under torch.func it gives NaN with gradient 0.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(logits=logits, y=y)
    return _margin(logits, as_labels(y), logits.requires_grad and torch.is_grad_enabled())[0]
