"""What the attacks that look for the nearest adversarial point share: their call, and distances."""

import math

import torch

from .. import losses
from ..engine.query import ask
from . import checks
from .iterates import gradient, where

ORDERS = checks.ORDERS | {"l0": 0}


def distance(delta, norm):
    """[B]: the norm of delta [B, ...] in float64; "l0" is the number of elements that are not 0."""
    return torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1, dtype=torch.float64)


def margin(model):
    """inner(x_adv, y) -> (max_{c != y} z_c - z_y [B], wrong [B] bool) for the logits z of the
    model."""

    def inner(x_adv, y):
        logits = ask(model, x_adv)
        return losses.margin(logits, y), logits.argmax(1) != y

    return inner


def nothing(x):
    """(x, infinity [B]): the nearest adversarial point and its distance before any is found."""
    return x, torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)


def nearer(found, x_adv, wrong, length):
    """`found` (nearest [B, ...], its distance [B]), or where x_adv is wrong and nearer that."""
    return where(wrong & (length < found[1]), (x_adv, length), found)


class MinimalNorm:
    """An attack that looks for the adversarial point nearest to x. Its subclasses are dataclasses
    with the fields norm (one of NORMS), lo, hi, steps and bad_gradients, and have `_search`."""

    NORMS = ("l2",)

    def __post_init__(self):
        checks.one_of(f"norm of {type(self).__name__}", self.norm, self.NORMS)
        checks.check_box(self)
        for name in ("lo", "hi"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, must be finite")
        self.steps = checks.whole("steps", self.steps, 1)

    @torch.inference_mode(False)
    def __call__(self, model, x, y, *, index=None):
        """x_adv for `model`: per sample the nearest misclassified point found, however far, or x
        itself, unchanged, where none was found. A sample that is misclassified at x stays there.

        x: float32 or float64 [B, ...] in [lo, hi]; y: integers [B]. index: int64 [B] dataset ids,
        as other attacks take them; nothing is drawn here, so they change nothing. The model maps x,
        in the dtype of its parameters, to logits [B, C], C >= 2, or to what has them; it runs in
        eval mode, its modes are put back and its parameters' `.grad` stays untouched. x_adv has x's
        dtype. Raises ValueError or TypeError naming the argument.
        """
        y, _ = checks.check_call(self, model, x, y, index)
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=x.device)
        x_adv = x.detach().clone()
        if not x.numel():
            return x_adv
        with checks.under_attack(model, x, y) as logits, torch.no_grad():
            rows = (logits.argmax(1) == y).nonzero()[:, 0]
            if len(rows):
                x_adv[rows] = self._search(model, x_adv[rows], y[rows])
        return x_adv

    def _search(self, model, x, y):
        """x_adv of samples that are classified right at x."""
        raise NotImplementedError

    def _gradient(self, inner, x_adv, y):
        """`iterates.gradient`, in which elements that are not finite are 0 and their samples are
        counted."""
        grad, loss, wrong = gradient(inner, x_adv, y)
        return self._finite(grad), loss, wrong

    def _finite(self, grad):
        finite = grad.isfinite()
        self.bad_gradients += (~finite.flatten(1).all(1)).sum()
        return torch.where(finite, grad, 0.0)


def annealed(step, steps, first, last):
    """The value at one of `steps` steps, which falls from first towards last along a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
