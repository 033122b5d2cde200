"""feature_distance: how far a student's features are from a teacher's, per sample.

    mse: mean (s - t)^2;  l2: ||s - t||;  cosine: 1 - <s, t> / (||s|| ||t||)

student s, teacher t: [B, ...] of one shape; loss: [B], float32 where they are halves.
Differentiable in both.
"""

import math

import torch

from . import _native
from ._library import FLOATS, define, expect, expect_tensors, gradients_from_forward
from ._reference import at_least_fp32, flat, l2_norm, per_sample


def _check(student, teacher, distance, student_grad, teacher_grad):
    if student.dim() == 0:
        raise ValueError("student_features has no batch dimension, must be [B, ...]")
    if student.dtype not in FLOATS:
        raise TypeError(f"student_features is {student.dtype}, must be one of {FLOATS}")
    expect("teacher_features", teacher, dtype=student.dtype, like=student, shape=student.shape)
    if distance not in ("mse", "l2", "cosine"):
        raise ValueError(f"distance is {distance!r}, must be 'mse', 'l2' or 'cosine'")


def reference(student, teacher, distance, student_grad, teacher_grad):
    """mse: mean (s - t)^2; l2: ||s - t||; cosine: 1 - <s, t> / (||s|| ||t||) [B], and gradients.

    student, teacher: [B, ...]. cosine is 1 with gradient 0 where a norm is at most 1e-12; l2 has
    gradient 0 up to a distance of 1e-30.
    """
    s, t = at_least_fp32(student), at_least_fp32(teacher)
    if distance == "mse":
        scale = 2 / max(math.prod(s.shape[1:]), 1)
        loss, grads = flat((s - t).square()).mean(dim=1), ((s - t) * scale, (t - s) * scale)
    elif distance == "l2":
        loss = l2_norm(s - t).to(s.dtype)
        norm = per_sample(torch.where(loss <= 1e-30, math.inf, loss), s)
        grads = (s - t) / norm, (t - s) / norm
    else:
        loss, grads = _cosine_distance(s, t)
    student_grad, teacher_grad = (
        gradient.to(tensor.dtype) if wanted else tensor.new_empty(0)
        for gradient, tensor, wanted in zip(
            grads, (student, teacher), (student_grad, teacher_grad), strict=True
        )
    )
    return loss, student_grad, teacher_grad


def _cosine_distance(s, t):
    """(loss, gradients) over unit vectors u, v; a vector without direction has norm infinity."""
    norms = (l2_norm(v).to(v.dtype) for v in (s, t))
    s_norm, t_norm = (per_sample(torch.where(n <= 1e-12, math.inf, n), s) for n in norms)
    u, v = s / s_norm, t / t_norm
    similarity = flat(u * v).sum(dim=1)
    c = per_sample(similarity, s)
    return 1 - similarity, ((u * c - v) / s_norm, (v * c - u) / t_norm)


def _cpu(student, teacher, distance, student_grad, teacher_grad):
    mixed = not _native.same_layout(student, teacher)
    if student.dtype == torch.float64 or not _native.is_dense(student) or (mixed and teacher_grad):
        return reference(student, teacher, distance, student_grad, teacher_grad)
    if mixed:
        teacher = torch.empty_like(student).copy_(teacher)
    (batch, *_), dtype, cpu = student.shape, student.dtype, _native.CPU
    loss = _native.empty((batch,), student, torch.float32)
    wanted = (student, student_grad), (teacher, teacher_grad)
    grads = [_native.empty_like(tensor) if asked else None for tensor, asked in wanted]
    _native.run(
        "feature_distance",
        cpu,
        *_native.contiguous(cpu, torch.float32, loss=loss),
        *_native.addresses(cpu, dtype, student_grad=grads[0], teacher_grad=grads[1]),
        *_native.in_one_layout(cpu, dtype, student=student, teacher=teacher),
        batch,
        student.numel() // max(batch, 1),
        distance,
        _native.DTYPES[dtype],
    )
    return loss, *(_native.empty((0,), student) if grad is None else grad for grad in grads)


def _triton():
    from ..kernels.feature_distance import feature_distance

    return feature_distance


def _fake(student, teacher, distance, student_grad, teacher_grad):
    _check(student, teacher, distance, student_grad, teacher_grad)
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (
        student.new_empty(student.shape[:1], dtype=dtype),
        torch.empty_like(student) if student_grad else student.new_empty(0),
        torch.empty_like(teacher) if teacher_grad else teacher.new_empty(0),
    )


_feature_distance = define(
    "feature_distance(Tensor student_features, Tensor teacher_features, str distance, "
    "bool student_grad, bool teacher_grad) -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference,
    native=_cpu,
    triton=_triton,
    fake=_fake,
)
gradients_from_forward(_feature_distance, inputs=(0, 1))


def feature_distance(student_features, teacher_features, distance="mse"):
    """The distance of each sample's features as [B], over all its elements.

    student_features, teacher_features: float32, bfloat16 or float16 [B, ...] of one shape and
    dtype; strides may differ (float64 runs as plain torch). distance: "mse", "l2" or "cosine". The
    result is float32 for halves. The gradient goes to whichever requires it; it is 0 for cosine
    where a vector's norm is at most 1e-12 (its distance is then 1), and for l2 up to a distance of
    1e-30. A NaN stays in its sample.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(student_features=student_features, teacher_features=teacher_features)
    features = student_features, teacher_features
    wanted = [t.requires_grad and torch.is_grad_enabled() for t in features]
    return _feature_distance(*features, distance, *wanted)[0]
