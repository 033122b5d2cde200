"""batch_norm: BatchNorm over the batch, with the residual sum and the ReLU that follow it.

    y = f((x - mean) weight / sqrt(var + eps) + bias + residual),  f(z) = max(z, 0) or z

x, residual, y: [B, C, H, W] in one dtype; mean, var (biased) over B, H and W, weight, bias: [C],
float32 where x is a half. Differentiable in x, weight, bias and residual; Ioffe and Szegedy 2015.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import _library, _native
from ._library import FLOATS, define, define_autograd, expect
from ._native import CPU, DTYPES, channels_last, contiguous
from ._reference import at_least_fp32
from ._torch import below_autograd, hooked, transformed

HAS_KERNEL = torch.float32, torch.bfloat16


def _check(x, weight, bias, residual, eps, relu):
    _check_maps(x, residual=residual)
    _check_rows(x, weight=weight, bias=bias)


def _check_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad):
    _check_maps(x, grad=grad, y=y)
    _check_rows(x, weight=weight, bias=bias, mean=mean, var=var)


def _check_maps(x, **others):
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [B, C, H, W] and not empty")
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}, must be one of {FLOATS}")
    for name, tensor in others.items():
        if tensor is not None:
            expect(name, tensor, dtype=x.dtype, like=x, shape=x.shape)


def _check_rows(x, **rows):
    dtype = torch.promote_types(x.dtype, torch.float32)
    for name, row in rows.items():
        if row is not None:
            expect(name, row, dtype=dtype, like=x, shape=x.shape[1:2])


def moments(x):
    """mean and biased variance [C] of x [B, C, H, W]."""
    var, mean = torch.var_mean(at_least_fp32(x), dim=(0, 2, 3), correction=0)
    return mean, var


def reference(x, weight, bias, residual, eps, relu):
    """f((x - mean) weight / sqrt(var + eps) + bias + residual), mean, var; f is max(z, 0) or z.

    x, residual: [B, C, H, W]; the rest [C]. Ioffe and Szegedy 2015.
    """
    mean, var = moments(x)
    row = x.shape[1], 1, 1
    scale = weight * (var + eps).rsqrt()
    y = (at_least_fp32(x) - mean.view(row)) * scale.view(row) + bias.view(row)
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return _laid_like(x, y), mean, var


def reference_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad):
    """Gradients of x, weight, bias and residual, given that of y.

    f is ReLU where y, or without a residual bias, is given: its slope is 0 where y <= 0 or
    z <= 0, and 1 elsewhere, also at NaN.
    """
    row, count = (x.shape[1], 1, 1), x.numel() // x.shape[1]
    per_std = (var + eps).rsqrt()
    centred, scale = at_least_fp32(x) - mean.view(row), (weight * per_std).view(row)
    z = y if y is not None or bias is None else centred * scale + bias.view(row)
    h = at_least_fp32(grad)
    h = h if z is None else torch.where(z <= 0, 0, h)
    normal = centred * per_std.view(row)
    bias_grad, weight_grad = h.sum((0, 2, 3)), (h * normal).sum((0, 2, 3))
    flat = h - (bias_grad.view(row) + normal * weight_grad.view(row)) / count
    residual_grad = _laid_like(x, h) if residual_grad else x.new_empty(0)
    return _laid_like(x, flat * scale), weight_grad, bias_grad, residual_grad


def _laid_like(x, values):
    """values in the dtype and layout of x."""
    return torch.empty_like(x).copy_(values)


def _native_takes(*maps):
    """Whether the kernel knows their dtype and layout; None passes."""
    return all(
        m is None or (m.dtype in HAS_KERNEL and m.is_contiguous(memory_format=torch.channels_last))
        for m in maps
    )


def _memory(x):
    """The factors and sums that the kernels work in."""
    channels = x.shape[1]
    size = _native.constant("batch_norm_chunks"), 2, (channels + 15) // 16 * 16
    factors = _native.empty((3, channels), x, torch.float32)
    return factors, _native.empty(size, x, torch.float64)


def _cpu(x, weight, bias, residual, eps, relu):
    if not _native_takes(x, residual):
        return reference(x, weight, bias, residual, eps, relu)
    y, mean, var = _outputs(x, weight)
    weight, bias = weight.contiguous(), bias.contiguous()
    factors, sums = _memory(x)
    rows = {"mean": mean, "var": var, "factors": factors, "weight": weight, "bias": bias}
    _native.run(
        "batch_norm",
        CPU,
        *channels_last(CPU, x.dtype, y=y, x=x, residual=residual),
        *contiguous(CPU, torch.float32, **rows),
        *contiguous(CPU, torch.float64, sums=sums),
        x.numel() // len(mean),
        len(mean),
        eps,
        relu,
        DTYPES[x.dtype],
    )
    return y, mean, var


def _cpu_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad):
    if not _native_takes(x, y):
        args = grad, y, x, weight, bias, mean, var, eps, residual_grad
        return reference_backward(*args)
    x_grad, weight_grad, bias_grad = _outputs(x, weight)
    over = _native.empty_like(x) if residual_grad else None
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight, mean, var = (row.contiguous() for row in (weight, mean, var))
    bias = None if bias is None else bias.contiguous()
    factors, sums = _memory(x)
    maps = {"x_grad": x_grad, "residual_grad": over, "grad": grad, "y": y, "x": x}
    written = {"weight_grad": weight_grad, "bias_grad": bias_grad, "factors": factors}
    _native.run(
        "batch_norm_backward",
        CPU,
        *channels_last(CPU, x.dtype, **maps),
        *contiguous(CPU, torch.float32, **written, weight=weight, bias=bias, mean=mean, var=var),
        *contiguous(CPU, torch.float64, sums=sums),
        x.numel() // len(mean),
        len(mean),
        eps,
        DTYPES[x.dtype],
    )
    return x_grad, weight_grad, bias_grad, _native.empty((0,), x) if over is None else over


def _outputs(x, weight):
    """Memory for a map like x and for two rows of channels."""
    rows = (_native.empty(weight.shape, weight) for _ in range(2))
    return _native.empty_like(x), *rows


def _fake(x, weight, bias, residual, eps, relu):
    _check(x, weight, bias, residual, eps, relu)
    return torch.empty_like(x), *(weight.new_empty(weight.shape) for _ in range(2))


def _fake_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad):
    _check_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad)
    rows = (weight.new_empty(weight.shape) for _ in range(2))
    return torch.empty_like(x), *rows, torch.empty_like(x) if residual_grad else x.new_empty(0)


_batch_norm = define(
    "batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference,
    native=_cpu,
    fake=_fake,
)
_backward = define(
    "batch_norm_backward(Tensor grad, Tensor? y, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor mean, Tensor var, float eps, bool residual_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    reference=reference_backward,
    native=_cpu_backward,
    fake=_fake_backward,
)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, relu):
        with below_autograd():
            y, mean, var = _batch_norm(x, weight, bias, residual, eps, relu)
        # ReLU's slope is read off its output after a residual, else computed again from x and bias.
        added = residual is not None
        ctx.save_for_backward(
            y if relu and added else None,
            x,
            weight,
            bias if relu and not added else None,
            mean,
            var,
        )
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        *saved, mean, var = ctx.saved_tensors
        backward = _backward
        if torch.is_grad_enabled():  # create_graph: mean and var depend on x
            backward, (mean, var) = reference_backward, moments(saved[1])
        wanted = ctx.needs_input_grad[3]
        *grads, residual_grad = backward(grad, *saved, mean, var, ctx.eps, wanted)
        return *grads, residual_grad if wanted else None, None, None


def _autograd(*args):
    if transformed():
        return _library.plain["batch_norm"](*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        return _Differentiable.apply(*args)
    with below_autograd():
        return _batch_norm(*args)


define_autograd(_batch_norm, _autograd)


def batch_norm(norm, x, activation=None, residual=None):
    """activation(norm(x) + residual), without the sum or the activation where that is None.

    norm: a module. x: its input [B, C, H, W]. residual: a tensor like x. activation: a function or
    module. In train mode the norm's running statistics are updated as torch updates them.

    One kernel computes all of it forward and one backward, without rounding the sum in between. It
    takes the call where norm is an nn.BatchNorm2d in train mode that has a momentum and float32
    parameters and statistics, where x and residual are float32 or bfloat16, of one shape and dtype,
    in channels_last on a CPU, and where no hook, replaced forward, torch.compile, torch.func or
    forward-mode derivative needs to see the modules run one by one. Any other call runs the
    modules. The kernel includes a ReLU; another activation runs after it.
    """
    if not _fused(norm, x, residual):
        out = norm(x)
        out = out if residual is None else out + residual
        return out if activation is None else activation(out)
    relu = activation in (F.relu, torch.relu)
    relu = relu or (type(activation) is nn.ReLU and not hooked(activation))
    y, mean, var = _batch_norm(x, norm.weight, norm.bias, residual, norm.eps, relu)
    count = x.numel() // len(mean)
    norm.num_batches_tracked.add_(1)
    # By `.data`, as torch's own kernel does it: another call may have saved them for its backward.
    norm.running_mean.data.lerp_(mean, norm.momentum)
    norm.running_var.data.lerp_(var * (count / (count - 1)), norm.momentum)
    return y if relu or activation is None else activation(y)


def _fused(norm, x, residual):
    """Whether the CPU kernel takes this call and nothing else has to see its parts."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or transformed() or _library.ops["batch_norm"].cpu != "native":
        return False
    maps = [x] if residual is None else [x, residual]
    if any(type(v) is not torch.Tensor or v.dim() != 4 or not v.is_cpu for v in maps):
        return False
    if any(v.shape != x.shape or v.dtype != x.dtype for v in maps) or not _native_takes(*maps):
        return False
    if type(norm) is not nn.BatchNorm2d or hooked(norm) or x.numel() <= x.shape[1]:
        return False
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    whole = norm.track_running_stats and not any(v is None for v in tensors)
    return whole and norm.training and norm.momentum and norm.weight.dtype == torch.float32
