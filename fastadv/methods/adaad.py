"""AdaAD, adaptive adversarial distillation (Huang et al. 2023)."""

from .. import losses
from ..errors import UsageError
from .base import MismatchAttack, update_statistics


class AdaAD(MismatchAttack):
    """max KL(t(x_adv) || s(x_adv)), the gradient through both networks;
    min alpha KL(t(x_adv) || s(x_adv)) + (1 - alpha) KL(t(x) || s(x)).

    reduction: "mean" over batch and classes is the authors' code on CIFAR-10, "batchmean" on
    CIFAR-100. parity: s(x) is computed, before s(x_adv), also when alpha is 1 and its term
    vanishes. teacher_every: an approximation, see MismatchAttack.
    """

    teachers = ("teacher",)
    loss_scale = 0.1  # a mean over classes, of which CIFAR-10 and the digits have ten

    def __init__(self, alpha=1.0, reduction="mean", parity=False, **options):
        super().__init__(**options)
        if reduction not in ("mean", "batchmean"):
            raise UsageError(f"reduction is {reduction!r}, must be 'mean' or 'batchmean'")
        self.alpha, self.reduction, self.parity = alpha, reduction, parity

    def cacheable(self):
        return {"teacher": ("logits",)} if self.alpha < 1 else {}

    def outer(self, nets, batch, state):
        loss = 0.0
        if self.alpha < 1:
            clean, z = nets.student(batch.x), batch.teacher_logits(nets)
            loss = (1 - self.alpha) * losses.kl(clean, z, reduction=self.reduction)
        elif self.parity:
            update_statistics(nets.student, batch.x)
        adv, z_adv = nets.student(batch.x_adv), batch.teacher_logits(nets, on="x_adv")
        return loss + self.alpha * losses.kl(adv, z_adv, reduction=self.reduction), state
