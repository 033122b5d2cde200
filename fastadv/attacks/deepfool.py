"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599)."""

from dataclasses import dataclass, field

import torch

from ..engine.query import ask
from ..ops._reference import direction, per_sample
from . import checks
from .fmn import DUAL
from .iterates import gradient_to, likeliest_others, where
from .minimal import MinimalNorm, distance

OVERSHOOT = 0.02  # how much longer than to the hyperplane a step is, as a share of it
BEYOND = 1e-4  # how far behind the boundary the hyperplane is, in units of hi - lo
BLOCK = 3  # steps between two looks at which samples are adversarial


@dataclass
class DeepFool(MinimalNorm):
    """Looks for an adversarial point near x: each step goes to the nearest of the hyperplanes on
    which the linearised model is undecided between the label and another class, and ends at the
    first adversarial iterate (algorithm 2, and section 3.3 for linf).

    steps: the most that a sample takes. target_classes: each step looks at the (at most C - 1)
    likeliest other classes at its iterate, for each of which it takes a gradient. norm: "linf" or
    "l2". lo, hi: the box of valid images.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, iterate, class)
    triples had a gradient with NaN or infinity in it; these elements do not move.
    Raises ValueError on values that make no sense, TypeError on values of the wrong kind.

    The defaults are those of the authors' code, and so are the steps' overshoot of 2 % and of 1e-4.
    Differences from it: iterates are clipped to the box, so that a step may end short of its
    hyperplane; the classes are chosen anew at each iterate.
    """

    steps: int = 50
    target_classes: int = 9
    norm: str = "linf"
    lo: float = 0.0
    hi: float = 1.0
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)
    NORMS = ("linf", "l2")

    def __post_init__(self):
        super().__post_init__()
        self.target_classes = checks.whole("target_classes", self.target_classes, 1)

    def _search(self, model, x, y):
        x_adv, wrong = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        for first in range(0, self.steps, BLOCK):
            rows = (~wrong).nonzero()[:, 0]  # the one host sync of a block
            if not len(rows):
                break
            now = x_adv[rows], wrong[rows]
            for _ in range(min(BLOCK, self.steps - first)):
                new = self._step(model, now[0], y[rows])
                new = new, ask(model, new).argmax(1) != y[rows]
                now = where(now[1], now, new)
            x_adv[rows], wrong[rows] = now
        return where(wrong, (x_adv,), (x,))[0]

    def _step(self, model, x_adv, y):
        """The next iterate: behind the nearest hyperplane."""
        leaf, nearest = x_adv.detach().requires_grad_(), None
        with torch.enable_grad():
            logits = ask(model, leaf)
        targets = likeliest_others(logits.detach(), y, self.target_classes)
        for target in targets.unbind(1):
            with torch.enable_grad():
                of_target, of_label = (logits.gather(1, c[:, None])[:, 0] for c in (target, y))
                difference = of_target - of_label
                grad = gradient_to(leaf, difference, again=True)
            grad = self._finite(grad)
            away = difference.detach().abs() / distance(grad, DUAL[self.norm])  # NaN: 0 / 0
            new = grad, torch.where(away.isnan(), torch.inf, away)
            nearest = new if nearest is None else where(new[1] < nearest[1], new, nearest)
        grad, away = nearest
        length = (1 + OVERSHOOT) * (away + BEYOND * (self.hi - self.lo))
        length = torch.where(length.isfinite(), length, 0.0)
        step = per_sample(length, x_adv).to(x_adv.dtype) * direction(grad, self.norm)
        return (x_adv + step).clamp(self.lo, self.hi)
