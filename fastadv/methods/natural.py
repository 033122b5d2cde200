"""Natural training: no adversary."""

from .. import losses
from .base import Method


class Natural(Method):
    """min CE(s(x), y), batch mean, y smoothed by label_smoothing."""

    adversarial = False

    def __init__(self, label_smoothing=0.0, **options):
        super().__init__(**options)
        self.label_smoothing = label_smoothing

    def outer(self, nets, batch, state):
        return losses.cross_entropy(nets.student(batch.x), batch.y, self.label_smoothing), state
