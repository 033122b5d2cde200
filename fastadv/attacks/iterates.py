"""Parts that attacks share: equality by value, the gradient of an iterate (a point x_adv of the
search), and the choice between two iterates."""

import dataclasses

import torch

from ..ops._reference import per_sample


class ByValue:
    """A dataclass that may have tensors among its fields: two are equal if all fields have equal
    values."""

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


def gradient_to(leaf, loss, again=False):
    """d sum(loss) / d leaf. again: whether other gradients of the same pass follow. Raises
    RuntimeError if the loss has no such gradient, TypeError if it is no tensor."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"inner returned a {type(loss).__name__}, must return a tensor [B]")
    grad = None
    if loss.requires_grad:
        grad = torch.autograd.grad(loss.sum(), leaf, allow_unused=True, retain_graph=again)[0]
    if grad is None:
        raise RuntimeError(
            "model has no gradient to its images, which this attack follows; Square needs none"
        )
    return grad


def better(new, old):
    """bool [B]: where `new` is better than `old`, each (loss [B], wrong [B]). A wrong one is better
    than one that is not; of two that are alike in this, the one of higher loss."""
    return (new[1] & ~old[1]) | ((new[1] == old[1]) & (new[0] > old[0]))


def where(condition, new, old):
    """A tuple of [B, ...]: for each sample those of `new` or `old`, as condition [B] says."""
    return tuple(torch.where(per_sample(condition, a), a, b) for a, b in zip(new, old, strict=True))


def likeliest_others(logits, y, count):
    """int64 [B, T]: the T = min(count, C - 1) likeliest classes other than y, likeliest first."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1)).indices
