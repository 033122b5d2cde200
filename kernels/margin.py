"""margin in Triton: how far the strongest other class is ahead of the label, with its gradient.

loss_i = max_{c != y_i} z_c - z_{y_i};  grad_i = +1 at the first maximum, -1 at y_i, else 0
"""

import triton
import triton.language as tl

from .rows import labels_of, launch, rows_of, strongest_other, tile


@triton.jit
def margin_kernel(
    loss,
    grad,
    logits,
    y,
    batch,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows. loss: fp32 [batch]; logits: [batch, C], any float; grad: the same or None; y:
    int64 [batch]. A label outside [0, C): NaN, gradient 0; no other logit above -inf: gradient 0.
    """
    row = rows_of(ROWS)
    label, own = labels_of(y, logits, row, batch, C)
    top, other = strongest_other(logits, label, row, batch, C, ROWS, BLOCK)
    tl.store(loss + row, tl.where(label >= 0, top - own, float("nan")), row < batch)
    if grad is not None:
        one = tl.where((label >= 0) & (top != -float("inf")), 1.0, 0.0)[:, None]
        for first in tl.range(0, C, BLOCK):
            column, at, inside = tile(row, first, batch, C, BLOCK)
            down = tl.where(column == label[:, None], -one, 0.0)
            tl.store(grad + at, tl.where(column == other[:, None], one, down), inside)


def margin(logits, y, grad):
    """(loss, gradient) of logits [B, C], fp32, bf16 or fp16; see `rows.launch`."""
    return launch(margin_kernel, logits, grad, y.contiguous())
