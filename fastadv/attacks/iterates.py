"""What the attacks of evaluation share: gradients of iterates, and which of two to keep."""

import torch

from ..reference import per_sample


def gradient(inner, x_adv, *targets):
    """(d sum(loss) / d x_adv, loss [B], wrong [B]) of inner(x_adv, *targets) -> (loss, wrong)."""
    leaf = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        loss, wrong = inner(leaf, *targets)
        grad = torch.autograd.grad(loss.sum(), leaf)[0]
    return grad, loss.detach(), wrong


def better(new, old):
    """[B]: where `new`, (loss, wrong), is to be kept: wrong first, then higher loss."""
    return (new[1] & ~old[1]) | ((new[1] == old[1]) & (new[0] > old[0]))


def where(condition, new, old):
    """torch.where by sample over tuples of [B, ...]."""
    return tuple(torch.where(per_sample(condition, a), a, b) for a, b in zip(new, old, strict=True))


def likeliest_others(logits, y, count):
    """int64 [B, T]: the likeliest `count` classes (at most C - 1) but y, in falling order."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1)).indices
