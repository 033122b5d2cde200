"""IAD, introspective adversarial distillation, I and II (Zhu et al. 2022)."""

import torch

from .. import losses
from .base import LabelAttack, label_probability, update_statistics


class IAD1(LabelAttack):
    """max CE(s(x_adv), y);
    min T^2 KL(t(x) || s(x_adv); T) + (1 - a) KL(s(x) || s(x_adv)), batch mean,
    with a = t_y(x_adv)^beta, the trust in the teacher; a = 1 before epoch `begin`.

    As in the authors' code: the teacher's term is not weighted by a, the student's own target s(x)
    is not detached, and the attack runs in train mode from a uniform start that is not clipped.
    parity: also the two student forwards of weight zero, s(x_adv) and s(x) a second time.
    """

    teachers = ("teacher",)
    init, clip_start, attack_bn = "uniform", False, "train"

    def __init__(self, beta=0.1, begin=60, temperature=1.0, parity=False, **options):
        super().__init__(**options)
        self.beta, self.begin, self.temperature, self.parity = beta, begin, temperature, parity

    def cacheable(self):
        return {"teacher": ("logits",)}

    def init_state(self, device):
        return {"epoch": torch.zeros((), dtype=torch.int64, device=device)}

    def trust(self, nets, batch, state):
        """a, [B]."""
        p = label_probability(batch.teacher_logits(nets, on="x_adv"), batch.y)
        return torch.where(state["epoch"] >= self.begin, p**self.beta, torch.ones_like(p))

    def students(self, nets, batch):
        """s(x_adv), s(x)."""
        adv = nets.student(batch.x_adv)
        if self.parity:
            update_statistics(nets.student, batch.x_adv)
        clean = nets.student(batch.x)
        if self.parity:
            update_statistics(nets.student, batch.x)
        return adv, clean

    def outer(self, nets, batch, state):
        t, a = self.temperature, self.trust(nets, batch, state)
        adv, clean = self.students(nets, batch)
        taught = t**2 * losses.kl(adv, batch.teacher_logits(nets), t)
        return taught + losses.kl(adv, clean, weight=1 - a), state


class IAD2(IAD1):
    """max CE(s(x_adv), y);
    min CE(s(x_adv), y) / 4 + T^2 [a KL(t(x_adv) || s(x_adv)) + (1 - a) KL(s(x) || s(x_adv))] / 2
    + T^2 KL(t_n(x_adv) || s(x_adv)) / 4, batch mean, all softmaxes at temperature T;
    t_n is the clean teacher and a the trust of IAD1, from epoch 40. label_smoothing: of y in CE.
    """

    teachers = ("teacher", "clean_teacher")

    def __init__(self, begin=40, label_smoothing=0.0, **options):
        super().__init__(begin=begin, **options)
        self.label_smoothing = label_smoothing

    def cacheable(self):
        return {}

    def outer(self, nets, batch, state):
        t, a = self.temperature, self.trust(nets, batch, state)
        adv, clean = self.students(nets, batch)
        robust, natural = (batch.teacher_logits(nets, net, on="x_adv") for net in self.teachers)
        taught = losses.kl(adv, robust, t, weight=a) + losses.kl(adv, clean, t, weight=1 - a)
        loss = losses.cross_entropy(adv, batch.y, self.label_smoothing) / 4 + t**2 * taught / 2
        return loss + t**2 * losses.kl(adv, natural, t) / 4, state
