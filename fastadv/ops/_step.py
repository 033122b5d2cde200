"""Checks of arguments that the steps of attacks share."""

import torch

from . import _native
from ._library import expect


def expect_images(x_adv, norm, **others):
    """Raises TypeError or ValueError unless all are of x_adv's shape, device and dtype, which the
    step can be taken in, and the norm is known."""
    for name, tensor in others.items():
        expect(name, tensor, dtype=x_adv.dtype, like=x_adv, shape=x_adv.shape)
    if x_adv.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x_adv is {x_adv.dtype}, must be torch.float32: one bfloat16 step of 2/255 already "
            "leaves an 8/255 ball; cast the model's input instead"
        )
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}, must be 'linf' or 'l2'")


def expect_unrecorded(op, **mutated):
    """Raises RuntimeError where autograd records a tensor that the op would overwrite."""
    for name, tensor in mutated.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad: call {op} under torch.no_grad() or detach it"
            )


def expect_apart(mutated, others):
    """Raises ValueError where a tensor of `mutated` shares memory with one of either; both map
    names to tensors."""
    spans = [(name, *_extent(tensor)) for name, tensor in (mutated | others).items()]
    for i, (name, start, end) in enumerate(spans[: len(mutated)]):
        for other, other_start, other_end in spans[i + 1 :]:
            if start < other_end and other_start < end:
                raise ValueError(f"{name} overlaps {other} in memory, must be apart from it")


def _extent(tensor):
    start = tensor.data_ptr()
    if _native.is_dense(tensor):
        return start, start + tensor.nbytes
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (last + 1) * tensor.element_size() * (tensor.numel() > 0)
