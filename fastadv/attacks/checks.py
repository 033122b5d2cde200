"""The checks of an attack's arguments, when the attack is made and once per call. Every message
names the argument, its value and the values that are allowed."""

import contextlib
import math
import numbers
from collections.abc import Iterable

import torch
from torch import nn

from ..engine.frozen import refresh
from ..engine.query import ask, evaluating
from ..ops._logits import INTEGERS, wide

ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}  # of `torch.linalg.vector_norm`
NORMS = tuple(ORDERS)


def described(value):
    """A wrong argument in a few words, for a message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if value is None or isinstance(value, (str, numbers.Number)):
        return repr(value)
    return f"a {type(value).__name__}"


def one_of(name, value, choices):
    """Raises ValueError unless the value is one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        given = repr(value) if isinstance(value, str) else described(value)
        raise ValueError(f"{name} is {given}, must be one of {', '.join(choices)}")


def number(name, value):
    """A real number, or a tensor of one, as a float. Raises TypeError for others."""
    one = value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
    if isinstance(one, bool) or not isinstance(one, numbers.Real):
        raise TypeError(f"{name} is {described(value)}, must be a number")
    return float(one)


def whole(name, value, least):
    """A whole number as an int. Raises TypeError for others, ValueError below `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {described(value)}, must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}, must be at least {least}")
    return int(value)


def positive(name, value):
    """A positive, finite number as a float. Raises TypeError for others than numbers, ValueError
    for other numbers."""
    one = number(name, value)
    if not 0 < one < math.inf:
        raise ValueError(f"{name} is {one}, must be positive and finite")
    return one


def listed(name, value, kind):
    """An iterable as a list; kind: of its items, for the message. Raises TypeError for text and for
    a value that cannot be iterated over."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {described(value)}, must be a list of {kind}")
    return list(value)


def check_budget(attack, per_sample=False):
    """Checks the attack's norm, box and radius, and makes its lo, hi and eps floats. per_sample:
    whether eps may also be one radius per sample, a tensor [B] or [B, 1, ...], which becomes a copy
    [B]. Raises ValueError or TypeError."""
    one_of("norm", attack.norm, NORMS)
    check_box(attack)
    eps, extremes = attack.eps, [attack.eps]
    if isinstance(eps, torch.Tensor) and eps.dim():
        if not per_sample or eps.is_complex() or eps.dtype == torch.bool:
            kind = "a real number" if per_sample else f"one number for {type(attack).__name__}"
            raise TypeError(f"eps is {described(eps)} of {eps.dtype}, must be {kind}")
        if eps.numel() != len(eps):
            raise ValueError(f"eps has shape {tuple(eps.shape)}, must be [B] or [B, 1, ...]")
        extremes = [value.item() for value in (eps.aminmax() if len(eps) else ())]
        attack.eps = eps.detach().reshape(-1).clone()
    else:
        attack.eps = number("eps", eps)
    room = attack.hi - attack.lo
    for value in extremes:
        check_radius(value, attack.norm, room if math.isfinite(room) else 1.0)


def check_box(attack):
    """Makes the attack's lo and hi floats. Raises ValueError unless lo < hi, TypeError for others
    than numbers."""
    attack.lo, attack.hi = number("lo", attack.lo), number("hi", attack.hi)
    if not attack.lo < attack.hi:
        raise ValueError(f"lo is {attack.lo}, must be below hi, {attack.hi}")


def check_radius(eps, norm, room=1.0, zero=True):
    """Raises ValueError unless the radius makes sense; room: the largest that linf allows; zero:
    whether it may be 0."""
    least = eps >= 0 if zero else eps > 0
    if norm == "linf" and not (least and eps <= room):
        hint = f" (did you mean {eps}/255?)" if eps > room else ""
        raise ValueError(f"eps is {eps}, must be in {'[' if zero else '('}0, {room}]{hint}")
    if not (least and eps < math.inf):
        raise ValueError(f"eps is {eps}, must be {'at least 0' if zero else 'positive'} and finite")


def radii(eps, x):
    """An attack's eps for x [B, ...]: a float stays a float, one radius per sample becomes [B] in
    the dtype of x and on its device. Raises ValueError for a batch of another size."""
    if not isinstance(eps, torch.Tensor):
        return eps
    if len(eps) != len(x):
        raise ValueError(f"eps has {len(eps)} values, must have {len(x)}, one per image of x")
    return eps.to(x)


def largest(eps):
    """The largest of an attack's radii."""
    if not isinstance(eps, torch.Tensor):
        return eps
    return eps.max().item() if eps.numel() else 0.0


