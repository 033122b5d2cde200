"""SAAD, sample-wise adaptive adversarial distillation (Lee and Chung 2026, arXiv 2512.10275)."""

import torch

from .. import losses
from ..runs import parallel
from .base import Method, first_epoch, probabilities, update_statistics
from .igdm import gradient_gap, mirrored


class SAAD(Method):
    """max KL(t(x) + inner_weight <g, x_adv - x> e_y || s(x_adv)), the gradient through both, where
    g is the gradient of t_y at x: the teacher's logits of x_adv, to first order in the true class;
    min w [KL(t(x_adv) || s(x_adv)) + I] + beta (1 - n) KL(t(x) || s(x)), batch mean.

    w = entropy_scale (H - min H), where H is the entropy of t(x_adv) and the minimum is over the
    batch, of all processes: what the teacher is sure of weighs little. n is w scaled to [0, 1].
    I is the term of IGDM, igdm_weight (epoch + 1) / epochs times its KL. H is Shannon's for
    entropy_order 1, else Renyi's.

    parity: s(x) is computed, after the others, also when beta is 0 and its term vanishes. t(x) is
    not cached, because the pass that gives g gives it too. A mixed image has the mixture of its
    classes' logits for t_y.
    """

    teachers = ("teacher",)

    def __init__(
        self,
        inner_weight=1.0,
        igdm_weight=1.0,
        beta=0.0,
        entropy_order=1.0,
        entropy_scale=5.0,
        parity=False,
        **options,
    ):
        super().__init__(**options)
        self.inner_weight, self.igdm_weight, self.beta = inner_weight, igdm_weight, beta
        self.entropy_order, self.entropy_scale = entropy_order, entropy_scale
        self.parity = parity

    def init_state(self, device):
        return {"epoch": first_epoch()}

    def targets(self, nets, batch, state):
        x = batch.x.detach().requires_grad_()
        with torch.enable_grad():
            z = nets.teacher(x)
            y = probabilities(batch.y, z)
            (g,) = torch.autograd.grad((z * y).sum(), x)
        batch.memo["teacher", "x", "logits"] = z = z.detach()
        return z, y, g, batch.x

    def inner(self, nets, x_adv, z, y, g, x):
        change = (g * (x_adv - x)).flatten(1).sum(1, keepdim=True)
        taught = z + self.inner_weight * change * y
        return losses.kl(nets.student(x_adv), taught, reduction="none")

    def outer(self, nets, batch, state):
        mirror = mirrored(batch)
        adv, of_mirror = nets.student(batch.x_adv), nets.student(mirror)
        taught = batch.teacher_logits(nets, on="x_adv")
        entropy = self.entropy(taught)
        w = self.entropy_scale * (entropy - parallel.least(entropy.min()))
        gap = self.grown(self.igdm_weight, state) * gradient_gap(
            nets, batch, mirror, adv, of_mirror
        )
        loss = (w * (losses.kl(adv, taught, reduction="none") + gap)).mean()
        if self.beta:
            n = w / (-parallel.least((-w).min()) + 1e-8)  # the least w is 0
            clean = losses.kl(nets.student(batch.x), batch.teacher_logits(nets), reduction="none")
            loss = loss + self.beta * ((1 - n) * clean).mean()
        elif self.parity:
            update_statistics(nets.student, batch.x)
        return loss, state

    def entropy(self, logits):
        """H, [B]."""
        if self.entropy_order == 1:
            return losses.entropy(logits, offset=1e-12)
        powers = logits.softmax(1).pow(self.entropy_order).sum(1)
        return (powers + 1e-12).log() / (1 - self.entropy_order)
