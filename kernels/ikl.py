"""ikl in Triton: the improved KL divergence of logits and its gradients in one pass.

    p = softmax(a), q = softmax(n), d = n - a, S = sum_c w_c, m = sum_c w_c d_c / S
    loss_i = alpha / B (log Zp - sum_c q_c a_c) + share / 2 sum_c w_c (d_c - m)^2
    share = beta S / sum_i S_i^2,  d/dn = g = share w (d - m),  d/da = alpha / B (p - q) - g

A class with q_c = 0 or w_c = 0 counts 0 in its term. Computed in fp32, what is one number per row
in fp64; m twice, as a centre and as the mean of what is left over. No FMA contraction: p - q would
not be 0 where p is q.
"""

import torch
import triton
import triton.language as tl

from .rows import ALL, LOG2_E, LOWEST, online, product, read, reciprocal, rows_of, tile, tiling


@triton.jit
def _weights(weight, at, inside):
    """One tile of weights, 0 past the end of the rows, NaN where one is negative or infinite; all 1
    where weight is None."""
    if weight is None:
        w = tl.where(inside, 1.0, 0.0)
    else:
        w = tl.load(weight + at, inside, 0.0)
        w = tl.where((w >= 0) & (w < float("inf")), w, float("nan"))
    return w


@triton.jit
def ikl_kernel(
    adv,
    clean,
    weight,
    total,
    loss,
    grad_adv,
    grad_clean,
    batch,
    alpha,
    beta,
    ADV_STRIDE: tl.constexpr,
    CLEAN_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows. adv, clean: [batch, C], any float, and weight: fp32 [batch, C] or None, strides of
    rows in elements; total: fp64 [], the sum of S_i^2; loss: fp64 [batch]; grad_*: [batch, C],
    dense, or None. alpha: of the loss, / batch; beta: of the loss, or a row's share without weight.

    C and the strides are constants, so that 128-bit accesses are possible at C = 1000.
    """
    row = rows_of(ROWS)
    a_top = tl.full([ROWS], LOWEST, tl.float32)
    n_top = a_top
    p_sum = tl.zeros([ROWS], tl.float32)
    q_sum = p_sum
    masses = tl.zeros([ROWS, BLOCK], tl.float32)
    terms = masses
    for first in tl.range(0, C, BLOCK):
        column, _, inside = tile(row, first, batch, C, BLOCK)
        a = read(adv, row[:, None] * ADV_STRIDE + column, inside)
        n = read(clean, row[:, None] * CLEAN_STRIDE + column, inside)
        w = _weights(weight, row[:, None] * WEIGHT_STRIDE + column, inside)
        a_top, p_sum = online(a, a_top, p_sum, LOG2_E)
        n_top, q_sum = online(n, n_top, q_sum, LOG2_E)
        masses += w
        terms += product(w, n - a)
    mass = tl.sum(masses, 1)
    above_0 = tl.where(mass == 0, 1.0, mass)
    centre = tl.div_rn(tl.sum(terms, 1), above_0)

    ahead = tl.zeros([ROWS, BLOCK], tl.float32)
    rests = ahead
    squares = ahead
    for first in tl.range(0, C, BLOCK):
        column, _, inside = tile(row, first, batch, C, BLOCK)
        a = read(adv, row[:, None] * ADV_STRIDE + column, inside)
        n = read(clean, row[:, None] * CLEAN_STRIDE + column, inside)
        w = _weights(weight, row[:, None] * WEIGHT_STRIDE + column, inside)
        ahead += product(tl.exp2((n - n_top[:, None]) * LOG2_E), a - a_top[:, None])
        apart = tl.where(w == 0, 0.0, n - a - centre[:, None])
        rests += w * apart
        squares += w * apart * apart
    rest = tl.div_rn(tl.sum(rests, 1), above_0)  # so that d - m is 0 in rows of one class
    spread = tl.sum(squares, 1) - rest * tl.sum(rests, 1)
    spread = tl.maximum(spread, 0.0, propagate_nan=ALL)  # whose rounding may be below 0

    share = tl.full([ROWS], beta, tl.float64)
    if weight is not None:
        every = tl.load(total)
        share *= mass.to(tl.float64) / tl.where(every == 0, 1.0, every)
    if grad_adv is not None or grad_clean is not None:
        slope_of = share.to(tl.float32)[:, None]
        p_scale, q_scale = reciprocal(p_sum)[:, None], reciprocal(q_sum)[:, None]
        for first in tl.range(0, C, BLOCK):
            column, at, inside = tile(row, first, batch, C, BLOCK)
            a = read(adv, row[:, None] * ADV_STRIDE + column, inside)
            n = read(clean, row[:, None] * CLEAN_STRIDE + column, inside)
            w = _weights(weight, row[:, None] * WEIGHT_STRIDE + column, inside)
            slope = product(w, n - a - centre[:, None] - rest[:, None]) * slope_of
            if grad_clean is not None:
                tl.store(grad_clean + at, slope, inside)
            if grad_adv is not None:
                p = tl.exp2((a - a_top[:, None]) * LOG2_E) * p_scale
                q = tl.exp2((n - n_top[:, None]) * LOG2_E) * q_scale
                tl.store(grad_adv + at, (p - q) * alpha - slope, inside)
    entropy = tl.log(p_sum.to(tl.float64)) - tl.sum(ahead, 1).to(tl.float64) / q_sum.to(tl.float64)
    tl.store(loss + row, alpha * entropy + share * spread.to(tl.float64) / 2, row < batch)


def ikl(adv, clean, weight, alpha, beta, adv_grad, clean_grad):
    """(loss, grad_adv, grad_clean); a gradient not asked for is an empty tensor [0].

    adv, clean: [B, C] fp32, fp16 or bf16; weight: fp32 [B, C] or None. loss: fp32, 0-dim: row
    losses are summed by torch in a fixed order.
    """
    batch, classes = adv.shape
    adv, clean = (t if t.stride(1) == 1 else t.contiguous() for t in (adv, clean))
    total = None
    if weight is None:
        beta = beta / max(batch * classes, 1)
    else:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        total = weight.sum(1, dtype=torch.float64).square().sum()
    rows = torch.empty(batch, dtype=torch.float64, device=adv.device)
    grads = [
        torch.empty(adv.shape if asked else 0, dtype=adv.dtype, device=adv.device)
        for asked in (adv_grad, clean_grad)
    ]
    config = tiling(classes)
    with torch.cuda.device_of(adv):
        ikl_kernel[(triton.cdiv(batch, config["ROWS"]),)](
            adv,
            clean,
            weight,
            total,
            rows,
            *(g if g.numel() else None for g in grads),
            batch,
            alpha / max(batch, 1),
            beta,
            adv.stride(0),
            clean.stride(0),
            0 if weight is None else weight.stride(0),
            classes,
            **config,
            enable_fp_fusion=False,
        )
    return rows.sum().float(), *grads
