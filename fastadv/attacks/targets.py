"""Targeted attacks: the class that each sample is to be taken for, and when it is."""

import torch

from .. import losses, ops
from . import checks
from .iterates import likeliest_others

NAMES = ("least-likely", "random", "second")


def check_target(target, y, x):
    """The target of a call: None, one of NAMES, or the classes of x [B, ...] as int64 [B].

    y: the labels, int64 [B]; None if they are not known, which goes with classes alone. Raises
    ValueError or TypeError for other targets and for one that is its sample's label.
    """
    if target is None:
        return None
    if isinstance(target, str):
        checks.one_of("target", target, NAMES)
        if y is None:
            raise ValueError(f"y is missing, which target={target!r} needs")
        return target
    target = checks.as_labels(target, x, "target")
    if y is not None and (same := target == y).any():
        row = same.nonzero()[0].item()
        raise ValueError(f"target is {target[row]} in row {row}, must be another class than y")
    return target


def named(target, model, x, y, index):
    """`classes` of a name, by the logits of a model in eval mode at x."""
    index = torch.arange(len(x), device=x.device) if index is None else checks.as_index(index, x)
    return classes(target, checks.checked_logits(model, x, y), y, index)


def classes(target, logits, y, index):
    """int64 [B], the target classes by a target from `check_target`.

    logits: [B, C] at x. "second" is the likeliest class other than y, "least-likely" the least
    likely one. "random" is any other class, each as likely as the next; the dataset ids `index`,
    int64 [B], and one seed from torch's CPU generator decide which. Raises ValueError for classes
    out of range.
    """
    if not isinstance(target, str):
        checks.check_labels(target, logits.shape[1], "target")
        return target
    others = logits.shape[1] - 1
    if target != "random":
        return likeliest_others(logits, y, 1 if target == "second" else others)[:, -1]
    middle = torch.full((len(y), 1), 0.5, device=y.device)
    chance = ops.random_start(middle, 0.5, index=index)[:, 0]  # in [0, 1), multiples of 2^-24
    drawn = (chance.double() * others).long()
    return drawn + (drawn >= y)


def reached(logits, y, target):
    """bool [B]: whether logits [B, C] give the class `target`; if that is None, another class than
    y. int64 [B] each."""
    given = logits.argmax(1)
    return given != y if target is None else given == target


# {name: (logits [B, C], y, target) -> [B]}, what an attack towards target classes maximises. "dlr"
# is equation 7 of Auto-PGD, the others are what an attack on the label `target` would minimise; of
# these "cw" is Carlini & Wagner's f6, up to a confidence of 50.
OBJECTIVES = {
    "ce": lambda logits, y, target: -losses.cross_entropy(logits, target, reduction="none"),
    "margin": lambda logits, y, target: -losses.margin(logits, target),
    "dlr": lambda logits, y, target: losses.dlr_targeted(logits, y, target),
    "cw": lambda logits, y, target: (-losses.margin(logits, target) - 50.0).clamp(max=0),
}
