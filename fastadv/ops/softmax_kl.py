"""softmax_kl: KL divergence of two softmaxes from raw logits, with its gradients in the same pass.

    p = softmax(student / T), q = softmax(teacher / T), KL_i = sum_c q_c (log q_c - log p_c)
    loss = w_i KL_i ("none"), the sum ("sum"), sum / B ("batchmean") or sum / (B C) ("mean")
    d/ds = w (p - q) / T,  d/dt = w q (log q - log p - KL_i) / T,  d/dw = KL_i,  all / B or / (B C)

student, teacher: [B, C]; weight: [B] or None; gradients: contiguous, each in its input's dtype.
"""

import torch

from . import _native, reference
from ._library import FLOATS, define, expect, gradients_from_forward


def _check(student, teacher, weight, temperature, reduction, *wanted):
    shape, dtype = student.shape, student.dtype
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"student has shape {tuple(shape)}, must be [B, C] with C > 0")
    if dtype not in FLOATS:
        raise TypeError(f"student is {dtype}, must be a floating point type")
    expect("teacher", teacher, dtype=dtype, like=student, shape=shape)
    if weight is not None:
        expect("weight", weight, dtype=reference.loss_dtype(dtype), like=student, shape=shape[:1])
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be positive and finite")
    if reduction not in reference.REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, must be in {reference.REDUCTIONS}")


def _outputs(student, teacher, weight, temperature, reduction, *wanted):
    """Memory for (loss, grad_student, grad_teacher, grad_weight); [0] for what is not wanted."""
    shape, dtype = student.shape, reference.loss_dtype(student.dtype)
    shapes = (shape, student.dtype), (shape, student.dtype), (shape[:1], dtype)
    loss = _native.empty(shape[:1] if reduction == "none" else (), student, dtype)
    return loss, *[
        _native.empty(shape, student, dtype) if want else student.new_empty(0, dtype=dtype)
        for want, (shape, dtype) in zip(wanted, shapes, strict=True)
    ]


def _fake(*args):
    _check(*args)
    return _outputs(*args)


def _rows(logits):
    """The logits with unit stride along classes; a slice of a wider tensor is taken as it is."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _compiled(student, teacher, weight, temperature, reduction, *wanted):
    if student.dtype == torch.float64:
        return reference.softmax_kl(student, teacher, weight, temperature, reduction, *wanted)
    outputs = _outputs(student, teacher, weight, temperature, reduction, *wanted)
    _native.softmax_kl(
        *outputs,
        _rows(student),
        _rows(teacher),
        None if weight is None else weight.contiguous(),
        temperature,
        reference.reduction_factor(reduction, student.shape),
        reduction != "none",
    )
    return outputs


def _cuda(student, teacher, weight, temperature, reduction, *wanted):
    """A thread of the CUDA kernel has a row, and one block of threads all that are summed up."""
    few = student.shape[1] <= 64 and (reduction == "none" or student.numel() <= 16384)
    return few and student.dtype in _native.DTYPES


_softmax_kl = define(
    "softmax_kl(Tensor student, Tensor teacher, Tensor? weight, float temperature, str reduction, "
    "bool student_grad, bool teacher_grad, bool weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference.softmax_kl,
    native=_compiled,
    kernel="softmax_kl",
    cuda=_cuda,
    fake=_fake,
)
gradients_from_forward(_softmax_kl, inputs=(0, 1, 2))


def softmax_kl(
    student,
    teacher,
    weight=None,
    temperature=1.0,
    reduction="batchmean",
    student_grad=False,
    teacher_grad=False,
    weight_grad=False,
):
    """(loss, grad_student, grad_teacher, grad_weight) of KL(teacher || student) in one call.

    The op under `losses.kl`, which has the arguments, errors and edge cases; of use alone where
    the gradient of the logits is wanted without autograd. A gradient not asked for is empty, [0].
    """
    return _softmax_kl(
        student, teacher, weight, temperature, reduction, student_grad, teacher_grad, weight_grad
    )
