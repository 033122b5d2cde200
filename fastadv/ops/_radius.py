"""The radius of the perturbation ball, as every op that takes `eps` reads it."""

import math

import torch


def radius(eps, x, norm, lo, hi):
    """(eps_per_sample, eps) of an op's schema from a float or a tensor of one value per sample."""
    if isinstance(eps, torch.Tensor):
        if eps.dim() > 0:
            if eps.numel() != x.shape[0] or eps.shape[0] != x.shape[0]:
                raise ValueError(
                    f"eps has shape {tuple(eps.shape)}, must be a float or one value per sample: "
                    f"[{x.shape[0]}] or [{x.shape[0]}, 1, ...]"
                )
            if eps.device.type == "cpu":  # elsewhere a look at the values would wait for the device
                for value in eps.aminmax() if eps.numel() else ():
                    check_radius(value.item(), norm, lo, hi)
            return eps.reshape(-1).to(x.dtype), 0.0
        eps = eps.item()
    check_radius(eps, norm, lo, hi)
    return None, eps


def check_radius(eps, norm, lo, hi):
    """Raises on one radius that makes no sense, or is in the wrong unit."""
    if isinstance(eps, str):
        raise TypeError(f"eps is {eps!r}, must be a number or a tensor")
    limit = hi - lo if math.isfinite(hi - lo) else 1.0  # images live in [0, 1] unless the box says
    limit = limit if norm == "linf" else math.inf
    if not 0 <= eps <= limit:
        hint = f" (did you mean {eps:g}/255?)" if eps > limit else ""
        raise ValueError(f"eps is {eps:g}, must be in [0, {limit}]{hint}")
