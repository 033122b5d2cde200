"""DDN, decoupled direction and norm (Rony et al. 2019, arXiv 1811.09600)."""

from dataclasses import dataclass, field

import torch

from .. import losses
from ..engine.query import ask
from ..ops._reference import direction, per_sample
from .minimal import MinimalNorm, annealed, distance, nearer, nothing

GAMMA = 0.05  # the share by which the norm changes
STEP = 1.0, 0.01  # length of a step, at first and at last, in units of hi - lo


@dataclass
class DDN(MinimalNorm):
    """Looks for the adversarial point nearest to x (algorithm 1). Each step goes along the gradient
    of the cross-entropy, then to the sphere around x of a norm that is 1 (in units of hi - lo) at
    first, shrinks by 5 % while the iterate is adversarial and grows by 5 % while it is not.

    steps: gradients taken. norm: "l2", the only one. lo, hi: the box of valid images.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, iterate) pairs had a
    gradient with NaN or infinity in it; these elements do not move.
    Raises ValueError on values that make no sense, TypeError on values of the wrong kind.

    The defaults are those of the authors' code. Differences from it: iterates are not rounded to
    256 levels; where the gradient is 0 there is no step, in place of a random one; the last iterate
    is looked at too.
    """

    steps: int = 100
    norm: str = "l2"
    lo: float = 0.0
    hi: float = 1.0
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)

    def _search(self, model, x, y):
        def inner(x_adv, y):
            logits = ask(model, x_adv)
            loss = losses.cross_entropy(logits, y, reduction="none")
            return loss, logits.argmax(1) != y

        found, x_adv, room = nothing(x), x, self.hi - self.lo
        eps = torch.full_like(found[1], room)
        farthest = distance(torch.maximum(x - self.lo, self.hi - x), "l2")
        for step in range(self.steps):
            grad, _, wrong = self._gradient(inner, x_adv, y)
            found = nearer(found, x_adv, wrong, distance(x_adv - x, "l2"))
            alpha = room * annealed(step, self.steps, *STEP)
            delta = x_adv - x + alpha * direction(grad, "l2")
            eps = torch.minimum(torch.where(wrong, 1 - GAMMA, 1 + GAMMA) * eps, farthest)
            delta = direction(delta, "l2") * per_sample(eps, x).to(x.dtype)
            x_adv = (x + delta).clamp(self.lo, self.hi)
        return nearer(found, x_adv, inner(x_adv, y)[1], distance(x_adv - x, "l2"))[0]
