"""softmax_kl in Triton: KL(teacher || student) of logits and its gradients in one pass.

    p = softmax(student / T), q = softmax(teacher / T), KL_i = sum_c q_c (log q_c - log p_c)
    d/dstudent = w (p - q) / T,  d/dteacher = w q ((log q - log p) - KL_i) / T,  d/dw = KL_i

each times the factor of the reduction. Computed in fp32; a class with q_c = 0 counts 0.
"""

import torch
import triton
import triton.language as tl

# Provisional: chosen from the compiled code (128-bit accesses, no spills), not yet timed on a GPU.
WIDEST_TILE = 4096  # classes; wider rows are looped over
TILE = 512  # elements of a tile of several narrow rows
PER_WARP = 256  # elements of a tile per warp: 8 a thread
LOOP = {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def _shifted(logits, top, temperature):
    """(logit - max) / T, rounded as a division: 1 / T would bias the KL. Never overflows."""
    return tl.div_rn(logits - top, temperature)


@triton.jit
def _product(q, gap):
    """q gap, 0 where q is 0 (the gap is then infinite or NaN for a masked class)."""
    return tl.where(q == 0, 0.0, q * gap)


@triton.jit
def tile_kernel(student, teacher, weight, loss, grad_student, grad_teacher, grad_weight,
                batch, temperature, factor, STUDENT_STRIDE: tl.constexpr,
                TEACHER_STRIDE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
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
    s_max, t_max = tl.max(s, 1)[:, None], tl.max(t, 1)[:, None]
    s, t = _shifted(s, s_max, temperature), _shifted(t, t_max, temperature)
    p, q = tl.exp(s), tl.exp(t)
    p_sum, q_sum = tl.sum(p, 1)[:, None], tl.sum(q, 1)[:, None]
    p /= p_sum
    q /= q_sum
    gap = t - s + tl.log(p_sum / q_sum)
    kl = tl.sum(_product(q, gap), 1)
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
        tl.store(grad_teacher + at * C + column, _product(q, gap - kl[:, None]) * scale, inside)


@triton.jit
def _online(logits, at, C, top, total, temperature):
    """The running (max, sum of exp((logit - max) / T)) with one more block."""
    v = tl.load(logits + at, at < C, -float("inf")).to(tl.float32)
    higher = tl.maximum(top, tl.max(v, 0))
    total *= tl.exp(_shifted(top, higher, temperature))
    return higher, total + tl.sum(tl.exp(_shifted(v, higher, temperature)), 0)


@triton.jit
def _block(student, teacher, at, C, s_max, t_max, p_sum, q_sum, temperature):
    """(p, q, log q - log p) of one block."""
    s = tl.load(student + at, at < C, -float("inf")).to(tl.float32)
    t = tl.load(teacher + at, at < C, -float("inf")).to(tl.float32)
    s, t = _shifted(s, s_max, temperature), _shifted(t, t_max, temperature)
    return tl.exp(s) / p_sum, tl.exp(t) / q_sum, t - s + tl.log(p_sum / q_sum)


@triton.jit
def loop_kernel(student, teacher, weight, loss, grad_student, grad_teacher, grad_weight,
                batch, temperature, factor, STUDENT_STRIDE: tl.constexpr,
                TEACHER_STRIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row of any width, in passes: normalisers, KL and d/dstudent, d/dteacher.

    Arguments as for tile_kernel.
    """
    temperature = tl.cast(temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    student += row * STUDENT_STRIDE
    teacher += row * TEACHER_STRIDE
    columns = tl.arange(0, BLOCK)

    # The lowest finite number rather than -inf: a first block of masked classes must not be NaN.
    s_max = tl.cast(-3.4028234663852886e38, tl.float32)
    t_max = s_max
    p_sum = tl.cast(0.0, tl.float32)
    q_sum = p_sum
    for first in tl.range(0, C, BLOCK):
        at = first + columns
        s_max, p_sum = _online(student, at, C, s_max, p_sum, temperature)
        t_max, q_sum = _online(teacher, at, C, t_max, q_sum, temperature)

    row_scale = tl.cast(factor, tl.float32)
    if weight is not None:
        row_scale *= tl.load(weight + row)
    scale = row_scale / temperature
    terms = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        at = first + columns
        p, q, gap = _block(student, teacher, at, C, s_max, t_max, p_sum, q_sum, temperature)
        terms += _product(q, gap)
        if grad_student is not None:
            tl.store(grad_student + row * C + at, (p - q) * scale, at < C)
    kl = tl.sum(terms, 0)
    tl.store(loss + row, kl * row_scale)
    if grad_weight is not None:
        tl.store(grad_weight + row, kl * factor)

    if grad_teacher is not None:
        for first in tl.range(0, C, BLOCK):
            at = first + columns
            _, q, gap = _block(student, teacher, at, C, s_max, t_max, p_sum, q_sum, temperature)
            tl.store(grad_teacher + row * C + at, _product(q, gap - kl) * scale, at < C)


def softmax_kl(
    student, teacher, weight, temperature, reduction, student_grad, teacher_grad, weight_grad
):
    """(loss, grad_student, grad_teacher, grad_weight); one not asked for is an empty tensor [0].

    student, teacher: [B, C] fp32, fp16 or bf16; weight: fp32 [B] or None. loss: fp32, [B] for the
    reduction "none", else 0-dim: row losses are summed by torch in a fixed order.
    """
    batch, classes = student.shape
    student, teacher = (t if t.stride(1) == 1 else t.contiguous() for t in (student, teacher))
    factor = {"none": 1.0, "sum": 1.0, "batchmean": 1 / max(batch, 1),
              "mean": 1 / max(batch * classes, 1)}[reduction]  # fmt: skip
    rows = torch.empty(batch, dtype=torch.float32, device=student.device)
    inputs = (student, student_grad), (teacher, teacher_grad), (rows, weight_grad)
    grads = [torch.empty(t.shape if asked else 0, dtype=t.dtype, device=t.device)
             for t, asked in inputs]  # fmt: skip
    block = triton.next_power_of_2(classes)
    if block <= WIDEST_TILE:
        tile = max(block, TILE)
        kernel, count = tile_kernel, tile // block
        config = {"ROWS": count, "BLOCK": block, "num_warps": max(4, tile // PER_WARP)}
    else:
        kernel, count, config = loop_kernel, 1, LOOP
    with torch.cuda.device_of(student):
        kernel[(triton.cdiv(batch, count),)](
            student, teacher, None if weight is None else weight.contiguous(), rows,
            *(g if g.numel() else None for g in grads), batch, temperature, factor,
            student.stride(0), teacher.stride(0), classes, **config, enable_fp_fusion=True,
        )  # fmt: skip
    return rows if reduction == "none" else rows.sum(), *grads
