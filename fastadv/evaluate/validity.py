"""Signs that a robust accuracy cannot be trusted, as sentences for the report.

The signs are those of Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (1902.06705) and
AutoAttack's own checks (Croce & Hein 2020, 2003.01690).
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..attacks import checks, suite
from ..attacks.pgd import input_gradient
from ..engine.query import ask, evaluating
from ..errors import UsageError, values_from_user
from ..ops._logits import wide
from .search import Counted

TINY = torch.finfo(torch.float32).tiny
MARGIN = 0.002  # by how much of all images a weaker attack may beat a stronger one


class LogProbabilities(nn.Module):
    """The logits of a network that returns probabilities: their logarithms, finite."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return wide(ask(self.net, x)).clamp_min(TINY).log()


def probe(model, x, y, stages):
    """(network to attack, stages that can attack it, warnings) from a first batch of images.

    x: float32 or float64 [B, ...] in [0, 1]; y: integers [B]. Raises ValueError for no images, a
    model that fails, fewer than two classes, labels out of range, logits that are not finite, and
    when no attack is left; TypeError naming the argument of a wrong kind.
    """
    checks.check_model(model)
    checks.check_images(x, 0.0, 1.0)
    y, stages = checks.as_labels(y, x), suite.made(stages)
    if not len(x):
        raise ValueError("x has no images, must have one at least")
    training = any(module.training for module in model.modules())
    with values_from_user(), evaluating(model), torch.no_grad():
        logits, again, alone = (Counted(model)(v) for v in (x, x, x[:1]))
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        given = tuple(logits.shape)
        raise UsageError(f"model returned {given}, must be logits [{len(x)}, 2 or more]")
    with values_from_user():
        checks.check_logits(logits, len(x), soft=True)
    checks.check_labels(y, logits.shape[1])
    found = ["the model was in train mode: it is evaluated in eval mode"] if training else []
    found += _unsteady(logits, again, alone, any(stage.averages for stage in stages))
    if checks.probabilities(logits):
        found.append("the model returns probabilities: their logarithms were attacked as logits")
        model = LogProbabilities(model).eval()
    differentiable, warnings = _gradients(model, x, y, logits.argmax(1) == y)
    found += warnings
    fit = []
    for stage in stages:
        if stage.classes > logits.shape[1]:
            needs = f"needs {stage.classes} classes, not {logits.shape[1]}"
        elif stage.by_gradient and not differentiable:
            needs = "needs a gradient"
        else:
            fit.append(stage)
            continue
        found.append(f"{stage.name} left out: {needs}")
    if not fit:
        raise UsageError(f"no attack is left: {'; '.join(found)}")
    left = {stage.name for stage in fit}
    return model, [stage.among(left) for stage in fit], found


def _unsteady(logits, again, alone, averaged):
    """Warnings on logits [B, C] that differ in a second pass, or from those of the first image by
    itself, `alone` [1, C], beyond rounding. averaged: whether an attack averages over passes."""
    scale = logits.abs().max().item()
    apart = (logits - again).abs().max().item()
    if apart > 1e-4 * scale and averaged:
        return []
    if apart > 1e-4 * scale:
        return [
            f"randomised forward pass: two passes of the same images differ by up to {apart:.3g}; "
            "the attacks do not average over its randomness and so overestimate its robustness; "
            "aa-rand does"
        ]
    found = []
    if averaged:
        found.append(
            "the forward pass is not random: aa-rand averages equal passes, and has fewer attacks "
            "than aa"
        )
    apart = (logits[:1] - alone).abs().max().item()
    if apart > 1e-2 * scale:
        found.append(f"an image's logits depend on the rest of its batch, by {apart:.3g} and more")
    return found


def _gradients(model, x, y, right):
    """(whether the model has a gradient to its input, warnings) of the cross-entropy at the images
    that are classified right."""

    def inner(v):
        return F.cross_entropy(wide(ask(model, v)), y, reduction="none")

    try:
        with evaluating(model):
            grad = input_gradient(inner, x).flatten(1)[right]
    except RuntimeError as error:
        return False, [f"the model has no gradient to its input: {error}"]
    bad, zero = (int(rows.sum()) for rows in (~grad.isfinite().all(1), (grad == 0).all(1)))
    found = []
    if bad:
        found.append(f"gradients with NaN or infinity at {bad} of {len(grad)} images")
    if zero:
        found.append(
            f"zero gradient of the cross-entropy at {zero} of {len(grad)} images: attacks that "
            "follow it do not move there"
        )
    return True, found


def review(record, stages):
    """Warnings on the outcome of the attacks of a complete record."""
    found = []
    for stage in stages:
        cost = record.costs[stage.name]
        if cost.bad_gradients:
            found.append(f"{stage.name} met {cost.bad_gradients} gradients with NaN or infinity")
        if cost.invalid:
            found.append(
                f"{stage.name} left the ball or the box at {cost.invalid} images, which do not "
                "count as broken"
            )
    robust = {stage.name: record.right(stage.name).sum().item() for stage in stages}
    margin = max(MARGIN * record.count, 1)
    followed = [stage for stage in stages if stage.by_gradient]
    if not followed:
        return found
    best = min(followed, key=lambda stage: robust[stage.name])
    for stage in stages:
        blind = not (stage.by_gradient or stage.fixed)
        if blind and robust[stage.name] < robust[best.name] - margin:
            found.append(
                f"{stage.name}, which does not follow the model's gradient, breaks "
                f"{robust[best.name] - robust[stage.name]} images more than the attacks that do "
                f"({best.name}): the gradients are probably masked"
            )
    if "fgsm" in robust and "pgd20" in robust and robust["fgsm"] < robust["pgd20"] - margin:
        found.append("one step (fgsm) breaks more images than 20 (pgd20): a masked gradient")
    return found
