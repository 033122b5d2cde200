"""Losses over the ops: reductions, temperatures and the names the papers use.

A loss and its gradient come out of one pass. Gradients of gradients (create_graph), torch.func and
forward-mode derivatives are right too, computed in torch's own ops.
"""

import torch

from . import ops
from .ops._library import expect_constant, expect_tensors
from .ops._logits import check_int64_labels, check_range, int64_labels, loss_dtype, wide


def kl(student_logits, teacher_logits, temperature=1.0, reduction="batchmean", weight=None):
    """KL(teacher || student) of softmax(logits / temperature) (Hinton et al. 2015, section 2).

    KL_i = sum_c q_c (log q_c - log p_c), p of the student, q of the teacher. Differentiable, as
    often as you like, to the student, the teacher and the weight; detach the teacher where it is a
    constant.

    student_logits, teacher_logits: [B, C], both float32, bfloat16, float16 or float64, any
    strides. temperature: float > 0; there is no factor T^2, multiply by temperature**2 where the
    method has it. weight: [B] float32 (float64 with float64 logits), multiplies KL_i.
    reduction: "none" [B], "sum", "batchmean" (sum / B) or "mean" (sum / (B C), as RSLAD's code
    has it). Computed in float32 for half logits; the loss is then float32. An empty batch gives 0
    (torch: nan for the means).

    A class with q_c = 0, such as one masked by a teacher logit of -inf, counts 0 whatever the
    student says; in float32 q_c is 0 where (t_c - max t) / temperature < -86. A student logit of
    -inf where q_c > 0 makes that row's loss inf, its gradient to the student stays finite and the
    one to the teacher is not. NaN stays in its row.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.dtype == torch.float16:
        # The gradient of a mean is subnormal in float16 before a loss scale reaches it.
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    grad = torch.is_grad_enabled()
    return ops.softmax_kl(
        student_logits,
        teacher_logits,
        weight,
        temperature,
        reduction,
        grad and student_logits.requires_grad,
        grad and teacher_logits.requires_grad,
        grad and weight is not None and weight.requires_grad,
    )[0]


def ikl(adv_logits, clean_logits, weight=None, alpha=4.0, beta=20.0):
    """The improved Kullback-Leibler divergence of IKL (Cui et al. 2024, arXiv 2305.13948):

        alpha mean_i SCE_i + beta / 4 sum_i N_i / sum_i S_i^2,  a = adv_logits, n = clean_logits,
        SCE_i = -sum_c softmax(n_i)_c log softmax(a_i)_c,  S_i = sum_c w_ic,
        N_i = sum_jk w_ij w_ik [(n_ij - n_ik) - (a_ij - a_ik)]^2

    The target softmax(n) of the first term is a constant, whose gradient goes to a alone; that of
    the second goes to both, and each may be differentiated as often as you like. The sum over pairs
    of classes is computed from each row's weighted mean, without a tensor [B, C, C].

    adv_logits, clean_logits: [B, C], both float32, bfloat16, float16 or float64, any strides.
    weight: [B, C] in any floating type, at least 0, a constant; None: all alike. Only the
    proportions of weights matter, over the whole batch. alpha, beta: floats, at least 0. Computed
    in float32 for half logits; the loss is then float32. An empty batch gives 0, and so does the
    second term where all weights are 0.

    A class with w_ic = 0 counts 0 in N_i and one with softmax(n_i)_c = 0 in SCE_i (in float32 where
    n_ic is 86 below the row's largest), even where its logits are -inf: give masked classes a
    weight of 0. A logit of -inf with a weight above 0 makes the loss NaN, and so does NaN; of the
    gradients both reach only their own row. A weight that is negative, infinite or NaN raises
    ValueError on a CPU; on a GPU, and under torch.func, it makes the loss NaN.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(adv_logits=adv_logits, clean_logits=clean_logits)
    if weight is not None:
        expect_tensors(weight=weight)
        if weight.dtype.is_floating_point:
            weight = weight.to(loss_dtype(adv_logits.dtype))
    if adv_logits.dtype == torch.float16:  # see `kl`
        adv_logits, clean_logits = adv_logits.float(), clean_logits.float()
    grad = torch.is_grad_enabled()
    wanted = grad and adv_logits.requires_grad, grad and clean_logits.requires_grad
    return ops.ikl(adv_logits, clean_logits, weight, alpha, beta, *wanted)[0]


def cross_entropy(logits, target, label_smoothing=0.0, reduction="mean", ignore_index=-100):
    """-sum_c q_c log softmax(logits)_c, as torch.nn.functional.cross_entropy defines it.

    logits: [B, C] float32, bfloat16, float16 or float64. target: [B] labels of any integer type, or
    [B, C] probabilities in any floating type, which are a constant. label_smoothing a in [0, 1]:
    q = (1 - a) t + a / C, t the probabilities or the one-hot of the label (Szegedy et al. 2016,
    section 7). ignore_index: the label of samples that are left out: their loss and gradient are 0.
    reduction: "none" [B], "sum" or "mean" (over the samples that are not left out). The loss is
    float32 for halves.

    A class with q_c = 0 counts 0 even where its logit is -inf (torch: nan). A batch that is empty
    or left out as a whole gives 0. Any other label outside [0, C) raises ValueError on a CPU; on a
    GPU, and under torch.func, where no look at the values is possible, its loss is NaN and its
    gradient 0: count `cross_entropy(..., reduction="none").isnan()` where you log.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(logits=logits, target=target)
    if target.dtype.is_floating_point:
        target = target.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return ops.cross_entropy(_scalable(logits), target, label_smoothing, ignore_index, reduction)


def margin(logits, y, kappa=None, reduction="none"):
    """max_{c != y} z_c - z_y, the CW objective that an attack ascends (Carlini & Wagner 2017, f6).

    logits [B, C], y integers [B]; see `ops.margin`. kappa: None, or the confidence in logits at
    which a sample is left alone: min(margin - kappa, 0), which is -max(z_y - max_{c != y} z_c +
    kappa, 0) of the CW_inf evaluations (kappa = 50). reduction: "none" (the default, [B], for
    attacks), "mean" or "sum". Raises ValueError on another reduction.
    """
    loss = ops.margin(logits, y)
    if kappa is not None:
        loss = (loss - kappa).clamp(max=0)
    return _reduced(loss, reduction, "mean")


def dlr(logits, y, reduction="none"):
    """The difference of logits ratio, which an attack ascends (Croce & Hein 2020, equation 6):

    -(z_y - max_{c != y} z_c) / (z_pi1 - z_pi3 + 1e-12), z_pi1 >= z_pi2 >= ... the sorted logits.

    logits [B, C] with C >= 3, y integers [B]; see `ops.dlr`. A shift of the logits and a positive
    factor change nothing. reduction: "none" (the default, [B], for attacks), "mean" or "sum".
    Raises ValueError on another reduction.
    """
    return _reduced(ops.dlr(logits, y), reduction, "mean")


def dlr_targeted(logits, y, target, reduction="none"):
    """The targeted difference of logits ratio (Croce & Hein 2020, equation 7), which an attack on
    the class `target` ascends:

    -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2 + 1e-12), z_pi1 >= z_pi2 >= ... the sorted logits.

    logits [B, C] with C >= 4, y and target integers [B] in [0, C). Differentiable in logits, in
    plain torch; of equal logits any counts as the larger. The result is float32 for halves.
    reduction: "none" (the default, [B], for attacks), "mean" or "sum". Raises ValueError on another
    reduction, on fewer than four classes and, on a CPU, on labels outside [0, C).
    """
    expect_tensors(logits=logits, y=y, target=target)
    if logits.dim() != 2 or logits.shape[1] < 4:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, must be [B, C] with C >= 4")
    y, target = int64_labels(y), int64_labels(target)
    check_int64_labels(y, logits)
    check_int64_labels(target, logits, "target")
    logits = wide(logits)
    top = logits.topk(4).values
    try:
        ahead = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    except RuntimeError:  # on a CPU, by a label that torch does not name
        check_range(y, logits.shape[1])
        check_range(target, logits.shape[1], "target")
        raise
    loss = ahead[:, 0] / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
    return _reduced(loss, reduction, "mean")


def mart_bce(logits, y, reduction="mean"):
    """MART's boosted cross-entropy, -log q_y - log(1.0001 - q_{y'} + 1e-12): q = softmax(logits),
    y' the likeliest class but y (Wang et al. 2020, equation 6, with the authors' code's constants).

    logits: [B, C] with C >= 2, float32, bfloat16, float16 or float64; y: integers [B], or [B, C]
    probabilities, a constant, over which the loss is then the expectation (in plain torch).
    reduction: "none" [B], "sum" or "mean" (sum / B). The loss is float32 for halves. The first term
    does not underflow; of equally likely classes y' is the first. A label outside [0, C) raises
    ValueError on a CPU and gives NaN with gradient 0 elsewhere (as in `cross_entropy`), an empty
    batch 0. NaN stays in its row.
    Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(logits=logits, y=y)
    expect_constant("y", y)
    logits = _scalable(logits)
    loss = _soft_mart_bce(logits, y) if y.is_floating_point() else ops.mart_bce(logits, y)
    return _reduced(loss, reduction, "mean")


