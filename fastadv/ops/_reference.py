"""Helpers of the reference implementations. No native or Triton path uses them, so that a mistake
here shows as a difference between the two."""

import math

import torch


def per_sample(values, like):
    """[B] reshaped to [B, 1, ...] so that it broadcasts over `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def flat(v):
    """[B, ...] as [B, D]."""
    return v.reshape(v.shape[0], math.prod(v.shape[1:]))


def at_least_fp32(tensor):
    """Halves as float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def l2_norm(v):
    """[B]: norms in fp64, because the squares of a vanishing gradient underflow in fp32."""
    return flat(v.double()).norm(dim=1)


def direction(grad, norm):
    """The sign of grad, (g > 0) - (g < 0), or under l2 g / ||g|| per sample; 0 where g is 0."""
    if norm == "linf":
        return (grad > 0).to(grad.dtype) - (grad < 0).to(grad.dtype)
    length = per_sample(l2_norm(grad), grad)
    return torch.where(length > 0, grad.double() / length, 0.0).to(grad.dtype)


def project(x_adv, x, eps, norm, lo, hi):
    """x_adv into the ball around x, then into the box."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(lo, hi)
    delta = x_adv - x
    length = per_sample(l2_norm(delta), x)
    return (x + delta * torch.where(length > eps, eps / length, 1.0).to(x.dtype)).clamp(lo, hi)


def valid_label(y, logits):
    """(whether y [B] is in [0, C), y as [B, 1] with 0 where it is not)."""
    valid = (y >= 0) & (y < logits.shape[1])
    return valid, torch.where(valid, y, 0)[:, None]
