"""IGDM, indirect gradient distillation (Lee, Cho and Kim 2023, arXiv 2312.03286)."""

from dataclasses import replace

import torch

from .. import losses
from ..errors import UsageError
from .base import first_epoch
from .wrapper import Wrapper


class IGDM(Wrapper):
    """max: that of `base`;
    min L_base + w KL(t(x + d) - t(x - d) || s(x + d) - s(x - d)), batch mean, with d = x_adv - x
    and w = igdm_weight (epoch + 1) / epochs.

    The differences of logits stand for the gradients of teacher and student along d. x - d is not
    clipped to the box. s(x + d) is the base's own s(x_adv); s(x - d) is one forward pass more,
    right after it. The authors' script passes the radius and the step of AdaAD's attack the wrong
    way round; here they are the paper's.

    base: an adversarial Method with a robust teacher; UsageError for others.
    """

    def __init__(self, base, igdm_weight=1.0):
        if not (base.adversarial and "teacher" in base.teachers):
            name = type(base).__name__
            raise UsageError(f"base is {name}, must have a robust teacher and attack the student")
        super().__init__(base, teacher="teacher")
        self.igdm_weight = igdm_weight

    def init_state(self, device):
        return super().init_state(device) | {"epoch": first_epoch()}

    def outer(self, nets, batch, state):
        student = Mirrored(nets.student, batch)
        loss, after = self.base.outer(replace(nets, student=student), batch, state)
        weight = self.grown(self.igdm_weight, state)
        return loss + weight * gradient_gap(nets, batch, *student.seen).mean(), after


class Mirrored:
    """Wraps a student and passes x - d through it right after x_adv = x + d. Keeps x - d and the
    logits of both."""

    def __init__(self, net, batch):
        self.net, self.batch, self.seen = net, batch, None

    def __call__(self, x):
        logits = self.net(x)
        if x is self.batch.x_adv and self.seen is None:
            mirror = mirrored(self.batch)
            self.seen = mirror, logits, self.net(mirror)
        return logits


def mirrored(batch):
    """x - d."""
    return batch.x - (batch.x_adv - batch.x)


def gradient_gap(nets, batch, mirror, of_adv, of_mirror):
    """KL(t(x + d) - t(x - d) || s(x + d) - s(x - d)), [B]. mirror: x - d; of_adv, of_mirror: the
    student's logits of x + d and of that."""
    with torch.no_grad():
        taught = batch.teacher_logits(nets, on="x_adv") - nets.teacher(mirror)
    return losses.kl(of_adv - of_mirror, taught, reduction="none")