def entropy(logits, temperature=1.0, offset=0.0, reduction="none"):
    """-sum_c q_c log(q_c + offset), q = softmax(logits / temperature), in nats.

    logits: [B, C] float32, bfloat16, float16 or float64. temperature: float > 0. offset: 0 for the
    entropy itself, in [0, log C], where a class with q_c = 0 counts 0; above 0 the guard of
    published codes (1e-5 in RSLAD, MTARD and B-MTARD), which lowers it. reduction: "none" [B],
    "sum" or "mean" (sum / B). Differentiable in logits. The result is float32 for halves. An empty
    batch gives 0. NaN stays in its row. Raises TypeError or ValueError that names the argument at
    fault.
    """
    expect_tensors(logits=logits)
    return _reduced(ops.softmax_entropy(_scalable(logits), temperature, offset), reduction, "mean")


def feature(student_features, teacher_features, distance="mse", reduction="batchmean"):
    """The distance between features [B, ...], "mse", "l2" or "cosine"; see `ops.feature_distance`.

    reduction: "batchmean" (sum over samples / B), "none" ([B]) or "sum"; ValueError on another.
    The gradient goes to both, unless the teacher does not require it.
    """
    expect_tensors(student_features=student_features, teacher_features=teacher_features)
    if distance == "mse" and student_features.dtype == torch.float16:
        # 2 (s - t) / D is subnormal in float16 before a loss scale reaches it.
        student_features, teacher_features = student_features.float(), teacher_features.float()
    loss = ops.feature_distance(student_features, teacher_features, distance)
    return _reduced(loss, reduction, "batchmean")


def _scalable(logits):
    """float16 as float32: gradients are subnormal in float16 before a loss scale reaches them."""
    return logits.float() if logits.dtype == torch.float16 else logits


def _reduced(loss, reduction, mean):
    """loss [B], its "sum", or its mean by the name `mean`; an empty batch gives 0."""
    if reduction not in ("none", "sum", mean):
        raise ValueError(f"reduction is {reduction!r}, must be 'none', 'sum' or {mean!r}")
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(len(loss), 1)


def _soft_mart_bce(logits, y):
    """[B], the expectation of mart_bce over labels of probabilities y [B, C]."""
    if y.shape != logits.shape or logits.dim() != 2 or logits.shape[1] < 2:
        shapes = tuple(y.shape), tuple(logits.shape)
        raise ValueError(f"y and logits have shapes {shapes}, must be [B] or [B, C], C >= 2")
    log_q = wide(logits).log_softmax(1)
    top, best = log_q.exp().topk(2)
    ids = torch.arange(logits.shape[1], device=logits.device)
    wrong = torch.where(ids == best[:, :1], top[:, 1:], top[:, :1])
    loss = log_q + (1.0001 - wrong + 1e-12).log()
    return -(y * loss).masked_fill(y == 0, 0).sum(1)
