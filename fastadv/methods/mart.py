"""MART (Wang et al. 2020)."""

from .. import losses
from .base import LabelAttack, label_probability, probabilities


class MART(LabelAttack):
    """max CE(s(x_adv), y);
    min BCE(s(x_adv), y) + beta (1 - p_y(x)) KL(s(x) || s(x_adv)), batch mean.

    Nothing is detached: the gradient flows through p_y(x) and both arguments of the KL. The KL is
    exact where the authors add 1e-12 to probabilities inside its logarithm. label_smoothing: of y
    in the BCE, which is then its expectation over labels, as it is for mixed images.
    """

    def __init__(self, beta=5.0, label_smoothing=0.0, **options):
        super().__init__(**options)
        self.beta, self.label_smoothing = beta, label_smoothing

    def outer(self, nets, batch, state):
        clean, adv = nets.student(batch.x), nets.student(batch.x_adv)
        weight = 1.0000001 - label_probability(clean, batch.y)
        y = batch.y
        if self.label_smoothing:
            share = self.label_smoothing / adv.shape[1]
            y = (1 - self.label_smoothing) * probabilities(y, adv) + share
        return losses.mart_bce(adv, y) + self.beta * losses.kl(adv, clean, weight=weight), state
