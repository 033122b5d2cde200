"""TRADES (Zhang et al. 2019, equation 5 and algorithm 1)."""

from .. import losses
from .base import StabilityAttack


class TRADES(StabilityAttack):
    """max KL(s(x) || s(x_adv));  min CE(s(x), y) + beta KL(s(x) || s(x_adv)), batch mean.

    The gradient flows through both arguments of the outer KL. y is smoothed by label_smoothing.
    parity: s(x) is computed a second time for the KL, as in the authors' code, after s(x_adv): the
    same loss and gradient, but BatchNorm sees x twice. The authors also recompute the constant s(x)
    in every step of the attack, which changes nothing.
    """

    def __init__(self, beta=6.0, label_smoothing=0.0, parity=False, **options):
        super().__init__(**options)
        self.beta, self.label_smoothing, self.parity = beta, label_smoothing, parity

    def outer(self, nets, batch, state):
        clean, adv = nets.student(batch.x), nets.student(batch.x_adv)
        target = nets.student(batch.x) if self.parity else clean
        natural = losses.cross_entropy(clean, batch.y, self.label_smoothing)
        return natural + self.beta * losses.kl(adv, target), state
