"""softmax_entropy in Triton: the entropy of softmax(logits / T), with its gradient.

    a = (z - max z) / T,  q = exp(a) / Z,  Z = sum_c exp(a_c)
    offset 0:  H = log Z - sum_c q_c a_c,  g = a
    offset o:  H = -sum_c q_c log(q_c + o),  g = log(q + o) - o / (q + o)
    grad = -q (g - sum_c q_c g_c) / T

A class with q_c = 0 counts 0. Z is 1 and a rest, kept apart: the entropy of a confident row is as
small as that.
"""

import triton
import triton.language as tl

from .rows import exp, launch, product, read, rows_of, tile, top_of


@triton.jit
def _terms(logits, at, inside, top, temperature, total, offset, log_top):
    """(q, a or log(q + o), g) of one tile; q is 0 past the end of the rows."""
    z = read(logits, at, inside)
    a = (z - top) / temperature
    q = exp(a) / total
    log_q, slope = a, a
    if offset is not None:
        log_q = tl.where(z == top, log_top, tl.log(q + offset))
        slope = log_q - offset / (q + offset)
    return q, log_q, slope


@triton.jit
def softmax_entropy_kernel(
    loss,
    grad,
    logits,
    temperature,
    offset,
    batch,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows. loss: fp32 [batch]; logits: [batch, C], any float; grad: the same or None; offset:
    fp32 or None."""
    temperature = tl.cast(temperature, tl.float32)
    row = rows_of(ROWS)
    top = top_of(logits, row, batch, C, ROWS, BLOCK)[:, None]
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    largest, entropy, mean = rest, rest, rest  # largest: how many classes have the largest logit
    for first in tl.range(0, C, BLOCK):
        _, at, inside = tile(row, first, batch, C, BLOCK)
        z = read(logits, at, inside)
        rest += tl.where(z == top, 0.0, exp((z - top) / temperature))
        largest += tl.where(z == top, 1.0, 0.0)
    total = tl.sum(rest, 1).to(tl.float64) + tl.sum(largest, 1)
    log_top = tl.log(total)
    if offset is not None:
        offset = tl.cast(offset, tl.float32)
        log_top = tl.log(1 / total + offset)
    log_top, total = log_top.to(tl.float32)[:, None], total.to(tl.float32)[:, None]
    for first in tl.range(0, C, BLOCK):
        _, at, inside = tile(row, first, batch, C, BLOCK)
        q, log_q, slope = _terms(logits, at, inside, top, temperature, total, offset, log_top)
        entropy -= product(q, log_q)
        mean += product(q, slope)
    entropy, mean = tl.sum(entropy, 1)[:, None], tl.sum(mean, 1)[:, None]
    if offset is None:
        entropy += log_top
    if grad is not None:
        for first in tl.range(0, C, BLOCK):
            _, at, inside = tile(row, first, batch, C, BLOCK)
            q, _, slope = _terms(logits, at, inside, top, temperature, total, offset, log_top)
            tl.store(grad + at, product(q, mean - slope) / temperature, inside)
    tl.store(loss + row[:, None], entropy, row[:, None] < batch)


def softmax_entropy(logits, temperature, offset, grad):
    """(loss, gradient) of logits [B, C], fp32, bf16 or fp16; see `rows.launch`."""
    return launch(softmax_entropy_kernel, logits, grad, temperature, offset or None)
