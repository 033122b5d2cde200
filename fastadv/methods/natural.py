"""Natural training: no adversary."""

import torch.nn.functional as F

from .base import Method


class Natural(Method):
    """min CE(s(x), y)."""

    def perturb(self, nets, batch, state, start=None):
        return batch.x

    def outer(self, nets, batch, state):
        return F.cross_entropy(nets.student(batch.x), batch.y), state
