"""The L2 attack of Carlini & Wagner (2017, arXiv 1608.04644, section V.A)."""

from dataclasses import dataclass, field

import torch

from ..ops._reference import per_sample
from . import checks
from .minimal import MinimalNorm, distance, margin, nearer, nothing

INSIDE = 1 - 1e-6  # how far towards the walls of the box the search begins
BETAS = 0.9, 0.999  # of Adam


@dataclass
class CW(MinimalNorm):
    """Looks for the adversarial point nearest to x: Adam minimises

        ||x_adv - x||^2 + c max(z_y - max_{k != y} z_k, 0),    x_adv = (tanh(w) + 1) / 2,

    over w for the logits z of x_adv (f_6 with kappa 0, in the box [0, 1]; others are mapped to it),
    and a binary search finds the c of each sample for which x_adv is just adversarial.

    steps: the most of each search over w. searches: the number of these, each with another c.
    step_size: Adam's. constant: the first c, which is multiplied by 10 until an adversarial point
    is found. norm: "l2", the only one. lo, hi: the box of valid images.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, iterate) pairs had a
    gradient with NaN or infinity in it; these elements do not move.
    Raises ValueError on values that make no sense, TypeError on values of the wrong kind.

    The defaults are those of the authors' code but for its 10,000 steps, which it cuts short for
    the whole batch when the sum of the objectives no longer falls. Here all are taken: what is
    found for a sample does not depend on its batch, and elements at the walls of the box, where
    the slope of tanh is 1e-6, need hundreds of steps until they move.
    """

    steps: int = 1000
    searches: int = 9
    step_size: float = 0.01
    constant: float = 1e-3
    norm: str = "l2"
    lo: float = 0.0
    hi: float = 1.0
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        self.searches = checks.whole("searches", self.searches, 1)
        for name in ("step_size", "constant"):
            setattr(self, name, checks.positive(name, getattr(self, name)))

    def _search(self, model, x, y):
        found = nothing(x)
        low, high = torch.zeros_like(found[1]), found[1]
        c = torch.full_like(low, self.constant)
        for _ in range(self.searches):
            x_adv, length = self._minimise(model, x, y, c)
            broken = length.isfinite()
            found = nearer(found, x_adv, broken, length)
            low, high = torch.where(broken, low, c), torch.where(broken, c, high)
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        return found[0]

    def _minimise(self, model, x, y, c):
        """(nearest adversarial iterate, its distance [B]) of one search, infinity for none."""
        found, inner, room = nothing(x), margin(model), self.hi - self.lo
        w = ((2 * (x - self.lo) / room - 1) * INSIDE).atanh()
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        for done in range(1, self.steps + 1):
            t = w.tanh()
            x_adv = (self.lo + room / 2 * (t + 1)).clamp(self.lo, self.hi)
            grad, ahead, wrong = self._gradient(inner, x_adv, y)
            found = nearer(found, x_adv, wrong, distance(x_adv - x, "l2"))
            weight = per_sample(torch.where(ahead < 0, c, 0.0), x).to(x.dtype)
            grad = 2 / room**2 * (x_adv - x) - weight * grad  # of the objective to x_adv
            grad = grad * (room / 2) * (1 - t * t)  # and to w
            mean, square = mean.lerp(grad, 1 - BETAS[0]), square.lerp(grad * grad, 1 - BETAS[1])
            scale = (square / (1 - BETAS[1] ** done)).sqrt() + 1e-8
            w = w - self.step_size / (1 - BETAS[0] ** done) * mean / scale
        return found
