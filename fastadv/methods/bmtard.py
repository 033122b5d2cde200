"""B-MTARD, balanced multi-teacher robustness distillation (Zhao et al. 2024)."""

import torch

from .. import losses
from ..runs import parallel
from .mtard import MTARD


class BMTARD(MTARD):
    """MTARD from teachers with temperatures, KL(softmax(t / tau) || s) at the student's 1, no T^2:
    tau_adv <- clip(tau_adv - rate sign(H_adv / H_nat - 1), 1, 10), tau_nat with H_nat / H_adv.

    H is the mean entropy of a teacher's tempered softmax (with log(q + 1e-5), as in the authors'
    code): the teacher that knows less is cooled, the other one heated. New temperatures act from
    the next step.
    """

    def __init__(self, temperature_rate=0.001, **options):
        super().__init__(**options)
        self.temperature_rate = temperature_rate

    def init_state(self, device):
        return super().init_state(device) | {"temperatures": torch.ones(2, device=device)}

    def teacher_logits(self, nets, batch, state):
        adv, nat = super().teacher_logits(nets, batch, state)
        return adv / state["temperatures"][0], nat / state["temperatures"][1]

    def outer(self, nets, batch, state):
        adv, nat = self.teacher_logits(nets, batch, state)
        loss, state = super().outer(nets, batch, state)
        h = [losses.entropy(z, offset=1e-5, reduction="mean") for z in (adv, nat)]
        h = parallel.mean(torch.stack(h))
        step = self.decayed(self.temperature_rate, state) * (h / h.flip(0) - 1).sign()
        return loss, state | {"temperatures": (state["temperatures"] - step).clamp(1, 10)}
