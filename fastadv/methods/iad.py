"""IAD, introspective adversarial distillation, I and II (Zhu et al. 2022)."""

from .. import losses
from .base import LabelAttack, first_epoch, label_probability, update_statistics


class IAD1(LabelAttack):
    """max CE(s(x_adv), y);
    min T^2 KL(t(x) || s(x_adv); T) + (1 - a) KL(s(x) || s(x_adv)), batch mean,
    with a = t_y(x_adv)^beta, the trust in the teacher; a = 1 before epoch `begin`.

    As in the authors' code: the teacher's term is not weighted by a, the student's own target s(x)
    is not detached, and the attack runs in train mode from a uniform start that is not clipped.
    parity: also the student forwards of weight zero, s(x) in every epoch and, from `begin` on,
    s(x_adv) a second time.
    """

    teachers = ("teacher",)
    init, clip_start, attack_bn = "uniform", False, "train"

    def __init__(self, beta=0.1, begin=60, temperature=1.0, parity=False, **options):
        super().__init__(**options)
        self.beta, self.begin, self.temperature, self.parity = beta, begin, temperature, parity

    def cacheable(self):
        return {"teacher": ("logits",)}

    def init_state(self, device):
        return {"epoch": first_epoch()}

    def outer(self, nets, batch, state):
        t, introspective = self.temperature, state["epoch"] >= self.begin
        adv = nets.student(batch.x_adv)
        loss = t**2 * losses.kl(adv, batch.teacher_logits(nets), t)
        if introspective:
            if self.parity:
                update_statistics(nets.student, batch.x_adv)
            weight = 1 - trust(nets, batch) ** self.beta
            loss = loss + losses.kl(adv, nets.student(batch.x), weight=weight)
        if self.parity:
            update_statistics(nets.student, batch.x)
        return loss, state


class IAD2(LabelAttack):
    """max CE(s(x_adv), y);
    min CE(s(x_adv), y) / 4
    + T^2 [a KL(t(x_adv) || s(x_adv); T) + (1 - a) KL(s(x) || s(x_adv))] / 2
    + T^2 KL(t_n(x_adv) || s(x_adv); T) / 4, batch mean;
    t_n is the clean teacher and a = t_y(x_adv)^beta; a = 1, without s(x), before epoch `begin`.

    The attack is that of IAD1. label_smoothing: of y in CE.
    """

    teachers = ("teacher", "clean_teacher")
    init, clip_start, attack_bn = "uniform", False, "train"

    def __init__(self, beta=0.1, begin=40, temperature=1.0, label_smoothing=0.0, **options):
        super().__init__(**options)
        self.beta, self.begin, self.temperature = beta, begin, temperature
        self.label_smoothing = label_smoothing

    def init_state(self, device):
        return {"epoch": first_epoch()}

    def outer(self, nets, batch, state):
        t = self.temperature
        adv = nets.student(batch.x_adv)
        robust, natural = (batch.teacher_logits(nets, net, on="x_adv") for net in self.teachers)
        if state["epoch"] < self.begin:
            taught = losses.kl(adv, robust, t)
        else:
            a = trust(nets, batch) ** self.beta
            own = losses.kl(adv, nets.student(batch.x), weight=1 - a)
            taught = losses.kl(adv, robust, t, weight=a) + own
        loss = losses.cross_entropy(adv, batch.y, self.label_smoothing) / 4 + t**2 * taught / 2
        return loss + t**2 * losses.kl(adv, natural, t) / 4, state


def trust(nets, batch):
    """t_y(x_adv), [B]."""
    return label_probability(batch.teacher_logits(nets, on="x_adv"), batch.y)
