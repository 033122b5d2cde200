"""dlr in Triton: the difference of logits ratio, with its gradient.

    n = z_y - max_{c != y} z_c,  d = z_pi1 - z_pi3 + 1e-12,  loss = -n / d
    grad: -1 / d at y, 1 / d at the strongest other class, n / d^2 at pi1, -n / d^2 at pi3, summed
    where these coincide; else 0

pi: the order of a row's logits, of equals the first. n, d and the slopes are fp64.
"""

import triton
import triton.language as tl

from .rows import LEAST, labels_of, launch, rank, ranked, read, rows_of, tile


@triton.jit
def _leader(a, b, c):
    """The highest rank of each row, and the lanes' three without it."""
    best = tl.max(a, 1)
    taken = a == best[:, None]
    return best, tl.where(taken, b, a), tl.where(taken, c, b), c


@triton.jit
def _slope(at, y, other, first, third, n, d):
    """The gradient at the class `at` of each row."""
    zero = tl.zeros_like(n)
    direct = tl.where(at == other, 1 / d, zero) - tl.where(at == y, 1 / d, zero)
    ratio = tl.where(at == first, n / d / d, zero) - tl.where(at == third, n / d / d, zero)
    return (direct + ratio).to(tl.float32)[:, None]


@triton.jit
def dlr_kernel(
    loss, grad, logits, y, batch, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows. loss: fp32 [batch]; logits: [batch, C >= 3], any float; grad: the same or None; y:
    int64 [batch]. A label outside [0, C): NaN, gradient 0."""
    row = rows_of(ROWS)
    label, own = labels_of(y, logits, row, batch, C)
    a = tl.full([ROWS, BLOCK], LEAST, tl.int64)  # each lane's three highest ranks
    b, c = a, a
    for start in tl.range(0, C, BLOCK):
        column, at, inside = tile(row, start, batch, C, BLOCK)
        new = rank(read(logits, at, inside), column)
        c = tl.maximum(c, tl.minimum(b, new))
        b = tl.maximum(b, tl.minimum(a, new))
        a = tl.maximum(a, new)
    pi1, a, b, c = _leader(a, b, c)
    pi2, a, b, c = _leader(a, b, c)
    pi3, a, b, c = _leader(a, b, c)
    top, first = ranked(pi1)
    bottom, third = ranked(pi3)
    strongest, other = ranked(tl.where(first == label, pi2, pi1))
    n = own.to(tl.float64) - strongest.to(tl.float64)
    d = top.to(tl.float64) - bottom.to(tl.float64) + 1e-12
    if grad is not None:
        at_y = _slope(label, label, other, first, third, n, d)
        at_other = _slope(other, label, other, first, third, n, d)
        at_first = _slope(first, label, other, first, third, n, d)
        at_third = _slope(third, label, other, first, third, n, d)
        for start in tl.range(0, C, BLOCK):
            column, at, inside = tile(row, start, batch, C, BLOCK)
            slope = tl.where(column == third[:, None], at_third, 0.0)
            slope = tl.where(column == first[:, None], at_first, slope)
            slope = tl.where(column == other[:, None], at_other, slope)
            slope = tl.where(column == label[:, None], at_y, slope)
            tl.store(grad + at, tl.where((label >= 0)[:, None], slope, 0.0), inside)
    value = tl.where(label >= 0, (-n / d).to(tl.float32), float("nan"))
    tl.store(loss + row, value, row < batch)


def dlr(logits, y, grad):
    """(loss, gradient) of logits [B, C >= 3], fp32, bf16 or fp16; see `rows.launch`."""
    return launch(dlr_kernel, logits, grad, y.contiguous())
