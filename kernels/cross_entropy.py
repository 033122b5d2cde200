"""cross_entropy in Triton: of softmax(logits) with labels or probabilities, with its gradient.

    q = (1 - a) t + a / C,  Q = sum_c q_c,  Z = sum_c exp(z_c - max z)
    loss = sum_c q_c (max z - z_c) + Q log Z,  grad = Q exp(z - max z) / Z - q

t: the target, or the one-hot of its labels; a: label_smoothing. A class with q_c = 0 counts 0.
"""

import torch
import triton
import triton.language as tl

from .rows import exp, labels_of, launch, product, read, reciprocal, rows_of, tile, top_of


@triton.jit
def _weights(target, label, column, at, inside, keep, even):
    """q of one tile; 0 past the end of the rows."""
    if target is None:
        t = tl.where(column == label[:, None], 1.0, 0.0)
    else:
        t = tl.load(target + at, inside, 0.0)
    return tl.where(inside, t * keep + even, 0.0)


@triton.jit
def cross_entropy_kernel(
    loss,
    grad,
    logits,
    y,
    target,
    factor,
    keep,
    even,
    ignored,
    batch,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows. loss: fp32 [batch]; logits: [batch, C], any float; grad: the same or None; y:
    int64 [batch], or None and target: fp32 [batch, C]; factor: of loss and gradient, fp32 [], or
    None; keep, even: 1 - a and a / C. A label that is `ignored`: 0, gradient 0; any other outside
    [0, C): NaN, gradient 0.

    At the label the gradient comes from the sum over the other classes: p - 1 would cancel.
    """
    keep, even = tl.cast(keep, tl.float32), tl.cast(even, tl.float32)
    row = rows_of(ROWS)
    share = 1.0 if factor is None else tl.load(factor)
    top = top_of(logits, row, batch, C, ROWS, BLOCK)
    label = tl.full([ROWS], -1, tl.int32)
    own = tl.zeros([ROWS], tl.float32)
    skipped = tl.zeros([ROWS], tl.int1)
    if y is not None:
        label, own = labels_of(y, logits, row, batch, C)
        own = exp(own - top)
        skipped = tl.load(y + row, row < batch, -1) == ignored
        label = tl.where(skipped, -1, label)
    others = tl.zeros([ROWS, BLOCK], tl.float32)
    mass, far = others, others
    for first in tl.range(0, C, BLOCK):
        column, at, inside = tile(row, first, batch, C, BLOCK)
        gap = read(logits, at, inside) - top[:, None]
        others += tl.where(column == label[:, None], 0.0, exp(gap))
        q = _weights(target, label, column, at, inside, keep, even)
        mass += q
        far -= product(q, gap)
    others = tl.sum(others, 1)
    total = others + own
    mass = 1.0 if target is None else tl.sum(mass, 1)
    if grad is not None:
        scale = reciprocal(total)
        at_label = (1.0 - keep - even - others * scale)[:, None]
        for first in tl.range(0, C, BLOCK):
            column, at, inside = tile(row, first, batch, C, BLOCK)
            gap = read(logits, at, inside) - top[:, None]
            q = _weights(target, label, column, at, inside, keep, even)
            slope = exp(gap) * (mass * scale)[:, None] - q
            if y is not None:
                slope = tl.where(column == label[:, None], at_label, slope)
                slope = tl.where((label >= 0)[:, None], slope, 0.0)
            tl.store(grad + at, slope * share, inside)
    log_total = tl.log(others.to(tl.float64) + own).to(tl.float32)  # of 1 + little, to its last bit
    value = tl.sum(far, 1) + mass * log_total
    if y is not None:
        value = tl.where(label >= 0, value, tl.where(skipped, 0.0, float("nan")))
    tl.store(loss + row, value * share, row < batch)


def cross_entropy(logits, target, label_smoothing, ignore_index, reduction, grad):
    """(loss, gradient) of logits [B, C], fp32, bf16 or fp16; see `rows.launch`. target: int64 [B],
    or fp32 [B, C]. A mean's factor is computed on the device before, and the sum after."""
    target = target.contiguous()
    labels = (target, None) if target.dtype == torch.int64 else (None, target)
    factor = None
    if reduction == "mean":
        share = 1 / max(len(target), 1)
        factor = torch.full((), share, dtype=torch.float32, device=target.device)
        if labels[0] is not None:
            factor = 1 / (target != ignore_index).sum(dtype=torch.float32).clamp(min=1)
    weights = 1 - label_smoothing, label_smoothing / logits.shape[1]
    args = *labels, factor, *weights, ignore_index
    loss, gradient = launch(cross_entropy_kernel, logits, grad, *args)
    return loss if reduction == "none" else loss.sum(), gradient
