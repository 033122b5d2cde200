"""fold_bn_: BatchNorm in eval mode folded into the weights of the convolution before it, of many
convolutions at once.

    scale = gamma / sqrt(var + eps)
    weight_out[o, ...] = weight[o, ...] scale[o];  bias_out = bias scale + beta - mean scale

weight: float32 [O, I, ...]; bias, mean, var, gamma, beta: float32 [O]; weight_out: shape of weight,
bias_out:
[O]; both float32 or bfloat16. Computed in float32. Not differentiable.

A function, no op of torch.library: nothing traces or differentiates it, and a schema of mutated
lists, some of whose tensors are None, would cost more than the kernel.
"""

import importlib
import os

import torch

from . import _library, reference
from ._library import expect

PARTS = ("mean", "var", "gamma", "beta")  # of a norm, before eps
_chosen = _library.backend()
_by_choice = f"FASTADV_BACKEND={_chosen}" if _chosen in ("native", "reference") else None
_missing = _by_choice or _library.triton_missing()
_interpreted = not _missing and os.environ.get("TRITON_INTERPRET") == "1"
_on_cpu = _interpreted and _chosen == "triton"
_kernel = None if _missing else importlib.import_module("fastadv.kernels.fold_bn").fold_bn_
_library.ops["fold_bn_"] = _library.Backends(
    "triton (interpreted)" if _on_cpu else "reference (no kernel)",
    f"reference ({_missing})" if _missing else "triton",
)


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
    on_kernel = _kernel and weights and weights[0].dtype == torch.float32
    on_kernel = on_kernel and (weights[0].is_cuda or (_on_cpu and weights[0].is_cpu))
    run = _kernel if on_kernel else reference.fold_bn_
    run(weights_out, biases_out, weights, biases, norms)
