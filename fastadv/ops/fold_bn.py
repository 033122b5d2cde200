"""fold_bn_: BatchNorm in eval mode folded into the weights of the convolution before it, of many
convolutions at once.

    scale = gamma / sqrt(var + eps)
    weight_out[o, ...] = weight[o, ...] scale[o];  bias_out = bias scale + beta - mean scale

weight: float32 [O, I, ...]; bias, mean, var, gamma, beta: float32 [O]; weight_out: shape of weight,
bias_out: [O]; both float32 or bfloat16. Computed in float32. Not differentiable.

A function, no op of torch.library: nothing traces or differentiates it, and a schema of mutated
lists, some of whose tensors are None, would cost more than the kernel.
"""

import torch

from ._library import choose, expect
from ._reference import per_sample

PARTS = ("mean", "var", "gamma", "beta")  # of a norm, before eps


def _check(i, fold, low, like):
    """Raises unless this convolution has tensors that a kernel can find by their addresses."""
    out, bias_out, weight, bias, norm = fold
    dtype = low if low == torch.bfloat16 else like.dtype
    expect(f"weights[{i}]", weight, dtype=like.dtype, like=like)
    expect(f"weights_out[{i}]", out, dtype=dtype, like=like, shape=weight.shape)
    layout = torch.channels_last if out.dim() == 4 else torch.contiguous_format
    if not out.is_contiguous(memory_format=layout):
        raise ValueError(f"weights_out[{i}] has strides {out.stride()}, must be {layout}")
    row = weight.shape[:1]
    if bias_out is not None:
        expect(f"biases_out[{i}]", bias_out, dtype=dtype, like=like, shape=row)
        if not bias_out.is_contiguous():
            raise ValueError(f"biases_out[{i}] has stride {bias_out.stride(0)}, must be contiguous")
    for name, tensor in zip(("biases", *PARTS), (bias, *(norm or [None] * 4)[:4]), strict=True):
        if tensor is not None:
            expect(f"{name}[{i}]", tensor, dtype=like.dtype, like=like, shape=row)


def bn_affine(mean, var, gamma, beta, eps):
    """(scale, shift) [C] of a BatchNorm in eval mode: gamma / sqrt(var + eps), beta - mean scale;
    gamma and beta may be None for 1 and 0."""
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def reference(weights_out, biases_out, weights, biases, norms):
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


def _triton():
    from ..kernels.fold_bn import fold_bn_

    return fold_bn_


def _takes(weights_out, biases_out, weights, biases, norms):
    return weights[0].dtype == torch.float32


_on_cpu, _on_gpu = choose("fold_bn_", reference, triton=_triton, takes=_takes)


def fold_bn_(weights_out, biases_out, weights, biases, norms):
    """Writes weights_out and biases_out as this file's formula has it; sequences of one length.

    biases_out, biases: None where there is none; norms: (mean, var, gamma, beta, eps), gamma or
    beta None for 1 or 0, or None: scale 1 and shift 0. weights_out: one dtype; channels_last where
    they have four dimensions, else contiguous. Raises TypeError or ValueError that names the
    argument at fault.
    """
    sequences = weights_out, biases_out, weights, biases, norms
    for i, fold in enumerate(zip(*sequences, strict=True)):
        _check(i, fold, weights_out[0].dtype, weights[0])
    if weights:
        (_on_gpu if weights[0].is_cuda else _on_cpu)(*sequences)
