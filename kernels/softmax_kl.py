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
from .rows import LOG2_E, product, reciprocal, tiling

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32


@triton.jit
def _centre(mean):
    """The first D; 0 where it is infinite or NaN, which the rest then is too."""
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def tile_kernel(
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
    """ROWS rows of C <= BLOCK classes. student, teacher: [batch, C], any float, strides of rows in
    elements; weight, loss, grad_weight: fp32 [batch]; grad_*: [batch, C], dense; None is absent.

    C and the strides are constants, so that 128-bit accesses are possible at C = 1000.
    """
    temperature = tl.cast(temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    at = row[:, None]
    inside = (at < batch) & (column < C)
    s = tl.load(student + at * STUDENT_STRIDE + column, inside, -float("inf")).to(tl.float32)
    t = tl.load(teacher + at * TEACHER_STRIDE + column, inside, -float("inf")).to(tl.float32)
    s -= tl.max(s, 1)[:, None]
    t -= tl.max(t, 1)[:, None]
    p, q = tl.exp2(s * per_t), tl.exp2(t * per_t)
    p_sum, q_sum = tl.sum(p, 1), tl.sum(q, 1)
    p *= reciprocal(p_sum)[:, None]
    q *= reciprocal(q_sum)[:, None]
    centre = _centre(tl.sum(product(q, t - s), 1))
    gap = t - s - centre[:, None]
    rest = tl.sum(product(q, gap), 1)
    kl = (centre + rest) / temperature + tl.log(p_sum / q_sum)
    scale = tl.full([ROWS], factor, tl.float32)
    if grad_weight is not None:
        tl.store(grad_weight + row, kl * scale, row < batch)
    if weight is not None:
        scale *= tl.load(weight + row, row < batch, 0.0)
    tl.store(loss + row, kl * scale, row < batch)
    scale = (scale / temperature)[:, None]
    if grad_student is not None:
        tl.store(grad_student + at * C + column, (p - q) * scale, inside)
    if grad_teacher is not None:
        scale /= temperature
        to_teacher = product(q, gap - rest[:, None]) * scale
        tl.store(grad_teacher + at * C + column, to_teacher, inside)


@triton.jit
def _online(logits, at, C, top, total, per_t):
    """The running (max, sum of exp((logit - max) / T)) with one more block."""
    v = tl.load(logits + at, at < C, -float("inf")).to(tl.float32)
    higher = tl.maximum(top, tl.max(v, 0))
    total *= tl.exp2((top - higher) * per_t)
    return higher, total + tl.sum(tl.exp2((v - higher) * per_t), 0)


@triton.jit
def _block(student, teacher, at, C, s_max, t_max, p_scale, q_scale, per_t):
    """(p, q, gap) of one block."""
    s = tl.load(student + at, at < C, -float("inf")).to(tl.float32) - s_max
    t = tl.load(teacher + at, at < C, -float("inf")).to(tl.float32) - t_max
    return tl.exp2(s * per_t) * p_scale, tl.exp2(t * per_t) * q_scale, t - s


@triton.jit
def loop_kernel(
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
    """One row of any width, in passes: normalisers, centre, KL and d/dstudent, d/dteacher.

    Arguments as for tile_kernel; ROWS is 1.
    """
    temperature = tl.cast(temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    student += row * STUDENT_STRIDE
    teacher += row * TEACHER_STRIDE
    columns = tl.arange(0, BLOCK)

    s_max = tl.cast(LOWEST, tl.float32)  # not -inf: a first block may hold masked classes only
    t_max = s_max
    p_sum = tl.cast(0.0, tl.float32)
    q_sum = p_sum
    for first in tl.range(0, C, BLOCK):
        at = first + columns
        s_max, p_sum = _online(student, at, C, s_max, p_sum, per_t)
        t_max, q_sum = _online(teacher, at, C, t_max, q_sum, per_t)
    p_scale, q_scale = reciprocal(p_sum), reciprocal(q_sum)

    row_scale = tl.cast(factor, tl.float32)
    if weight is not None:
        row_scale *= tl.load(weight + row)
    scale = row_scale / temperature
    terms = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        at = first + columns
        _, q, gap = _block(student, teacher, at, C, s_max, t_max, p_scale, q_scale, per_t)
        terms += product(q, gap)
    centre = _centre(tl.sum(terms, 0))

    terms = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        at = first + columns
        p, q, gap = _block(student, teacher, at, C, s_max, t_max, p_scale, q_scale, per_t)
        terms += product(q, gap - centre)
        if grad_student is not None:
            tl.store(grad_student + row * C + at, (p - q) * scale, at < C)
    rest = tl.sum(terms, 0)
    kl = (centre + rest) / temperature + tl.log(p_sum / q_sum)
    tl.store(loss + row, kl * row_scale)
    if grad_weight is not None:
        tl.store(grad_weight + row, kl * factor)

    if grad_teacher is not None:
        scale /= temperature
        for first in tl.range(0, C, BLOCK):
            at = first + columns
            _, q, gap = _block(student, teacher, at, C, s_max, t_max, p_scale, q_scale, per_t)
            tl.store(grad_teacher + row * C + at, product(q, gap - centre - rest) * scale, at < C)


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
    kernel = tile_kernel if classes <= config["BLOCK"] else loop_kernel
    with torch.cuda.device_of(student):
        kernel[(triton.cdiv(batch, config["ROWS"]),)](
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
