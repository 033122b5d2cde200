"""What attacks share: equality by value, gradients of iterates, and which of two to keep."""

import dataclasses

import torch

from ..ops.reference import per_sample


class ByValue:
    """A dataclass with tensors among its fields that compares as one without."""

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def _values(self):
        found = [getattr(self, field.name) for field in dataclasses.fields(self) if field.compare]
        return [v.tolist() if isinstance(v, torch.Tensor) else v for v in found]


def gradient(inner, x_adv, *targets):
    """(d sum(loss) / d x_adv, loss [B], wrong [B]) of inner(x_adv, *targets) -> (loss, wrong)."""
    leaf = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        loss, wrong = inner(leaf, *targets)
        grad = gradient_to(leaf, loss)
    return grad, loss.detach(), wrong


def gradient_to(leaf, loss):
    """d sum(loss) / d leaf. Raises RuntimeError where the loss has none, TypeError where it is no
    tensor."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"inner returned a {type(loss).__name__}, must return a tensor [B]")
    grad = None
    if loss.requires_grad:
        grad = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0]
    if grad is None:
        raise RuntimeError(
            "model has no gradient to its images, which this attack follows; Square needs none"
        )
    return grad


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
