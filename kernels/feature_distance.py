"""feature_distance in Triton: how far s is from t per sample, with both gradients.

    mse: mean (s - t)^2;  l2: ||s - t||;  d loss / d s = k (s - t), k = 2 / size or 1 / ||s - t||
    cosine: 1 - <s, t> / (||s|| ||t||);  d loss / d s = (<s, t> s - ||s||^2 t) / (||s||^3 ||t||)

A vector of norm <= 1e-12 has no direction: cosine 1, gradient 0. l2 has gradient 0 up to a distance
of 1e-30. Sums, and the cosine's gradient, whose terms cancel, are fp64.
"""

import math

import torch
import triton
import triton.language as tl

from .host import is_dense
from .rows import rows_of, tile, tiling


@triton.jit
def _pair(student, teacher, at, inside):
    """(s, t) of one tile in fp32."""
    s = tl.load(student + at, inside, 0.0).to(tl.float32)
    return s, tl.load(teacher + at, inside, 0.0).to(tl.float32)


@triton.jit
def difference_kernel(
    loss,
    student_grad,
    teacher_grad,
    student,
    teacher,
    batch,
    SIZE: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mse (MEAN) or l2 of ROWS samples. loss: fp32 [batch]; student, teacher: [batch, SIZE], any
    float, one element order; gradients: the same or None."""
    row = rows_of(ROWS)
    squares = tl.zeros([ROWS, BLOCK], tl.float64)
    for first in tl.range(0, SIZE, BLOCK):
        _, at, inside = tile(row, first, batch, SIZE, BLOCK)
        s, t = _pair(student, teacher, at, inside)
        squares += (s - t).to(tl.float64) * (s - t).to(tl.float64)
    total = tl.sum(squares, 1)
    if MEAN:
        value = total / SIZE
        scale = tl.full([ROWS], 2.0 / SIZE, tl.float32)
    else:
        value = tl.sqrt(total)
        scale = tl.where(value <= 1e-30, 0.0, 1.0 / value).to(tl.float32)
    for first in tl.range(0, SIZE, BLOCK):
        _, at, inside = tile(row, first, batch, SIZE, BLOCK)
        s, t = _pair(student, teacher, at, inside)
        gradient = (s - t) * scale[:, None]
        if student_grad is not None:
            tl.store(student_grad + at, gradient, inside)
        if teacher_grad is not None:
            tl.store(teacher_grad + at, -gradient, inside)
    tl.store(loss + row, value.to(tl.float32), row < batch)


@triton.jit
def cosine_kernel(
    loss,
    student_grad,
    teacher_grad,
    student,
    teacher,
    batch,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The cosine distance of ROWS samples; arguments as for difference_kernel."""
    row = rows_of(ROWS)
    ss = tl.zeros([ROWS, BLOCK], tl.float64)
    tt, st = ss, ss
    for first in tl.range(0, SIZE, BLOCK):
        _, at, inside = tile(row, first, batch, SIZE, BLOCK)
        s, t = _pair(student, teacher, at, inside)
        s, t = s.to(tl.float64), t.to(tl.float64)
        ss += s * s
        tt += t * t
        st += s * t
    ss, tt, st = tl.sum(ss, 1), tl.sum(tt, 1), tl.sum(st, 1)
    undirected = (ss <= 1e-24) | (tt <= 1e-24)
    norms = tl.where(undirected, float("inf"), tl.sqrt(ss * tt))
    to_s = tl.where(undirected, 0.0, 1.0 / (norms * ss))[:, None]
    to_t = tl.where(undirected, 0.0, 1.0 / (norms * tt))[:, None]
    for first in tl.range(0, SIZE, BLOCK):
        _, at, inside = tile(row, first, batch, SIZE, BLOCK)
        s, t = _pair(student, teacher, at, inside)
        s, t = s.to(tl.float64), t.to(tl.float64)
        if student_grad is not None:
            gradient = to_s * (st[:, None] * s - ss[:, None] * t)
            tl.store(student_grad + at, gradient.to(tl.float32), inside)
        if teacher_grad is not None:
            gradient = to_t * (st[:, None] * t - tt[:, None] * s)
            tl.store(teacher_grad + at, gradient.to(tl.float32), inside)
    tl.store(loss + row, (1.0 - st / norms).to(tl.float32), row < batch)


def feature_distance(student, teacher, distance, student_grad, teacher_grad):
    """(loss fp32 [B], gradients); one not asked for is an empty tensor [0]. student, teacher:
    [B, ...] fp32, fp16 or bf16. Each gradient has the strides of torch.empty_like of its input."""
    dense = student if is_dense(student) else student.contiguous()
    same = teacher.stride() == dense.stride()
    other = teacher if same else torch.empty_like(dense).copy_(teacher)
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    wanted = student_grad, teacher_grad
    grads = [torch.empty_like(dense) if asked else None for asked in wanted]
    size = math.prod(student.shape[1:])
    if size:
        _fill(loss, *grads, dense, other, size, distance)
    else:
        loss.fill_({"mse": math.nan, "l2": 0.0, "cosine": 1.0}[distance])
    return loss, *(_like(tensor, g) for tensor, g in zip((student, teacher), grads, strict=True))


def _fill(loss, student_grad, teacher_grad, student, teacher, size, distance):
    """Writes the outputs; all [B, size > 0] in one element order."""
    args = loss, student_grad, teacher_grad, student, teacher, len(loss), size
    config = tiling(size) | {"enable_fp_fusion": False}
    grid = (triton.cdiv(len(loss), config["ROWS"]),)
    with torch.cuda.device_of(loss):
        if distance == "cosine":
            cosine_kernel[grid](*args, **config)
        else:
            difference_kernel[grid](*args, distance == "mse", **config)


def _like(tensor, gradient):
    """The gradient in the layout that is given to new tensors like `tensor`; [0] for None."""
    if gradient is None:
        return tensor.new_empty(0)
    out = torch.empty_like(tensor)
    return gradient if out.stride() == gradient.stride() else out.copy_(gradient)
