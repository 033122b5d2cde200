"""bias_relu: what follows a convolution of a frozen network in one pass.

    v = x + bias + residual;  y = min(max(v, 0), cap);  dx = dresidual = dy [0 < v < cap]

x, residual, y: [B, C, H, W] in channels_last; bias: [C], a constant. The backward pass reads one
bit per element, not an activation, and adds up two gradients of y on its way.
"""

import math

import torch
import torch.nn.functional as F

from ._library import FLOATS, define, expect, expect_constant, expect_tensors, ops
from ._reference import at_least_fp32
from ._torch import transformed

NHWC = torch.channels_last


def _check(x, bias, residual, cap):
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}, must be one of {FLOATS}")
    _check_map("x", x)
    if residual is not None:
        expect("residual", residual, dtype=x.dtype, like=x, shape=x.shape)
        _check_map("residual", residual)
    if bias is not None:
        expect("bias", bias, dtype=x.dtype, like=x, shape=x.shape[1:2])
    if not cap > 0:
        raise ValueError(f"cap is {cap}, must be above 0")


def _check_map(name, tensor):
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be [B, C, H, W]")
    if not tensor.is_contiguous(memory_format=NHWC):
        raise ValueError(f"{name} has strides {tensor.stride()}, must be channels_last")


def _check_backward(grad, other, bits):
    _check_map("grad", grad)
    if other is not None:
        expect("other", other, dtype=grad.dtype, like=grad, shape=grad.shape)
        _check_map("other", other)
    expect("bits", bits, dtype=torch.uint8, like=grad, shape=(-(-grad.numel() // 8),))


def reference(x, bias, residual, cap):
    """(y, bits): y = min(max(x + bias + residual, 0), cap), summed in float32 for halves, and where
    0 < v < cap, or v is NaN, in the order of memory, eight elements a byte, the first the
    lowest."""
    v = at_least_fp32(x)
    if bias is not None:
        v = v + bias.to(v.dtype)[:, None, None]
    if residual is not None:
        v = v + residual
    passes = v.isnan() | ((v > 0) if cap == math.inf else (v > 0) & (v < cap))
    flags = passes.permute(0, 2, 3, 1).flatten().to(torch.uint8)
    flags = F.pad(flags, (0, -len(flags) % 8)).view(-1, 8)
    bits = (flags << _shifts(flags)).sum(dim=1, dtype=torch.uint8)
    y = F.relu(v) if cap == math.inf else F.hardtanh(v, 0, cap)
    return y.to(x.dtype, memory_format=NHWC), bits


def reference_backward(grad, other, bits):
    """grad + other, summed in float32 for halves, where the bit is set, and 0 elsewhere."""
    total = at_least_fp32(grad)
    if other is not None:
        total = total + other
    batch, channels, *size = grad.shape
    passes = ((bits[:, None] >> _shifts(bits)) & 1).flatten()[: grad.numel()]
    passes = passes.view(batch, *size, channels).permute(0, 3, 1, 2).bool()
    return torch.where(passes, total, 0).to(grad.dtype).contiguous(memory_format=NHWC)


def _shifts(like):
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _fake(x, bias, residual, cap):
    _check(x, bias, residual, cap)
    return torch.empty_like(x), x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)


def _fake_backward(grad, other, bits):
    _check_backward(grad, other, bits)
    return torch.empty_like(grad)


def _triton():
    from ..kernels.bias_relu import bias_relu

    return bias_relu


def _triton_backward():
    from ..kernels.bias_relu import bias_relu_backward

    return bias_relu_backward


_bias_relu = define(
    "bias_relu(Tensor x, Tensor? bias, Tensor? residual, float cap) -> (Tensor, Tensor)",
    check=_check,
    reference=reference,
    triton=_triton,
    fake=_fake,
)
_backward = define(
    "bias_relu_backward(Tensor grad, Tensor? other, Tensor bits) -> Tensor",
    check=_check_backward,
    reference=reference_backward,
    triton=_triton_backward,
    fake=_fake_backward,
)


class _Masked(torch.autograd.Function):
    """bias_relu_backward, itself differentiable: it is linear in grad and other."""

    @staticmethod
    def forward(ctx, grad, other, bits):
        ctx.save_for_backward(bits)
        ctx.pair = other is not None
        given = (v if v is None else v.contiguous(memory_format=NHWC) for v in (grad, other))
        return _backward(*given, bits)

    @staticmethod
    def backward(ctx, grad):
        masked = _Masked.apply(grad, None, *ctx.saved_tensors)
        return masked, masked if ctx.pair else None, None


class Fused(torch.autograd.Function):
    """y twice, for two readers, so that their gradients come apart and are added up here."""

    @staticmethod
    def forward(ctx, x, bias, residual, cap):
        y, bits = _bias_relu(x, bias, residual, cap)
        ctx.save_for_backward(bits)
        ctx.added = residual is not None
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    def backward(ctx, *gradients):
        grad, *more = [gradient for gradient in gradients if gradient is not None] or [None]
        if grad is not None:
            grad = _Masked.apply(grad, more[0] if more else None, *ctx.saved_tensors)
        return grad, None, grad if ctx.added else None, None


def bias_relu(x, bias=None, residual=None, cap=math.inf):
    """(y, y): min(max(x + bias + residual, 0), cap) twice, as one tensor in memory.

    x, residual: [B, C, H, W] of one floating dtype, in channels_last. bias: [C] in the same dtype,
    a constant. cap: float above 0, such as 6 for ReLU6. A network that reads y in two places, as at
    the start of a residual block, reads each of the two in one of them: the backward pass then adds
    up their gradients as it masks them. Differentiable in x and residual, as often as you like. On
    a CPU, which has no kernel of it, these are torch's own ops. NaN stays, and lets its gradient
    pass. Raises TypeError or ValueError that names the argument at fault.
    """
    expect_tensors(x=x)
    if bias is not None:
        expect_constant("bias", bias, instead="")
    kernel = ops["bias_relu"].cuda if x.is_cuda else ops["bias_relu"].cpu
    if kernel.startswith("reference") or transformed():
        _check(x, bias, residual, cap)
        y = x if bias is None else x + bias[:, None, None]
        y = y if residual is None else y + residual
        y = F.relu(y) if cap == math.inf else F.hardtanh(y, 0.0, cap)
        return y, y
    return Fused.apply(x, bias, residual, cap)
