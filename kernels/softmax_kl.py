"""softmax_kl in Triton: KL(teacher || student) of logits and its gradients in one pass.

    s, t: the logits less their row's maximum, gap = t - s, Z: sum_c exp(. / T)
    p = exp(s / T) / Zs, q = exp(t / T) / Zt, D = sum_c q_c gap_c
    KL_i = sum_c q_c (log q_c - log p_c) = D / T + log(Zs / Zt)
    d/dstudent = w (p - q) / T,  d/dteacher = w q (gap - D) / T^2,  d/dw = KL_i

each times the factor of the reduction. A class with q_c = 0 counts 0. Computed in fp32; D twice,
as a centre and as the mean of what is left over, because sum_c q_c is only nearly 1. No FMA
contraction: p - q would not be 0 where p is q.
"""

import torch
import triton
import triton.language as tl

from .host import reduction_factor
from .rows import LOG2_E, LOWEST, online, product, read, reciprocal, rows_of, tile, tiling


@triton.jit
def _softmaxes(s, t, s_top, t_top, p_scale, q_scale, per_t):
    """(p, q, gap) of one tile."""
    s, t = s - s_top[:, None], t - t_top[:, None]
    return tl.exp2(s * per_t) * p_scale[:, None], tl.exp2(t * per_t) * q_scale[:, None], t - s


@triton.jit
def softmax_kl_kernel(
    student,
    teacher,
    weight,
    loss,
    grad_student,
    grad_teacher,
    grad_weight,
    batch,
    temperature,
    per_t,
    factor,
    STUDENT_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows. student, teacher: [batch, C], any float, strides of rows in elements; weight,
    loss, grad_weight: fp32 [batch]; grad_*: [batch, C], dense; None is absent.

    C and the strides are constants, so that 128-bit accesses are possible at C = 1000.
    """
    temperature = tl.cast(temperature, tl.float32)
    row = rows_of(ROWS)
    s_top = tl.full([ROWS], LOWEST, tl.float32)  # not -inf: a first tile may hold masked classes
    t_top = s_top
    p_sum = tl.zeros([ROWS], tl.float32)
    q_sum = p_sum
    for first in tl.range(0, C, BLOCK):
        column, _, inside = tile(row, first, batch, C, BLOCK)
        s = read(student, row[:, None] * STUDENT_STRIDE + column, inside)
        t = read(teacher, row[:, None] * TEACHER_STRIDE + column, inside)
        s_top, p_sum = online(s, s_top, p_sum, per_t)
        t_top, q_sum = online(t, t_top, q_sum, per_t)
    p_scale, q_scale = reciprocal(p_sum), reciprocal(q_sum)

    terms = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        column, _, inside = tile(row, first, batch, C, BLOCK)
        s = read(student, row[:, None] * STUDENT_STRIDE + column, inside)
        t = read(teacher, row[:, None] * TEACHER_STRIDE + column, inside)
        _, q, gap = _softmaxes(s, t, s_top, t_top, p_scale, q_scale, per_t)
        terms += product(q, gap)
    centre = tl.sum(terms, 1)
    centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)  # else the rest is not finite

    terms = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        column, _, inside = tile(row, first, batch, C, BLOCK)
        s = read(student, row[:, None] * STUDENT_STRIDE + column, inside)
        t = read(teacher, row[:, None] * TEACHER_STRIDE + column, inside)
        _, q, gap = _softmaxes(s, t, s_top, t_top, p_scale, q_scale, per_t)
        terms += product(q, gap - centre[:, None])
    rest = tl.sum(terms, 1)

    kl = (centre + rest) / temperature + tl.log(p_sum / q_sum)
    scale = tl.full([ROWS], factor, tl.float32)
    if weight is not None:
        scale *= tl.load(weight + row, row < batch, 0.0)
    to_student = (scale / temperature)[:, None]
    to_teacher = to_student / temperature
    if grad_student is not None or grad_teacher is not None:
        for first in tl.range(0, C, BLOCK):
            column, at, inside = tile(row, first, batch, C, BLOCK)
            s = read(student, row[:, None] * STUDENT_STRIDE + column, inside)
            t = read(teacher, row[:, None] * TEACHER_STRIDE + column, inside)
            p, q, gap = _softmaxes(s, t, s_top, t_top, p_scale, q_scale, per_t)
            if grad_student is not None:
                tl.store(grad_student + at, (p - q) * to_student, inside)
            if grad_teacher is not None:
                slope = product(q, gap - centre[:, None] - rest[:, None])
                tl.store(grad_teacher + at, slope * to_teacher, inside)
    if grad_weight is not None:
        tl.store(grad_weight + row, kl * factor, row < batch)
    tl.store(loss + row, kl * scale, row < batch)


def softmax_kl(
    student, teacher, weight, temperature, reduction, student_grad, teacher_grad, weight_grad
):
    """(loss, grad_student, grad_teacher, grad_weight); one not asked for is an empty tensor [0].

    student, teacher: [B, C] fp32, fp16 or bf16; weight: fp32 [B] or None. loss: fp32, [B] for the
    reduction "none", else 0-dim: row losses are summed by torch in a fixed order.
    """
    batch, classes = student.shape
    student, teacher = (t if t.stride(1) == 1 else t.contiguous() for t in (student, teacher))
    factor = reduction_factor(reduction, student.shape)
    rows = torch.empty(batch, dtype=torch.float32, device=student.device)
    inputs = (student, student_grad), (teacher, teacher_grad), (rows, weight_grad)
    grads = [
        torch.empty(t.shape if asked else 0, dtype=t.dtype, device=t.device) for t, asked in inputs
    ]
    config = tiling(classes)
    with torch.cuda.device_of(student):
        softmax_kl_kernel[(triton.cdiv(batch, config["ROWS"]),)](
            student,
            teacher,
            None if weight is None else weight.contiguous(),
            rows,
            *(g if g.numel() else None for g in grads),
            batch,
            temperature,
            LOG2_E.value / temperature,
            factor,
            student.stride(0),
            teacher.stride(0),
            classes,
            **config,
            enable_fp_fusion=False,
        )
    return rows if reduction == "none" else rows.sum(), *grads
