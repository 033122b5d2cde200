"""The L2 attack of Carlini & Wagner (2017, arXiv 1608.04644, section V.A)."""

import math
from dataclasses import dataclass, field

import torch

from ..ops._reference import per_sample
from . import checks
from .minimal import MinimalNorm, distance, margin, nearer, nothing

INSIDE = 1 - 1e-6  # how far towards the walls of the box the search begins
BETAS = 0.9, 0.999  # of Adam
PARTS = 10  # of a search, after each of which samples that no longer improve are left alone
SHORTEST = 10  # steps of such a part, where there are as many
IMPROVED = 0.9999  # what a part leaves of an objective that still improves, at most


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

    The defaults are those of the authors' code but for its 10,000 steps. Differences from it: a
    sample whose objective falls by less than 0.01 % over a tenth of the steps ends its search,
    where the authors' code ends that of the whole batch when the sum does.
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
        unit = (x - self.lo) / (self.hi - self.lo)
        w = ((2 * unit - 1) * INSIDE).atanh()
        state = [w, torch.zeros_like(x), torch.zeros_like(x), *(v.clone() for v in nothing(x))]
        improving = torch.ones_like(y, dtype=torch.bool)
        length = max(math.ceil(self.steps / PARTS), SHORTEST)
        for first in range(0, self.steps, length):
            rows = improving.nonzero()[:, 0]  # the one host sync of a part
            if not len(rows):
                break
            steps = range(first, min(first + length, self.steps))
            given = x[rows], y[rows], c[rows], *(v[rows] for v in state)
            *part, improving[rows] = self._part(model, *given, steps)
            for whole, new in zip(state, part, strict=True):
                whole[rows] = new
        return state[3:]

    def _part(self, model, x, y, c, w, mean, square, nearest, least, steps):
        """The state after some steps of Adam, and whether the objective has fallen over them."""
        room, inner, objectives = self.hi - self.lo, margin(model), []
        for step in steps:
            t = w.tanh()
            x_adv = (self.lo + room / 2 * (t + 1)).clamp(self.lo, self.hi)
            grad, ahead, wrong = self._gradient(inner, x_adv, y)
            length = distance(x_adv - x, "l2")
            nearest, least = nearer((nearest, least), x_adv, wrong, length)
            objectives.append((length / room) ** 2 + c * (-ahead).clamp(min=0))
            weight = per_sample(torch.where(ahead < 0, c, 0.0), x).to(x.dtype)
            to_image = 2 / room**2 * (x_adv - x) - weight * grad
            grad = to_image * (room / 2) * (1 - t * t)
            mean, square = mean.lerp(grad, 1 - BETAS[0]), square.lerp(grad * grad, 1 - BETAS[1])
            done = step + 1
            corrected = (square / (1 - BETAS[1] ** done)).sqrt() + 1e-8
            w = w - self.step_size / (1 - BETAS[0] ** done) * mean / corrected
        improving = objectives[-1] <= IMPROVED * objectives[0]
        return w, mean, square, nearest, least, improving
