"""Every op in plain torch: its specification, the oracle of its tests, and the fallback.

Each function takes the arguments of the op's schema and computes in the dtype it is given.
"""

import math

import torch
import torch.nn.functional as F

REDUCTIONS = ("none", "sum", "batchmean", "mean")


def per_sample(values, like):
    """[B] reshaped to [B, 1, ...] so that it broadcasts over `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def pgd_step(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """linf: clip(clamp(x_adv + step_size sign(g), x - eps, x + eps));
    l2: d = x_adv + step_size g / ||g|| - x, clip(x + d min(1, eps / ||d||)). Shapes [B, ...].

    sign is (g > 0) - (g < 0): 0 at 0 and at NaN. Madry et al. 2018, section 2.1.
    """
    if eps_per_sample is not None:
        eps = per_sample(eps_per_sample, x)
    return _project(x_adv + step_size * _direction(grad, norm), x, eps, norm, lo, hi)


def pgd_step_(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """`pgd_step` written into x_adv."""
    x_adv.copy_(pgd_step(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi))


def _l2_norm(v):
    """[B]: norms in fp64, because the squares of a vanishing gradient underflow in fp32."""
    return _rows(v.double()).norm(dim=1)


def _direction(grad, norm):
    """The sign of grad or, under l2, g / ||g|| per sample; 0 where g is 0."""
    if norm == "linf":
        return (grad > 0).to(grad.dtype) - (grad < 0).to(grad.dtype)
    length = per_sample(_l2_norm(grad), grad)
    return torch.where(length > 0, grad.double() / length, 0.0).to(grad.dtype)


def _project(x_adv, x, eps, norm, lo, hi):
    """x_adv into the ball around x, then into the box."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(lo, hi)
    delta = x_adv - x
    length = per_sample(_l2_norm(delta), x)
    return (x + delta * torch.where(length > eps, eps / length, 1.0).to(x.dtype)).clamp(lo, hi)


def apgd_step_(
    x_adv,
    x_old,
    x_best,
    grad_best,
    x_found,
    bad_gradients,
    grad,
    x,
    step_size,
    better_best,
    better_found,
    restart,
    eps_per_sample,
    eps,
    weight,
    norm,
    lo,
    hi,
):
    """Keeps x_adv where better_* [B], takes up x_best where restart [B], then z = P(x_adv +
    step_size d), P(x_adv + weight (z - x_adv) + (1 - weight) (x_adv - x_old)). Shapes [B, ...].

    d is sign(g) or g / ||g||, g the gradient with 0 for what is not finite. Croce & Hein 2020.
    """
    if eps_per_sample is not None:
        eps = per_sample(eps_per_sample, x)
    finite = grad.isfinite()
    bad_gradients += (~_rows(finite).all(dim=1)).sum()
    grad = torch.where(finite, grad, 0.0)
    better_best, better_found, restart, step_size = (
        per_sample(values, x) for values in (better_best, better_found, restart, step_size)
    )
    x_found.copy_(torch.where(better_found, x_adv, x_found))
    x_best.copy_(torch.where(better_best, x_adv, x_best))
    grad_best.copy_(torch.where(better_best, grad, grad_best))
    start, grad = torch.where(restart, x_best, x_adv), torch.where(restart, grad_best, grad)
    z = _project(start + step_size * _direction(grad, norm), x, eps, norm, lo, hi)
    moved = start + weight * (z - start) + (1 - weight) * (start - x_old)
    x_old.copy_(start)
    x_adv.copy_(_project(moved, x, eps, norm, lo, hi))


_MASK = 0xFFFFFFFF
_RADIUS_BLOCK = 0xFFFFFFFF  # the Philox block that holds a sample's radius draw


def philox(seed, block, sample, step, restart):
    """Four words in [0, 2^32): Philox4x32-10 (Salmon et al. 2011) with the 64-bit int `seed` as the
    key and the other arguments, int64 tensors or ints in [0, 2^32), as the counter."""
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    a, b, c, d = block, sample, step, restart
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves their 64 bits as they should be.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (q >> 32 & _MASK) ^ b ^ key0, q & _MASK
        c, d = (p >> 32 & _MASK) ^ d ^ key1, p & _MASK
        key0, key1 = key0 + 0x9E3779B9 & _MASK, key1 + 0xBB67AE85 & _MASK
    return a, b, c, d


def _noise(words, normal):
    """fp64 [B, 4N] from four words [B, N]: 2 u - 1 with u = k 2^-24, k a word's upper 24 bits, or
    Box-Muller's r cos t, r sin t, r = sqrt(-2 ln((k0 + 1) 2^-24)), t = 2 pi k1 2^-24."""
    u = [(word >> 8).double() * 2.0**-24 for word in words]
    if normal:
        pairs = [((-2 * (a + 2.0**-24).log()).sqrt(), 2 * math.pi * b) for a, b in (u[:2], u[2:])]
        draws = [r * wave(t) for r, t in pairs for wave in (torch.cos, torch.sin)]
    else:
        draws = [2 * a - 1 for a in u]
    return torch.stack(draws, dim=-1).flatten(1)


