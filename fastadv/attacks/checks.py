"""What an attack makes sure of once per call. Every message names the argument."""

import contextlib
import warnings

import torch

from ..frozen import refresh


def check_budget(eps, step_size, norm, lo, hi):
    """Refuses eps in the wrong unit and warns of a step beyond the ball."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}, must be 'linf' or 'l2'")
    if not eps >= 0 or (norm == "linf" and eps > hi - lo):
        raise ValueError(f"eps is {eps}, must be in [0, {hi - lo}] (did you mean {eps}/255?)")
    if not step_size > 0 and eps > 0:
        raise ValueError(f"step_size is {step_size}, must be positive")
    if step_size > eps:
        warnings.warn(
            f"step_size {step_size:.5g} is larger than eps {eps:.5g}: are they swapped?",
            stacklevel=4,
        )


def check_images(x, lo, hi):
    """x: float32 [B, ...] within [lo, hi]."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}, must be torch.float32")
    if x.numel() == 0:
        return
    least, most = (v.item() for v in x.aminmax())
    if not (least >= lo and most <= hi):
        raise ValueError(
            f"x is in [{least:.4g}, {most:.4g}], must be in [{lo}, {hi}]: the model "
            "normalises, not its caller"
        )


def check_labels(y, shape):
    """y: int64 [B] with 0 <= y < C for logits of this shape, (B, C)."""
    batch, classes = shape
    if y.dtype != torch.int64 or y.shape != (batch,):
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)}, must be torch.int64 ({batch},)")
    if y.numel() and not (y.min() >= 0 and y.max() < classes):
        raise ValueError(f"y has labels from {y.min()} to {y.max()}, must be in [0, {classes - 1}]")


def check_logits(logits, batch):
    """[B, C], finite, and not already probabilities."""
    if logits.dim() != 2 or logits.shape[0] != batch:
        raise ValueError(f"model returned shape {tuple(logits.shape)}, must be ({batch}, classes)")
    values = logits.detach()
    if not values.isfinite().all():
        raise ValueError("model returned NaN or infinite logits")
    if probabilities(values):
        raise ValueError("model returned probabilities, must return logits: remove its softmax")


@torch.no_grad()
def checked_logits(model, x, y):
    """The logits [B, C] of x, after a look at them and at the labels."""
    logits = model(x)
    check_logits(logits, len(x))
    check_labels(y, logits.shape)
    return logits


def probabilities(logits):
    """Whether [B, C] of two classes or more look like the outcome of a softmax."""
    sums_to_one = (logits.float().sum(1) - 1).abs().max() < 1e-3
    return bool(logits.shape[1] > 1 and sums_to_one and logits.min() >= 0)


@contextlib.contextmanager
def evaluating(model):
    """Every module of the model in eval mode, each put back as it was, also after an exception."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def attacked(model, x, y, index, lo, hi):
    """(logits [B, C] of x, index [B], in order where None is given), after a look at everything;
    within it the model is in eval mode, and a twin up to date."""
    check_images(x, lo, hi)
    if index is None:
        index = torch.arange(len(x), device=x.device)
    elif index.shape != x.shape[:1]:
        raise ValueError(f"index has shape {tuple(index.shape)}, must be ({len(x)},)")
    refresh(model)
    with evaluating(model):
        yield checked_logits(model, x, y), index
