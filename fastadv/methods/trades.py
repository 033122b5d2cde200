"""TRADES (Zhang et al. 2019, equation 5 and algorithm 1)."""

import torch
import torch.nn.functional as F

from .. import losses
from .base import Method


class TRADES(Method):
    """max KL(s(x) || s(x_adv));  min CE(s(x), y) + beta KL(s(x) || s(x_adv)), batch mean.

    The gradient flows through both arguments of the outer KL, as in the authors' code, which
    computes s(x) a second time for it; here one forward serves both terms, so BatchNorm sees x
    once.
    """

    def __init__(self, beta=6.0, **options):
        super().__init__(**options)
        self.beta = beta

    def targets(self, nets, batch, state):
        with torch.no_grad():
            return (nets.student(batch.x),)

    def inner(self, nets, x_adv, clean):
        return losses.kl(nets.student(x_adv), clean, reduction="none")

    def outer(self, nets, batch, state):
        clean, adv = nets.student(batch.x), nets.student(batch.x_adv)
        return F.cross_entropy(clean, batch.y) + self.beta * losses.kl(adv, clean), state