def random_start(x, seed, index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi):
    """clip(x + delta): 0, uniform in the eps-ball of `norm`, or sigma N(0, 1); x: [B, ...].

    Element e of a sample, in logical order, takes word e % 4 of the Philox counter (e // 4, index,
    step, restart). l2: delta = eps v^(1/D) n / ||n||, n ~ N(0, 1), v from a block of its own.
    """
    if init == "zero":
        return x.clamp(lo, hi)
    size = math.prod(x.shape[1:])
    sample = torch.arange(len(x), device=x.device) if index is None else index & _MASK
    counter = sample[:, None], step, restart
    block = torch.arange((size + 3) // 4, device=x.device)
    ball = init == "uniform" and norm == "l2"
    noise = _noise(philox(seed.item(), block, *counter), ball or init == "gaussian")[:, :size]
    scale = sigma
    if init == "uniform":
        scale = eps if eps_per_sample is None else eps_per_sample[:, None]
    if ball:
        v = (philox(seed.item(), _RADIUS_BLOCK, *counter)[0] + 1).double() * 2.0**-32
        length = noise.norm(dim=1, keepdim=True)
        radius = scale * v ** (1 / max(size, 1))
        scale = torch.where(length > 0, radius / length, 0.0).to(x.dtype)
    return (x + (scale * noise.to(x.dtype)).view(x.shape)).clamp(lo, hi)


def augment(images, dy, dx, flip, padding, channels_last):
    """float32 [B, C, H, W] = images / 255, zero-padded, cropped at (dy, dx) [B], then flipped."""
    device, (height, width) = images.device, images.shape[2:]
    rows = dy[:, None] + torch.arange(height, device=device)
    columns = dx[:, None] + torch.arange(width, device=device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    in_rows = (rows >= 0) & (rows < height + 2 * padding)
    in_columns = (columns >= 0) & (columns < width + 2 * padding)
    padded = torch.nn.functional.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images), device=device)[:, None, None]
    crop = padded[batch, (rows * in_rows)[:, :, None], (columns * in_columns)[:, None]]
    crop = crop * (in_rows[:, :, None] & in_columns[:, None])[..., None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (crop.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=layout)


def bn_affine(mean, var, gamma, beta, eps):
    """(scale, shift) [C] of a BatchNorm in eval mode: gamma / sqrt(var + eps), beta - mean scale;
    gamma and beta may be None for 1 and 0."""
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def fold_bn_(weights_out, biases_out, weights, biases, norms):
    """weight_out [O, ...] = weight scale, bias_out = bias scale + shift, of each convolution; scale
    and shift of its BatchNorm `norm`, the arguments of `bn_affine`, or 1 and 0 for None."""
    for weight_out, bias_out, weight, bias, norm in zip(
        weights_out, biases_out, weights, biases, norms, strict=True
    ):
        if norm is not None:
            scale, shift = bn_affine(*norm)
            weight = weight * per_sample(scale, weight)
            bias = shift if bias is None else bias * scale + shift
        weight_out.copy_(weight)
        if bias_out is not None:
            bias_out.copy_(bias)


def _at_least_fp32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _label(y, logits):
    """(whether y [B] is in [0, C), y as [B, 1] with 0 where it is not)."""
    valid = (y >= 0) & (y < logits.shape[1])
    return valid, torch.where(valid, y, 0)[:, None]


def margin(logits, y, grad):
    """max_{c != y} z_c - z_y [B], and its gradient [B, C]: +1 at the first maximum, -1 at y.

    logits [B, C], y int64 [B]. NaN is the largest logit. y outside [0, C): NaN, gradient 0; no
    other logit above -inf: -inf, gradient 0. Carlini & Wagner 2017, f6.
    """
    valid, label = _label(y, logits)
    wide = _at_least_fp32(logits)
    top, other = wide.scatter(1, label, -math.inf).max(dim=1)
    own = wide.gather(1, label)[:, 0]
    own = torch.where(top == -math.inf, own.detach(), own)  # no gradient there either
    loss = torch.where(valid, top - own, math.nan)
    if not grad:
        return loss, logits.new_empty(0)
    one = (valid & (top != -math.inf)).to(logits.dtype)[:, None]
    zero = logits.new_zeros(logits.shape)
    return loss, zero.scatter(1, other[:, None], one).scatter(1, label, -one)


def dlr(logits, y, grad):
    """-n / d [B], n = z_y - max_{c != y} z_c, d = z_pi1 - z_pi3 + 1e-12 with z_pi1 >= z_pi2 >= ...,
    and its gradient [B, C]: -1 / d at y, 1 / d at the maximum, n / d^2 at pi1, -n / d^2 at pi3.

    logits [B, C >= 3], y int64 [B]. Of equal logits the first comes first; NaN is the largest. y
    outside [0, C): NaN, gradient 0. Croce & Hein 2020, equation 6.
    """
    valid, label = _label(y, logits)
    wide = _at_least_fp32(logits)
    top, order = (v[:, :3] for v in wide.sort(dim=1, descending=True, stable=True))
    other = (order[:, :1] == label).long()
    n = (wide.gather(1, label) - top.gather(1, other))[:, 0]
    d = top[:, 0] - top[:, 2] + 1e-12
    loss = torch.where(valid, -n / d, math.nan)
    if not grad:
        return loss, logits.new_empty(0)
    at = torch.cat([label, order.gather(1, other), order[:, :1], order[:, 2:]], dim=1)
    slope = torch.stack([-1 / d, 1 / d, n / d / d, -n / d / d], dim=1)
    slope = torch.where(valid[:, None], slope, 0)
    return loss, torch.zeros_like(wide).scatter_add(1, at, slope).to(logits.dtype)


def mart_bce(logits, y, grad):
    """-log q_y - log(u) [B], u = 1.0001 - q_{y'} + 1e-12, q = softmax(logits), y' the likeliest
    class but y, the first of equals; and its gradient q (1 - k) - [y] + k [y'], k = q_{y'} / u.

    logits [B, C >= 2], y int64 [B]. y outside [0, C): NaN, gradient 0. Wang et al. 2020, equation
    6, with the constants of the authors' code.
    """
    valid, label = _label(y, logits)
    log_q = _at_least_fp32(logits).log_softmax(dim=1)
    top, other = log_q.scatter(1, label, -math.inf).max(dim=1, keepdim=True)
    u = 1.0001 - top.exp() + 1e-12
    loss = torch.where(valid, -(log_q.gather(1, label) + u.log())[:, 0], math.nan)
    if not grad:
        return loss, logits.new_empty(0)
    k = top.exp() / u
    gradient = (log_q.exp() * (1 - k)).scatter_add(1, label, -torch.ones_like(k))
    gradient = torch.where(valid[:, None], gradient.scatter_add(1, other, k), 0)
    return loss, gradient.to(logits.dtype)


def cross_entropy(logits, target, label_smoothing, ignore_index, reduction, grad):
    """-sum_c q_c log p_c [B] and its gradient p sum_c q_c - q [B, C], p = softmax(logits) and
    q = (1 - label_smoothing) t + label_smoothing / C, t the target or the one-hot of its labels;
    or the sum of all, or the mean over the samples whose label is not ignore_index.

    logits [B, C]; target int64 [B] or [B, C]. A class with q_c = 0 counts 0. A label that is
    ignore_index: 0, gradient 0; any other outside [0, C): NaN, gradient 0. Label smoothing: Szegedy
    et al. 2016, section 7.
    """
    wide, classes, valid = _at_least_fp32(logits), logits.shape[1], None
    if target.dtype == torch.int64:
        valid, label = _label(target, logits)
        ignored = target == ignore_index
        valid = valid & ~ignored
        wide = wide.masked_fill(ignored[:, None], 0)  # what is NaN there must not reach a gradient
        target = torch.zeros_like(wide).scatter(1, label, 1)
    q = (1 - label_smoothing) * target + label_smoothing / classes
    log_p = wide.log_softmax(dim=1)
    loss = -(q * log_p).masked_fill(q == 0, 0).sum(dim=1)
    gradient = log_p.exp() * q.sum(dim=1, keepdim=True) - q
    if valid is not None:
        loss = torch.where(valid, loss, torch.where(ignored, 0.0, math.nan))
        gradient = torch.where(valid[:, None], gradient, 0)
    if reduction == "mean":
        kept = torch.ones_like(loss) if valid is None else (~ignored).to(loss.dtype)
        factor = 1 / kept.sum().clamp(min=1)
        loss, gradient = loss * factor, gradient * factor
    loss = loss if reduction == "none" else loss.sum()
    return loss, gradient.to(logits.dtype) if grad else logits.new_empty(0)


def softmax_entropy(logits, temperature, offset, grad):
    """H = -sum_c q_c log(q_c + offset) [B] of q = softmax(logits / T), logits [B, C], and its
    gradient -q (g - sum_c q_c g_c) / T, g = log(q + offset) + q / (q + offset).

    With offset 0 the exact entropy: 0 log 0 = 0.
    """
    log_q = (_at_least_fp32(logits) / temperature).log_softmax(dim=1)
    q = log_q.exp()
    if offset == 0:
        log = slope = log_q.masked_fill(q == 0, 0)  # and 1 in g, which cancels
    else:
        log = (q + offset).log()
        slope = log + q / (q + offset)
    loss = -(q * log).sum(dim=1)
    gradient = -q * (slope - (q * slope).sum(dim=1, keepdim=True)) / temperature
    return loss, gradient.to(logits.dtype) if grad else logits.new_empty(0)


def moments(x):
    """mean and biased variance [C] of x [B, C, H, W]."""
    var, mean = torch.var_mean(_at_least_fp32(x), dim=(0, 2, 3), correction=0)
    return mean, var


def batch_norm(x, weight, bias, residual, eps, relu):
    """f((x - mean) weight / sqrt(var + eps) + bias + residual), mean, var; f is max(z, 0) or z.

    x, residual: [B, C, H, W]; the rest [C]. Ioffe and Szegedy 2015.
    """
    mean, var = moments(x)
    row = x.shape[1], 1, 1
    scale = weight * (var + eps).rsqrt()
    y = (_at_least_fp32(x) - mean.view(row)) * scale.view(row) + bias.view(row)
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return _laid_like(x, y), mean, var


def batch_norm_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad):
    """Gradients of x, weight, bias and residual, given that of y.

    f is ReLU where y, or without a residual bias, is given: its slope is 0 where y <= 0 or
    z <= 0, and 1 elsewhere, also at NaN.
    """
    row, count = (x.shape[1], 1, 1), x.numel() // x.shape[1]
    per_std = (var + eps).rsqrt()
    centred, scale = _at_least_fp32(x) - mean.view(row), (weight * per_std).view(row)
    z = y if y is not None or bias is None else centred * scale + bias.view(row)
    h = _at_least_fp32(grad)
    h = h if z is None else torch.where(z <= 0, 0, h)
    normal = centred * per_std.view(row)
    bias_grad, weight_grad = h.sum((0, 2, 3)), (h * normal).sum((0, 2, 3))
    flat = h - (bias_grad.view(row) + normal * weight_grad.view(row)) / count
    residual_grad = _laid_like(x, h) if residual_grad else x.new_empty(0)
    return _laid_like(x, flat * scale), weight_grad, bias_grad, residual_grad