def repeated(eps, times):
    """The radii of a batch that is repeated, eps being that of the batch, see `radii`."""
    return eps.repeat(times) if isinstance(eps, torch.Tensor) else eps


def rows_of(eps, rows):
    """The radii of some rows of a batch, eps being that of the whole batch, see `radii`."""
    return eps[rows] if isinstance(eps, torch.Tensor) else eps


def check_model(model, name="model"):
    """Raises TypeError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} is {described(model)}, must be a torch.nn.Module")


def check_tensor(name, value, like=None):
    """Raises TypeError unless the value is a tensor, and ValueError unless it is on the device of
    `like`, another tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {described(value)}, must be a tensor")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, must be on {like.device}")


def check_images(x, lo, hi):
    """Raises TypeError or ValueError unless x is float32 or float64 [B, ...] within [lo, hi]."""
    check_tensor("x", x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}, must be torch.float32 or torch.float64")
    if not x.dim():
        raise ValueError("x has shape (), must be [B, ...]")
    if x.numel() == 0:
        return
    least, most = (v.item() for v in x.aminmax())
    if not (least >= lo and most <= hi):
        raise ValueError(
            f"x is in [{least:.4g}, {most:.4g}], must be in [{lo}, {hi}]: the model "
            "normalises, not its caller"
        )


def as_labels(y, x, name="y"):
    """The labels of x [B, ...], of any integer type, as int64 [B]; their range is left to
    `check_labels`. Raises TypeError or ValueError for others."""
    check_tensor(name, y, like=x)
    if y.dtype not in INTEGERS or y.shape != x.shape[:1]:
        raise ValueError(
            f"{name} is {y.dtype} {tuple(y.shape)}, must be torch.int64 ({len(x)},) for x of shape "
            f"{tuple(x.shape)}, which is taken for [B, ...]"
        )
    return y.long()


def as_index(index, x):
    """The dataset ids of x [B, ...], of any integer type, as int64 [B]. Raises TypeError or
    ValueError for others."""
    check_tensor("index", index, like=x)
    if index.shape != x.shape[:1]:
        raise ValueError(f"index has shape {tuple(index.shape)}, must be ({len(x)},)")
    if index.dtype not in INTEGERS:
        raise TypeError(f"index is {index.dtype}, must be torch.int64")
    return index.long()


def check_labels(y, classes, name="y"):
    """Raises ValueError unless 0 <= y < classes for all labels y, int64 [B]."""
    if y.numel() and not (y.min() >= 0 and y.max() < classes):
        ends = f"{y.min()} to {y.max()}"
        raise ValueError(f"{name} has labels from {ends}, must be in [0, {classes - 1}]")


def check_logits(logits, batch, soft=False):
    """Raises ValueError or TypeError unless a model returned logits [B, C]: two classes or more,
    finite, and not probabilities unless `soft`. batch: B."""
    if logits.dim() != 2 or logits.shape[0] != batch:
        raise ValueError(f"model returned shape {tuple(logits.shape)}, must be ({batch}, classes)")
    if logits.shape[1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, must be [B, C], C >= 2")
    if not logits.is_floating_point():
        raise TypeError(f"model returned {logits.dtype}, must return logits in floating point")
    values = logits.detach()
    if not values.isfinite().all():
        raise ValueError("model returned NaN or infinite logits")
    if not soft and probabilities(values):
        raise ValueError("model returned probabilities, must return logits: remove its softmax")


@torch.no_grad()
def checked_logits(model, x, y):
    """The logits [B, C] of x. Raises ValueError or TypeError if they or the labels are wrong."""
    logits = ask(model, x)
    check_logits(logits, len(x))
    check_labels(y, logits.shape[1])
    return logits


def probabilities(logits):
    """Whether logits [B, C], C >= 2, look like the output of a softmax."""
    rounding = max(1e-3, torch.finfo(logits.dtype).eps)
    sums_to_one = (wide(logits).sum(1) - 1).abs().max() < rounding
    return bool(sums_to_one and logits.min() >= 0)


def check_call(attack, model, x, y, index):
    """Checks the arguments of an attack's call and returns (y, index), int64 [B] each; an index of
    None becomes 0, 1, 2, ..."""
    check_model(model)
    check_images(x, attack.lo, attack.hi)
    y = as_labels(y, x)
    if index is None:
        return y, torch.arange(len(x), device=x.device)
    return y, as_index(index, x)


@contextlib.contextmanager
def under_attack(model, x, y):
    """The context of one attack, in which the model is in eval mode and, if it is a twin, up to
    date. Yields the checked logits [B, C] of x."""
    refresh(model)
    with evaluating(model):
        yield checked_logits(model, x, y)
