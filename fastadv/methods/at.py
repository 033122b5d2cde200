"""PGD adversarial training (Madry et al. 2018, equation 2.1)."""

import torch.nn.functional as F

from .base import Method


class AT(Method):
    """max CE(s(x_adv), y);  min CE(s(x_adv), y)."""

    init = "uniform"

    def targets(self, nets, batch, state):
        return (batch.y,)

    def inner(self, nets, x_adv, y):
        return F.cross_entropy(nets.student(x_adv), y, reduction="none")

    def outer(self, nets, batch, state):
        return F.cross_entropy(nets.student(batch.x_adv), batch.y), state