def _laid_like(x, values):
    """values in the dtype and layout of x."""
    return torch.empty_like(x).copy_(values)


def feature_distance(student, teacher, distance, student_grad, teacher_grad):
    """mse: mean (s - t)^2; l2: ||s - t||; cosine: 1 - <s, t> / (||s|| ||t||) [B], and gradients.

    student, teacher: [B, ...]. cosine is 1 with gradient 0 where a norm is at most 1e-12; l2 has
    gradient 0 up to a distance of 1e-30.
    """
    s, t = _at_least_fp32(student), _at_least_fp32(teacher)
    if distance == "mse":
        scale = 2 / max(math.prod(s.shape[1:]), 1)
        loss, grads = _rows((s - t).square()).mean(dim=1), ((s - t) * scale, (t - s) * scale)
    elif distance == "l2":
        loss = _l2_norm(s - t).to(s.dtype)
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
    norms = (_l2_norm(v).to(v.dtype) for v in (s, t))
    s_norm, t_norm = (per_sample(torch.where(n <= 1e-12, math.inf, n), s) for n in norms)
    u, v = s / s_norm, t / t_norm
    similarity = _rows(u * v).sum(dim=1)
    c = per_sample(similarity, s)
    return 1 - similarity, ((u * c - v) / s_norm, (v * c - u) / t_norm)


