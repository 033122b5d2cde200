"""A method of one's own, trained by the command line without a change of fastadv:

cd examples
python -m fastadv.train --method-from own_method:Detached --data digits --set beta=3
"""

import torch

from fastadv import losses
from fastadv.methods import Method


class Detached(Method):
    """TRADES whose target is a constant:

    max KL(s(x) || s(x_adv));  min CE(s(x), y) + beta KL(s(x) || s(x_adv)), no gradient to s(x) in
    the KL.
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
        kl = losses.kl(adv, clean.detach())
        return losses.cross_entropy(clean, batch.y) + self.beta * kl, state
