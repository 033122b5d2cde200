"""ABSLD, anti-bias soft label distillation (Zhao et al. 2024)."""

import torch

from .. import losses
from ..runs import parallel
from .base import first_epoch, probabilities
from .rslad import RSLAD


class ABSLD(RSLAD):
    """RSLAD with a temperature per class for the teacher, t(x) / tau_y: one for the inner problem
    and the adversarial term, one for the clean term.

    After each epoch, with E_c the sum of the student's cross-entropy over images of class c (on
    x_adv, on x) and g = E - mean E: tau <- clip(tau - rate g / max|g|, 0.5, 5), so that classes
    with a large error get sharper labels. The two temperatures are kept apart; in the authors'
    release an aliased tensor multiplies them. A mixed image has the mixture of its classes'
    temperatures and shares out its error.
    """

    def __init__(self, temperature_rate=0.1, **options):
        super().__init__(**options)
        self.temperature_rate = temperature_rate
        self.classes = 0

    def prepare(self, nets, x):
        with torch.no_grad():
            self.classes = nets.teacher(x).shape[1]

    def init_state(self, device):
        if not self.classes:
            raise ValueError("classes is 0: call prepare(nets, x) before init_state")
        return {
            "epoch": first_epoch(),
            "temperatures": torch.ones(2, self.classes, device=device),  # adv, nat
            "errors": torch.zeros(2, self.classes, device=device),
        }

    def soft_labels(self, nets, batch, state):
        """The teacher's logits of x over the temperatures of the adversarial and the clean term."""
        z = batch.teacher_logits(nets)
        temperatures = state["temperatures"].to(z.dtype)
        adv, nat = (temperatures @ probabilities(batch.y, z).T)[:, :, None]
        return z / adv, z / nat

    def targets(self, nets, batch, state):
        z_adv, _ = self.soft_labels(nets, batch, state)
        return (z_adv,)

    def outer(self, nets, batch, state):
        z_adv, z = self.soft_labels(nets, batch, state)
        adv, clean = nets.student(batch.x_adv), nets.student(batch.x)
        loss = self.adv_weight * losses.kl(adv, z_adv) + (1 - self.adv_weight) * losses.kl(clean, z)
        errors = [
            losses.cross_entropy(logits.detach(), batch.y, reduction="none")
            for logits in (adv, clean)
        ]
        errors = parallel.mean(torch.stack(errors) @ probabilities(batch.y, adv))
        return loss / 10, state | {"errors": state["errors"] + errors}

    def end_epoch(self, state):
        state = super().end_epoch(state)  # the rate drops at the end of its epoch
        gap = state["errors"] - state["errors"].mean(1, keepdim=True)
        gap = gap / gap.abs().amax(1, keepdim=True).clamp(min=1e-12)
        step = self.decayed(self.temperature_rate, state) * gap
        temperatures = (state["temperatures"] - step).clamp(0.5, 5)
        errors = torch.zeros_like(state["errors"])
        return state | {"temperatures": temperatures, "errors": errors}
