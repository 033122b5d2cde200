"""AdvFunMatch, adversarial function matching (Wu et al. 2023, arXiv 2305.14700)."""

from .. import losses
from .base import MismatchAttack


class AdvFunMatch(MismatchAttack):
    """max KL(t(x_adv) || s(x_adv); T), the gradient through both networks;
    min T^2 [(1 - clean_weight) KL(t(x_adv) || s(x_adv); T) + clean_weight KL(t(x) || s(x); T)].

    The paper's abstract fixes: the inner problem finds, in the ball, the example on which teacher
    and student mismatch most in KL; the outer one matches them there, on identical input; strong
    augmentation helps. This project's choice, as the full text and code were not available: the
    teacher as KL's first argument, the temperature with its T^2, the optional clean term, the batch
    mean, and PGD's start and sizes. teacher_every: an approximation, see MismatchAttack.
    """

    teachers = ("teacher",)

    def __init__(self, clean_weight=0.0, temperature=1.0, **options):
        super().__init__(**options)
        self.clean_weight, self.temperature = clean_weight, temperature

    def cacheable(self):
        return {"teacher": ("logits",)} if self.clean_weight > 0 else {}

    def outer(self, nets, batch, state):
        t, share = self.temperature, self.clean_weight
        z_adv = batch.teacher_logits(nets, on="x_adv")
        loss = (1 - share) * losses.kl(nets.student(batch.x_adv), z_adv, t)
        if share > 0:
            loss = loss + share * losses.kl(nets.student(batch.x), batch.teacher_logits(nets), t)
        return t**2 * loss, state
