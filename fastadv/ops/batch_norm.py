"""batch_norm: BatchNorm over the batch, with the residual sum and the ReLU that follow it.

    y = f((x - mean) weight / sqrt(var + eps) + bias + residual),  f(z) = max(z, 0) or z

x, residual, y: [B, C, H, W] in one dtype; mean, var (biased) over B, H and W, weight, bias: [C],
float32 where x is a half. Differentiable in x, weight, bias and residual; Ioffe and Szegedy 2015.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import _library, _native, reference
from .._library import FLOATS, define, expect

HAS_KERNEL = torch.float32, torch.bfloat16
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _check(x, weight, bias, residual, eps, relu):
    _check_maps(x, residual=residual)
    _check_rows(x, weight=weight, bias=bias)


def _check_backward(grad, y, x, weight, bias, mean, var, eps, relu, residual_grad):
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
    for name, row in rows.items():
        expect(name, row, dtype=torch.promote_types(x.dtype, torch.float32), like=x)
        expect(name, row, shape=x.shape[1:2])


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


def _cpu_backward(grad, y, x, weight, bias, mean, var, eps, relu, residual_grad):
    if not _native_takes(x, y):
        args = grad, y, x, weight, bias, mean, var, eps, relu, residual_grad
        return reference.batch_norm_backward(*args)
    outputs = _outputs(x, weight)
    over = _native.empty_like(x) if residual_grad else None
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight, bias, mean, var = (row.contiguous() for row in (weight, bias, mean, var))
    after, alone = (y, None) if y is not None else (None, bias)
    if not relu:
        after = alone = None
    _native.batch_norm_backward(outputs, over, grad, after, x, weight, alone, mean, var, eps)
    return *outputs, _native.empty((0,), x) if over is None else over


def _outputs(x, weight):
    """What a map, and two rows of channels, is written to."""
    rows = (_native.empty(weight.shape, weight) for _ in range(2))
    return _native.empty_like(x), *rows


def _fake(x, weight, bias, residual, eps, relu):
    _check(x, weight, bias, residual, eps, relu)
    return torch.empty_like(x), *(weight.new_empty(weight.shape) for _ in range(2))


def _fake_backward(grad, y, x, weight, bias, mean, var, eps, relu, residual_grad):
    _check_backward(grad, y, x, weight, bias, mean, var, eps, relu, residual_grad)
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
    "batch_norm_backward(Tensor grad, Tensor? y, Tensor x, Tensor weight, Tensor bias, "
    "Tensor mean, Tensor var, float eps, bool relu, bool residual_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
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
        after = y if relu and residual is not None else None
        ctx.save_for_backward(after, x, weight, bias, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.relu = eps, relu
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
        *grads, residual_grad = backward(grad, *saved, mean, var, ctx.eps, ctx.relu, wanted)
        return *grads, residual_grad if wanted else None, None, None


def _autograd(*args):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        return _Differentiable.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _batch_norm(*args)


_library._library.impl("batch_norm", _autograd, "Autograd")


def batch_norm(norm, x, activation=None, residual=None):
    """activation(norm(x) + residual), each of the two where given.

    norm: a module, x: its input [B, C, H, W]; residual: like x; activation: a function or module.
    One kernel forward and one backward where norm is an nn.BatchNorm2d in train mode that nothing
    hooks, activation is ReLU or None, and the maps are channels_last on a CPU; else what the
    formula says. A sum within the kernel is not rounded to a half in between.
    """
    if not _fused(norm, x, residual):
        out = norm(x)
        out = out if residual is None else out + residual
        return out if activation is None else activation(out)
    relu = activation in (F.relu, torch.relu) or type(activation) is nn.ReLU
    y, mean, var = _batch_norm(x, norm.weight, norm.bias, residual, norm.eps, relu)
    with torch.no_grad():
        count = x.numel() // len(mean)
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
    return y if relu or activation is None else activation(y)


def _fused(norm, x, residual):
    """Whether the CPU kernel takes this call and nothing else has to see its parts."""
    if _library.ops["batch_norm"].cpu != "native" or torch.compiler.is_compiling():
        return False
    if type(norm) is not nn.BatchNorm2d or type(x) is not torch.Tensor or not x.is_cpu:
        return False
    if x.dim() != 4 or x.numel() <= x.shape[1] or any(getattr(norm, kind) for kind in HOOKS):
        return False
    usual = norm.training and norm.affine and norm.track_running_stats and norm.momentum
    if not usual or norm.weight.dtype != torch.float32 or not _native_takes(x, residual):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func
        return False
    return residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
