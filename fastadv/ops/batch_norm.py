"""batch_norm: BatchNorm over the batch, with the residual sum and the ReLU that follow it.

    y = f((x - mean) weight / sqrt(var + eps) + bias + residual),  f(z) = max(z, 0) or z

x, residual, y: [B, C, H, W] in one dtype; mean, var (biased) over B, H and W, weight, bias: [C],
float32 where x is a half. Differentiable in x, weight, bias and residual; Ioffe and Szegedy 2015.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import _library, _native, reference
from ._library import FLOATS, define, expect
from ._torch import hooked, transformed

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


def _native_takes(*maps):
    """Whether the kernel knows their dtype and layout; None passes."""
    return all(
        m is None or (m.dtype in HAS_KERNEL and m.is_contiguous(memory_format=torch.channels_last))
        for m in maps
    )


def _cpu(x, weight, bias, residual, eps, relu):
    if not _native_takes(x, residual):
        return reference.batch_norm(x, weight, bias, residual, eps, relu)
    y, mean, var = _outputs(x, weight)
    weight, bias = weight.contiguous(), bias.contiguous()
    _native.batch_norm(y, mean, var, x, weight, bias, residual, eps, relu)
    return y, mean, var


def _cpu_backward(grad, y, x, weight, bias, mean, var, eps, residual_grad):
    if not _native_takes(x, y):
        args = grad, y, x, weight, bias, mean, var, eps, residual_grad
        return reference.batch_norm_backward(*args)
    outputs = _outputs(x, weight)
    over = _native.empty_like(x) if residual_grad else None
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight, mean, var = (row.contiguous() for row in (weight, mean, var))
    bias = None if bias is None else bias.contiguous()
    _native.batch_norm_backward(outputs, over, grad, y, x, weight, bias, mean, var, eps)
    return *outputs, _native.empty((0,), x) if over is None else over


def _outputs(x, weight):
    """What a map, and two rows of channels, is written to."""
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
    reference=reference.batch_norm,
    native=_cpu,
    fake=_fake,
)
_backward = define(
    "batch_norm_backward(Tensor grad, Tensor? y, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor mean, Tensor var, float eps, bool residual_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    reference=reference.batch_norm_backward,
    native=_cpu_backward,
    fake=_fake_backward,
)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, relu):
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var = _batch_norm(x, weight, bias, residual, eps, relu)
        added = residual is not None  # what is read of ReLU's slope is its output, or z anew
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
            backward, (mean, var) = reference.batch_norm_backward, reference.moments(saved[1])
        wanted = ctx.needs_input_grad[3]
        *grads, residual_grad = backward(grad, *saved, mean, var, ctx.eps, wanted)
        return *grads, residual_grad if wanted else None, None, None


def _autograd(*args):
    if transformed():
        return _library.plain["batch_norm"](*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        return _Differentiable.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _batch_norm(*args)


_library._library.impl("batch_norm", _autograd, "Autograd")


def batch_norm(norm, x, activation=None, residual=None):
    """activation(norm(x) + residual), each of the two where given.

    norm: a module, x: its input [B, C, H, W]; residual: what is added; activation: a function or
    module. In train mode the norm's running statistics move as ever.

    It is one kernel forward and one backward, the sum not rounded in between, on a CPU where norm
    is an nn.BatchNorm2d in train mode with all its parameters and statistics, float32, and a
    momentum, x and residual are float32 or bfloat16 of one shape and dtype in channels_last, and no
    hook, replaced forward, torch.compile, torch.func or forward-mode derivative has to see the
    parts. ReLU is within the kernel, another activation follows it. Any other call runs the
    modules.
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
