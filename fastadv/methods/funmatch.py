"""FunMatch, function matching on clean images (Beyer et al. 2022)."""

from .. import losses
from .base import Method


class FunMatch(Method):
    """min T^2 KL(t(x) || s(x); T), batch mean, on one strongly augmented x for both; no labels."""

    teachers = ("teacher",)
    adversarial = False

    def __init__(self, temperature=1.0, **options):
        super().__init__(**options)
        self.temperature = temperature

    def cacheable(self):
        return {"teacher": ("logits",)}

    def outer(self, nets, batch, state):
        t = self.temperature
        return t**2 * losses.kl(nets.student(batch.x), batch.teacher_logits(nets), t), state
