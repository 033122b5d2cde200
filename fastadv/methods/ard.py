"""ARD, adversarially robust distillation (Goldblum et al. 2020)."""

from .. import losses
from .base import LabelAttack, update_statistics


class ARD(LabelAttack):
    """max CE(s(x_adv), y);
    min alpha T^2 KL(t(x) || s(x_adv); T) + (1 - alpha) CE(s(x), y).

    As in the authors' code: the KL is the mean over batch and classes (batch mean / C), both
    softmaxes have temperature T, and the attack runs in train mode from a uniform start that is not
    clipped. label_smoothing: of y. parity: s(x) is computed also when alpha is 1 and its term
    vanishes.
    """

    teachers = ("teacher",)
    loss_scale = 0.1  # a mean over classes, of which CIFAR-10 and the digits have ten
    init, clip_start, attack_bn = "uniform", False, "train"

    def __init__(self, alpha=1.0, temperature=30.0, label_smoothing=0.0, parity=False, **options):
        super().__init__(**options)
        self.label_smoothing = label_smoothing
        self.alpha, self.temperature, self.parity = alpha, temperature, parity

    def cacheable(self):
        return {"teacher": ("logits",)}

    def outer(self, nets, batch, state):
        adv, z = nets.student(batch.x_adv), batch.teacher_logits(nets)
        distilled = self.temperature**2 * losses.kl(adv, z, self.temperature, reduction="mean")
        if self.alpha < 1:
            clean = nets.student(batch.x)
            natural = losses.cross_entropy(clean, batch.y, self.label_smoothing)
            return self.alpha * distilled + (1 - self.alpha) * natural, state
        if self.parity:
            update_statistics(nets.student, batch.x)
        return distilled, state
