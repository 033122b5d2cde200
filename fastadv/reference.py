"""Every op in plain torch: its specification, the oracle of its tests, and the fallback.

Each function takes the arguments of the op's schema and computes in the dtype it is given.
"""

import math

import torch


def per_sample(values, like):
    """[B] reshaped to [B, 1, ...] so that it broadcasts over `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def pgd_step(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """linf: clip(clamp(x_adv + step_size sign(g), x - eps, x + eps));
    l2: d = x_adv + step_size g / ||g|| - x, clip(x + d min(1, eps / ||d||)). Shapes [B, ...].

    sign is (g > 0) - (g < 0): 0 at 0 and at NaN. Madry et al. 2018, section 2.1.
    """
    if eps_per_sample is not None:
        eps = per_sample(eps_per_sample, x)
    if norm == "linf":
        sign = (grad > 0).to(x.dtype) - (grad < 0).to(x.dtype)
        moved = x_adv + step_size * sign
        projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    else:
        delta = x_adv + step_size * _direction(grad) - x
        length = per_sample(_l2_norm(delta), x)
        projected = x + delta * torch.where(length > eps, eps / length, 1.0).to(x.dtype)
    return projected.clamp(lo, hi)


def pgd_step_(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """`pgd_step` written into x_adv."""
    x_adv.copy_(pgd_step(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi))


def _l2_norm(v):
    """[B]: norms in fp64, because the squares of a vanishing gradient underflow in fp32."""
    return v.double().reshape(v.shape[0], math.prod(v.shape[1:])).norm(dim=1)


def _direction(grad):
    """g / ||g|| per sample; 0 where g is 0."""
    norm = per_sample(_l2_norm(grad), grad)
    return torch.where(norm > 0, grad.double() / norm, 0.0).to(grad.dtype)