def _rows(v):
    """[B, ...] as [B, D]."""
    return v.reshape(v.shape[0], math.prod(v.shape[1:]))


def loss_dtype(dtype):
    """The dtype that losses over logits of `dtype` are computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduction_factor(reduction, shape):
    """What the sum over rows is multiplied by. 1 for an empty batch, whose losses are then 0."""
    if reduction in ("none", "sum"):
        return 1.0
    return 1 / max(shape[0] if reduction == "batchmean" else math.prod(shape), 1)


def softmax_kl(
    student, teacher, weight, temperature, reduction, student_grad, teacher_grad, weight_grad
):
    """KL_i = sum_c q_c (log q_c - log p_c) with p, q = softmax(student / T), softmax(teacher / T);
    d/ds = w (p - q) / T, d/dt = w q (log q - log p - KL_i) / T, d/dw = KL_i, each times the
    reduction's factor. student, teacher [B, C]; weight [B]. A class with q_c = 0 counts 0.
    """
    dtype = loss_dtype(student.dtype)
    log_p, log_q = (F.log_softmax(v.to(dtype) / temperature, dim=1) for v in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    difference = (log_q - log_p).masked_fill(q == 0, 0)
    kl = (q * difference).sum(dim=1)
    factor = reduction_factor(reduction, student.shape)
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
