"""IKL, training by the improved Kullback-Leibler divergence (Cui et al. 2024, arXiv 2305.13948)."""

import torch

from .. import losses
from ..engine.query import evaluating
from ..runs import parallel
from .base import StabilityAttack, probabilities


class IKL(StabilityAttack):
    """max KL(s(x) || s(x_adv)), with s(x) a constant;
    min CE(s(x), y) + alpha SCE + beta MSE, see `losses.ikl`: the divergence taken apart into a soft
    cross-entropy, whose target s(x) is a constant, and a squared distance between the differences
    of the logits of each two classes, whose gradient flows through both.

    The distance of classes j and k weighs P_j P_k, with P = prior[y]^gamma. prior is what the
    student has said of each class in the epoch before: the mean over its images of
    softmax(s(x) / temperature); 1/C before the first. A class that was not seen keeps its row. A
    mixed image has the mixture of its classes' rows.
    """

    loss_scale = 5.0  # cross-entropy once, and the soft one alpha times

    def __init__(self, alpha=4.0, beta=20.0, gamma=1.0, temperature=4.0, **options):
        super().__init__(**options)
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature
        self.classes = 0

    def prepare(self, nets, x):
        with torch.no_grad(), evaluating(nets.student):
            self.classes = nets.student(x).shape[1]

    def init_state(self, device):
        if not self.classes:
            raise ValueError("classes is 0: call prepare(nets, x) before init_state")
        prior = torch.full((self.classes, self.classes), 1 / self.classes, device=device)
        return {"prior": prior, "sums": torch.zeros_like(prior)}

    def outer(self, nets, batch, state):
        adv, clean = nets.student(batch.x_adv), nets.student(batch.x)
        y = probabilities(batch.y, clean.detach())
        weight = (y @ state["prior"].to(y)) ** self.gamma
        loss = losses.cross_entropy(clean, batch.y)
        loss = loss + losses.ikl(adv, clean, weight, self.alpha, self.beta)
        said = (clean.detach() / self.temperature).softmax(1)
        sums = parallel.mean((y.T @ said).to(state["sums"]))
        return loss, state | {"sums": state["sums"] + sums}

    def end_epoch(self, state):
        sums = state["sums"]
        seen = sums.sum(1, keepdim=True)
        prior = torch.where(seen > 0, sums / seen, state["prior"])
        return super().end_epoch(state) | {"prior": prior, "sums": torch.zeros_like(sums)}
