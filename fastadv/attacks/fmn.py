"""FMN, the fast minimum-norm attack (Pintor et al. 2021, arXiv 2102.12827)."""

import math
from dataclasses import dataclass, field

import torch

from ..ops._reference import direction, per_sample
from . import checks, l1
from .minimal import MinimalNorm, annealed, distance, margin, nearer, nothing

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
GAMMA = 0.05, 0.001  # the share by which the radius changes, at first and at last


@dataclass
class FMN(MinimalNorm):
    """Looks for the adversarial point nearest to x (algorithm 1). Each step goes along the gradient
    of the margin, then into a ball around x, whose radius shrinks while the iterate is adversarial
    and grows while it is not. Until an adversarial point is found, it grows at least to the
    boundary of the linearised model.

    steps: gradients taken. step_size: length of the first step in the l2 norm, in units of
    hi - lo, whatever `norm` is; it falls to a hundredth along a cosine. norm: "linf", "l2", "l1" or
    "l0", the number of elements (not pixels) that change. lo, hi: the box of valid images.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, iterate) pairs had a
    gradient with NaN or infinity in it; these elements do not move.
    Raises ValueError on values that make no sense, TypeError on values of the wrong kind.

    The defaults are those of Foolbox; the authors' code, otherwise the same, takes 10 steps.
    Differences from both: gradients that lead out of the box at its walls count as 0, and before an
    adversarial point is found the radius never shrinks (else the walls take from many samples what
    a step gains, so that they end without an adversarial point); the last iterate is looked at too;
    under l2 a point inside the ball stays where it is; under l0 exactly as many elements stay as
    the radius says, also where several are equal.
    """

    steps: int = 100
    step_size: float = 1.0
    norm: str = "linf"
    lo: float = 0.0
    hi: float = 1.0
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)
    NORMS = ("linf", "l2", "l1", "l0")

    def __post_init__(self):
        super().__post_init__()
        self.step_size = checks.positive("step_size", self.step_size)

    def _search(self, model, x, y):
        inner, found, x_adv = margin(model), nothing(x), x
        eps = torch.full_like(found[1], 1.0 if self.norm == "l0" else 0.0)
        farthest = distance(torch.maximum(x - self.lo, self.hi - x), self.norm)
        longest = self.step_size * (self.hi - self.lo)
        for step in range(self.steps):
            grad, loss, wrong = self._gradient(inner, x_adv, y)
            length = distance(x_adv - x, self.norm)
            found = nearer(found, x_adv, wrong, length)
            room = torch.where(grad > 0, self.hi - x_adv, x_adv - self.lo)
            grad = torch.where(room > 0, grad, 0.0)
            gamma = annealed(step, self.steps, *GAMMA)
            eps = self._radius(eps, gamma, wrong, found[1], length, loss, grad)
            eps = torch.fmin(eps, farthest)  # NaN, of a loss or a gradient, is the farthest too
            alpha = annealed(step, self.steps, longest, longest / 100)
            delta = x_adv - x + alpha * direction(grad, "l2")
            x_adv = (x + project(delta, eps, self.norm)).clamp(self.lo, self.hi)
        return nearer(found, x_adv, inner(x_adv, y)[1], distance(x_adv - x, self.norm))[0]

    def _radius(self, eps, gamma, wrong, least, length, loss, grad):
        """The next radius [B]. least: the distance of the nearest adversarial point so far,
        infinity if there is none; length: that of the iterate; loss: its margin."""
        if self.norm == "l0":
            shrunk = torch.minimum(eps - 1, (eps * (1 - gamma)).floor()).clamp(min=1)
            grown = torch.maximum(eps + 1, (eps * (1 + gamma)).floor())
        else:
            shrunk, grown = eps * (1 - gamma), eps * (1 + gamma)
            to_boundary = length + loss.abs() / distance(grad, DUAL[self.norm])
            grown = torch.where(least.isfinite(), grown, torch.maximum(grown, to_boundary))
        return torch.where(wrong, torch.minimum(shrunk, least), grown)


def project(delta, eps, norm):
    """The points nearest to delta [B, ...] in balls of the radii eps [B], float64, around 0.

    "l0" keeps the eps largest elements, of equal ones the first.
    """
    radius = per_sample(eps, delta)
    if norm == "linf":
        radius = radius.to(delta.dtype)
        return delta.clamp(-radius, radius)
    if norm == "l2":
        return delta * (radius / per_sample(distance(delta, "l2"), delta)).clamp(max=1).to(delta)
    if norm == "l1":
        return l1.project(delta, torch.zeros_like(delta), eps, -math.inf, math.inf)
    order = delta.abs().flatten(1).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(1, order.shape[1] + 1, device=delta.device)
    kept = torch.zeros_like(order, dtype=delta.dtype)
    kept.scatter_(1, order, (ranks <= eps[:, None]).to(delta))
    return delta * kept.view_as(delta)
