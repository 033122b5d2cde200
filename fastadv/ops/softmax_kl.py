"""softmax_kl: KL divergence of two softmaxes from raw logits, with its gradients in the same pass.

    p = softmax(student / T), q = softmax(teacher / T), KL_i = sum_c q_c (log q_c - log p_c)
    loss = w_i KL_i ("none"), the sum ("sum"), sum / B ("batchmean") or sum / (B C) ("mean")
    d/ds = w (p - q) / T,  d/dt = w q (log q - log p - KL_i) / T,  d/dw = KL_i,  all / B or / (B C)

student_logits, teacher_logits: [B, C]; weight: [B] or None; gradients: contiguous, each in its
input's dtype.
"""

import math

import torch
import torch.nn.functional as F

from ..kernels.host import reduction_factor
from . import _native
from ._library import FLOATS, define, expect, gradients_from_forward
from ._logits import loss_dtype, row_strided
from ._reference import at_least_fp32

REDUCTIONS = "none", "sum", "batchmean", "mean"


def _check(student, teacher, weight, temperature, reduction, *wanted):
    shape, dtype = student.shape, student.dtype
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"student_logits has shape {tuple(shape)}, must be [B, C] with C > 0")
    if dtype not in FLOATS:
        raise TypeError(f"student_logits is {dtype}, must be a floating point type")
    expect("teacher_logits", teacher, dtype=dtype, like=student, shape=shape)
    if weight is not None:
        expect("weight", weight, dtype=loss_dtype(dtype), like=student, shape=shape[:1])
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be positive and finite")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, must be in {REDUCTIONS}")


def reference(
    student, teacher, weight, temperature, reduction, student_grad, teacher_grad, weight_grad
):
    """KL_i = sum_c q_c (log q_c - log p_c) with p, q = softmax(student / T), softmax(teacher / T);
    d/ds = w (p - q) / T, d/dt = w q (log q - log p - KL_i) / T, d/dw = KL_i, each times the
    reduction's factor. student, teacher [B, C]; weight [B]. A class with q_c = 0 counts 0.
    """
    log_p, log_q = (
        F.log_softmax(at_least_fp32(v) / temperature, dim=1) for v in (student, teacher)
    )
    p, q = log_p.exp(), log_q.exp()
    difference = (log_q - log_p).masked_fill(q == 0, 0)
    kl = (q * difference).sum(dim=1)
    parts = {"none": 1, "sum": 1, "batchmean": len(kl), "mean": math.prod(student.shape)}[reduction]
    factor = 1 / max(parts, 1)
    weighted = kl if weight is None else weight * kl
    loss = weighted if reduction == "none" else (weighted * factor).sum()
    scale = torch.full_like(kl, factor / temperature) * (1 if weight is None else weight)
    slope = (q * (difference - kl[:, None])).masked_fill(q == 0, 0)
    gradients = (
        (student_grad, ((p - q) * scale[:, None]).to(student.dtype)),
        (teacher_grad, (slope * scale[:, None]).to(student.dtype)),
        (weight_grad, kl * factor),
    )
    return loss, *(g.contiguous() if wanted else g.new_empty(0) for wanted, g in gradients)


def _outputs(student, teacher, weight, temperature, reduction, *wanted):
    """Memory for (loss, grad_student, grad_teacher, grad_weight); [0] for one not wanted."""
    shape, dtype = student.shape, loss_dtype(student.dtype)
    shapes = (shape, student.dtype), (shape, student.dtype), (shape[:1], dtype)
    loss = _native.empty(shape[:1] if reduction == "none" else (), student, dtype)
    return loss, *[
        _native.empty(shape, student, dtype) if want else student.new_empty(0, dtype=dtype)
        for want, (shape, dtype) in zip(wanted, shapes, strict=True)
    ]


def _fake(*args):
    _check(*args)
    return _outputs(*args)


def _compiled(student, teacher, weight, temperature, reduction, *wanted):
    if student.dtype == torch.float64:
        return reference(student, teacher, weight, temperature, reduction, *wanted)
    outputs = _outputs(student, teacher, weight, temperature, reduction, *wanted)
    student, teacher = row_strided(student), row_strided(teacher)
    weight = weight if weight is None else weight.contiguous()
    dtype, device = student.dtype, student.get_device()
    _native.run(
        "softmax_kl",
        device,
        *(output.data_ptr() for output in outputs),
        *_native.addresses(device, dtype, student_logits=student, teacher_logits=teacher),
        *_native.contiguous(device, torch.float32, weight=weight),
        *student.shape,
        student.stride(0),
        teacher.stride(0),
        temperature,
        reduction_factor(reduction, student.shape),
        reduction != "none",
        _native.DTYPES[dtype],
    )
    return outputs


def _cuda(student, teacher, weight, temperature, reduction, *wanted):
    """A thread of the CUDA kernel has a row, and one block of threads all that are summed up."""
    few = student.shape[1] <= 64 and (reduction == "none" or student.numel() <= 16384)
    return few and student.dtype in _native.DTYPES


def _triton():
    from ..kernels.softmax_kl import softmax_kl

    return softmax_kl


_softmax_kl = define(
    "softmax_kl(Tensor student_logits, Tensor teacher_logits, Tensor? weight, float temperature, "
    "str reduction, bool student_grad, bool teacher_grad, bool weight_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference,
    native=_compiled,
    triton=_triton,
    cuda=_cuda,
    fake=_fake,
)
gradients_from_forward(_softmax_kl, inputs=(0, 1, 2))


def softmax_kl(
    student_logits,
    teacher_logits,
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
    logits, wanted = (student_logits, teacher_logits), (student_grad, teacher_grad, weight_grad)
    return _softmax_kl(*logits, weight, temperature, reduction, *wanted)
