"""PGD adversarial training (Madry et al. 2018, equation 2.1)."""

from .. import losses
from .base import LabelAttack, update_statistics


class AT(LabelAttack):
    """max CE(s(x_adv), y);  min CE(s(x_adv), y), batch mean, y smoothed by label_smoothing.

    parity: the forwards of weight zero in the code of Rice et al. 2020, s(x_adv) before (there to
    choose among restarts) and s(x) after (for its log; theirs follows the optimiser's step).
    """

    init = "uniform"

    def __init__(self, label_smoothing=0.0, parity=False, **options):
        super().__init__(**options)
        self.label_smoothing, self.parity = label_smoothing, parity

    def outer(self, nets, batch, state):
        if self.parity:
            update_statistics(nets.student, batch.x_adv)
        adv = nets.student(batch.x_adv)
        if self.parity:
            update_statistics(nets.student, batch.x)
        return losses.cross_entropy(adv, batch.y, self.label_smoothing), state
