"""MTARD, multi-teacher adversarial robustness distillation (Zhao et al. 2022)."""

import torch

from .. import losses
from ..errors import UsageError
from ..runs import parallel
from .base import LabelAttack, first_epoch


class MTARD(LabelAttack):
    """max CE(s(x_adv), y);
    min w_adv L_adv + w_nat L_nat,  L_adv = KL(t(x_adv) || s(x_adv)) / 10,
    L_nat = KL(t_n(x) || s(x)) / 10, batch mean; t_n is the clean teacher.

    The weights start at 1/2 and follow the relative losses r_k = (L_k / L_k of the first step)^b:
    w_k <- w_k - rate (w_k - r_k / sum r), before they are used; for rates in [0, 1] (UsageError for
    others) they stay shares of 1. The loss is a tenth of the batch mean on CIFAR-10 and CIFAR-100
    alike. Its value, which the weights see, is that of the authors' code: log(q + 1e-5) of the
    teacher's probabilities q.
    """

    teachers = ("teacher", "clean_teacher")
    loss_scale = 0.1

    def __init__(self, weight_rate=0.025, b=1.0, **options):
        super().__init__(**options)
        if not 0 <= weight_rate <= 1:
            raise UsageError(f"weight_rate is {weight_rate}, must be in [0, 1]")
        self.weight_rate, self.b = weight_rate, b

    def cacheable(self):
        return {"clean_teacher": ("logits",)}

    def init_state(self, device):
        return {
            "epoch": first_epoch(),
            "weights": torch.full((2,), 0.5, device=device),  # adv, nat
            "first": torch.zeros(2, device=device),  # the losses of the first step; 0: none yet
        }

    def teacher_logits(self, nets, batch, state):
        """t(x_adv), t_n(x)."""
        return batch.teacher_logits(nets, on="x_adv"), batch.teacher_logits(nets, "clean_teacher")

    def outer(self, nets, batch, state):
        teachers = self.teacher_logits(nets, batch, state)
        students = nets.student(batch.x_adv), nets.student(batch.x)
        pair = torch.stack([divergence(*logits) for logits in zip(students, teachers, strict=True)])
        state = self.balanced(parallel.mean(pair), state)
        return (state["weights"] * pair).sum(), state

    def balanced(self, pair, state):
        """The state after a step with losses pair = [L_adv, L_nat]."""
        first = torch.where(state["first"] == 0, pair, state["first"])
        relative = (pair / first) ** self.b
        rate = self.decayed(self.weight_rate, state)
        weights = state["weights"] - rate * (state["weights"] - relative / relative.sum())
        return state | {"weights": weights, "first": first}


def divergence(student_logits, teacher_logits):
    """KL(teacher || student) / 10, batch mean, with log(q + 1e-5) in the place of log q."""
    cross = losses.cross_entropy(student_logits, teacher_logits.softmax(1))
    return (cross - losses.entropy(teacher_logits, offset=1e-5, reduction="mean")) / 10
