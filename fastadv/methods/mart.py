"""MART (Wang et al. 2020)."""

from .. import losses
from .base import LabelAttack, label_probability


class MART(LabelAttack):
    """max CE(s(x_adv), y);
    min BCE(s(x_adv), y) + beta (1 - p_y(x)) KL(s(x) || s(x_adv)), batch mean.

    Nothing is detached: the gradient flows through p_y(x) and both arguments of the KL. The KL is
    exact where the authors add 1e-12 to probabilities inside its logarithm.
    """

    hard_labels = True

    def __init__(self, beta=5.0, **options):
        super().__init__(**options)
        self.beta = beta

    def outer(self, nets, batch, state):
        clean, adv = nets.student(batch.x), nets.student(batch.x_adv)
        weight = 1.0000001 - label_probability(clean, batch.y)
        divergence = losses.kl(adv, clean, weight=weight)
        return losses.mart_bce(adv, batch.y) + self.beta * divergence, state
