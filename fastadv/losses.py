"""Losses over the ops: reductions, temperatures and the names the papers use."""

import torch

from . import ops


def margin(logits, y, kappa=None, reduction="none"):
    """max_{c != y} z_c - z_y, the CW objective that an attack ascends (Carlini & Wagner 2017, f6).

    logits [B, C], y int64 [B]; see `ops.margin`. kappa: None, or the confidence in logits at which
    a sample is left alone: min(margin - kappa, 0), which is -max(z_y - max_{c != y} z_c + kappa, 0)
    of the CW_inf evaluations (kappa = 50). reduction: "none" (the default, [B], for attacks),
    "mean" or "sum". Raises ValueError on another reduction.
    """
    loss = ops.margin(logits, y)
    if kappa is not None:
        loss = (loss - kappa).clamp(max=0)
    return _reduced(loss, reduction, "mean")


def feature(student_features, teacher_features, distance="mse", reduction="batchmean"):
    """The distance between features [B, ...], "mse", "l2" or "cosine"; see `ops.feature_distance`.

    reduction: "batchmean" (sum over samples / B), "none" ([B]) or "sum"; ValueError on another.
    The gradient goes to both, unless the teacher does not require it.
    """
    if distance == "mse" and student_features.dtype == torch.float16:
        # 2 (s - t) / D is subnormal in float16 before a loss scale reaches it.
        student_features, teacher_features = student_features.float(), teacher_features.float()
    loss = ops.feature_distance(student_features, teacher_features, distance)
    return _reduced(loss, reduction, "batchmean")


def _reduced(loss, reduction, mean):
    """loss [B], its "sum", or its mean by the name `mean`; an empty batch gives 0."""
    if reduction not in ("none", "sum", mean):
        raise ValueError(f"reduction is {reduction!r}, must be 'none', 'sum' or {mean!r}")
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(len(loss), 1)
