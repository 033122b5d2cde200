"""RSLAD (Zi et al. 2021, equations 6 and 7)."""

from .. import losses
from .base import Method


class RSLAD(Method):
    """max KL(t(x) || s(x_adv));
    min [adv_weight KL(t(x) || s(x_adv)) + (1 - adv_weight) KL(t(x) || s(x))] / 10.

    The teacher sees x only; no hard labels. A tenth of the batch mean is the scale of the authors'
    code on CIFAR-10 and CIFAR-100 alike (it averages over classes, times 10 on CIFAR-100).
    """

    teachers = ("teacher",)
    loss_scale = 0.1

    def __init__(self, adv_weight=5 / 6, **options):
        super().__init__(**options)
        self.adv_weight = adv_weight

    def cacheable(self):
        return {"teacher": ("logits",)}

    def targets(self, nets, batch, state):
        return (batch.teacher_logits(nets),)

    def inner(self, nets, x_adv, z):
        return losses.kl(nets.student(x_adv), z, reduction="none")

    def outer(self, nets, batch, state):
        z = batch.teacher_logits(nets)
        adv, clean = nets.student(batch.x_adv), nets.student(batch.x)
        loss = self.adv_weight * losses.kl(adv, z) + (1 - self.adv_weight) * losses.kl(clean, z)
        return loss / 10, state
