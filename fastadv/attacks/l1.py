"""What attacks need in the l1 norm, the sum of an image's absolute changes: the projection onto
ball and box (Croce & Hein 2021, arXiv 2103.01208, section 3), starts, and sparse steps. Plain torch
without host syncs."""

import math

import torch

from .. import ops
from ..ops._reference import flat, per_sample

TINY = 2.0**-24  # below the steps of the random numbers' grid, 2^-23


def project(x_adv, x, eps, lo, hi):
    """The point nearest to x_adv (in l2) among those in the l1 ball around x and in the box, exact
    up to rounding: computed in float64 and rounded towards x, to the dtype of x_adv.

    x_adv: [B, ...], any values; x: the same shape, in [lo, hi]; eps: a number or [B].
    The point is x + sign(d) min(max(|d| - t, 0), room), d = x_adv - x, room from x to the wall on
    that side, with the least t >= 0 for which it is in the ball. Its length is a decreasing,
    piecewise linear function of t, whose slope grows by 1 below each |d| and shrinks by 1 below
    each |d| - room. So these are sorted, and t is on the first piece that reaches eps.
    """
    d = flat(x_adv).double() - flat(x)
    size = d.abs()
    room = torch.where(d > 0, hi - flat(x).double(), flat(x).double() - lo).clamp(min=0)
    ends = torch.cat([size, size - room], 1).clamp(min=0)
    ends, order = ends.sort(dim=1, descending=True, stable=True)
    slope = torch.where(order < size.shape[1], 1.0, -1.0).double().cumsum(1)[:, :-1]
    length = (slope * (ends[:, :-1] - ends[:, 1:])).cumsum(1)  # at each end but the first
    eps = eps.double()[:, None] if isinstance(eps, torch.Tensor) else eps
    piece = (length < eps).sum(1, keepdim=True).clamp(max=length.shape[1] - 1)
    slope, length_there = slope.gather(1, piece).clamp(min=1), length.gather(1, piece)
    t = ends.gather(1, piece + 1) + (length_there - eps) / slope
    t = torch.where(length[:, -1:] > eps, t, 0.0)
    d = d.sign() * torch.minimum((size - t).clamp(min=0), room)
    point = (flat(x) + d).to(x_adv.dtype)
    # Of many elements, each rounded to the nearest, the sum might leave the ball.
    beyond = (point.double() - flat(x)).abs() > d.abs()
    point = torch.where(beyond, point.nextafter(flat(x).to(point)), point)
    return point.clamp(lo, hi).view(x_adv.shape)


def random_start(x, eps, *, seed=None, index=None, restart=0, lo=-math.inf, hi=math.inf):
    """x plus noise that is uniform in the l1 ball, clipped to the box.

    eps: a number or [B]; seed, index, restart: as of `ops.random_start`. The noise is eps s E /
    (sum E + E'), with signs s and exponential E and E' (Barthe et al. 2005, Annals of Probability
    33(2), theorem 1).
    """
    zeros = torch.zeros(len(x), flat(x).shape[1] + 1, device=x.device)
    u = ops.random_start(zeros, 1.0, seed=seed, index=index, restart=restart).double()
    exponential = -u.abs().clamp(min=TINY).log()
    noise = u.sign() * exponential / exponential.sum(1, keepdim=True)
    noise = noise[:, :-1].view(x.shape).to(x.dtype)
    scale = per_sample(eps, x) if isinstance(eps, torch.Tensor) else eps
    return (x + scale * noise).clamp(lo, hi)


def direction(grad, kept):
    """The signs of a gradient's `kept` largest elements, 0 for the others, over their number: a
    direction [B, ...] of l1 length 1, or 0 for a gradient of zeros. grad: [B, ...], finite; kept:
    int64 [B]. Elements that are equally large are kept together."""
    g = flat(grad)
    order = (g.shape[1] - kept[:, None]).clamp(0, g.shape[1] - 1)
    least = g.abs().sort(dim=1).values.gather(1, order)
    sign = torch.where(g.abs() >= least, g.sign(), 0.0)
    return (sign / sign.abs().sum(1, keepdim=True).clamp(min=1)).view(grad.shape)


def pgd_step_(x_adv, grad, x, eps, step_size, lo, hi):
    """One step of PGD, in place: step_size along the 1 % largest elements of the gradient, one at
    the least (SLIDE, Tramer & Boneh 2019, arXiv 1904.13000), projected into ball and box. Elements
    of the gradient that are NaN do not move. Returns x_adv."""
    kept = torch.full((len(x),), max(flat(grad).shape[1] // 100, 1), device=x.device)
    step = step_size * direction(grad.nan_to_num(nan=0.0), kept)
    return x_adv.copy_(project(x_adv + step, x, eps, lo, hi))
