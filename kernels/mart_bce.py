"""mart_bce in Triton: the boosted cross-entropy of MART, with its gradient.

    q = softmax(z), y' the likeliest class but y, u = 1.0001 - q_y' + 1e-12, k = q_y' / u
    loss = -log q_y - log u,  grad = q (1 - k) - [y] + k [y']

1 - q_y' and 1 - q_y are sums over the other classes: the differences would cancel. What is left of
a row after its sums is fp64: logarithms of nearly 1.
"""

import triton
import triton.language as tl

from .rows import exp, labels_of, launch, read, rows_of, strongest_other, tile


@triton.jit
def mart_bce_kernel(
    loss, grad, logits, y, batch, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows. loss: fp32 [batch]; logits: [batch, C >= 2], any float; grad: the same or None; y:
    int64 [batch]. A label outside [0, C): NaN, gradient 0."""
    row = rows_of(ROWS)
    label, own = labels_of(y, logits, row, batch, C)
    strongest, other = strongest_other(logits, label, row, batch, C, ROWS, BLOCK)
    top = tl.maximum(own, strongest)
    sure, likeliest = exp(own - top).to(tl.float64), exp(strongest - top).to(tl.float64)
    neither = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        column, at, inside = tile(row, first, batch, C, BLOCK)
        z = read(logits, at, inside)
        named = (column == label[:, None]) | (column == other[:, None])
        neither += tl.where(named, 0.0, exp(z - top[:, None]))
    neither = tl.sum(neither, 1).to(tl.float64)
    total = neither + likeliest + sure
    q, rest = likeliest / total, (neither + sure) / total
    u = rest + (0.0001 + 1e-12)
    if grad is not None:
        k = q / u
        at_label = (-(neither + likeliest + k * sure) / total).to(tl.float32)
        at_other = (q + k * rest).to(tl.float32)
        shrink = ((1.0 - k) / total).to(tl.float32)
        for first in tl.range(0, C, BLOCK):
            column, at, inside = tile(row, first, batch, C, BLOCK)
            z = read(logits, at, inside)
            slope = exp(z - top[:, None]) * shrink[:, None]
            slope = tl.where(column == other[:, None], at_other[:, None], slope)
            slope = tl.where(column == label[:, None], at_label[:, None], slope)
            tl.store(grad + at, tl.where((label >= 0)[:, None], slope, 0.0), inside)
    value = ((top - own).to(tl.float64) + tl.log(total) - tl.log(u)).to(tl.float32)
    tl.store(loss + row, tl.where(label >= 0, value, float("nan")), row < batch)


def mart_bce(logits, y, grad):
    """(loss, gradient) of logits [B, C >= 2], fp32, bf16 or fp16; see `rows.launch`."""
    return launch(mart_bce_kernel, logits, grad, y.contiguous())
