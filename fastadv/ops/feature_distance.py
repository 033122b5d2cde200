"""feature_distance: how far a student's features are from a teacher's, per sample.

    mse: mean (s - t)^2;  l2: ||s - t||;  cosine: 1 - <s, t> / (||s|| ||t||)

student s, teacher t: [B, ...] of one shape; loss: [B], float32 where they are halves.
Differentiable in both.
"""

import torch

from . import _native, reference
from ._library import FLOATS, define, expect, expect_tensors, gradients_from_forward


def _check(student, teacher, distance, student_grad, teacher_grad):
    if student.dim() == 0:
        raise ValueError("student has no batch dimension, must be [B, ...]")
    if student.dtype not in FLOATS:
        raise TypeError(f"student is {student.dtype}, must be one of {FLOATS}")
    expect("teacher", teacher, dtype=student.dtype, like=student, shape=student.shape)
    if distance not in _native.DISTANCES:
        raise ValueError(f"distance is {distance!r}, must be 'mse', 'l2' or 'cosine'")


def _cpu(student, teacher, distance, student_grad, teacher_grad):
    mixed = not _native.same_layout(student, teacher)
    if student.dtype == torch.float64 or not _native.is_dense(student) or (mixed and teacher_grad):
        return reference.feature_distance(student, teacher, distance, student_grad, teacher_grad)
    if mixed:
        teacher = torch.empty_like(student).copy_(teacher)
    loss = _native.empty(student.shape[:1], student, torch.float32)
    grads = [
        _native.empty_like(tensor) if wanted else _native.empty((0,), tensor)
        for tensor, wanted in ((student, student_grad), (teacher, teacher_grad))
    ]
    _native.feature_distance(loss, *grads, student, teacher, distance)
    return loss, *grads


def _fake(student, teacher, distance, student_grad, teacher_grad):
    _check(student, teacher, distance, student_grad, teacher_grad)
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (
        student.new_empty(student.shape[:1], dtype=dtype),
        torch.empty_like(student) if student_grad else student.new_empty(0),
        torch.empty_like(teacher) if teacher_grad else teacher.new_empty(0),
    )


_feature_distance = define(
    "feature_distance(Tensor student, Tensor teacher, str distance, bool student_grad, "
    "bool teacher_grad) -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference.feature_distance,
    native=_cpu,
    kernel="feature_distance",
    fake=_fake,
)
gradients_from_forward(_feature_distance, inputs=(0, 1))


def feature_distance(student, teacher, distance="mse"):
    """The distance of each sample's features as [B], over all its elements.

    student, teacher: float32, bfloat16 or float16 [B, ...] of one shape and dtype; strides may
    differ (float64 runs as plain torch). distance: "mse", "l2" or "cosine". The result is float32
    for halves. The gradient goes to whichever requires it; it is 0 for cosine where a vector's
    norm is at most 1e-12 (its distance is then 1), and for l2 up to a distance of 1e-30. A NaN
    stays in its sample. Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(student=student, teacher=teacher)
    wanted = [t.requires_grad and torch.is_grad_enabled() for t in (student, teacher)]
    return _feature_distance(student, teacher, distance, *wanted)[0]
