"""What the ops of logits [B, C] with a loss [B] share: checks, memory and registration."""

import torch

from .. import _native, reference
from .._library import FLOATS, define, expect, gradients_from_forward


def check_logits(logits, least=1):
    """[B, C] of a floating point type with C >= least."""
    if logits.dim() != 2 or logits.shape[1] < least:
        shape = tuple(logits.shape)
        raise ValueError(f"logits has shape {shape}, must be [B, C] with C >= {least}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits is {logits.dtype}, must be one of {FLOATS}")


def check_labels(y, logits, name="y"):
    """int64 [B]."""
    expect(name, y, dtype=torch.int64, like=logits, shape=logits.shape[:1])


def define_loss(name, arguments, check):
    """Registers and returns the op `name(Tensor logits, <arguments>, bool grad)`, which gives the
    loss and, where grad is true, its gradient; from the functions of that name in `reference` and
    `_native`. check: as `define` has it."""
    plain, kernel = getattr(reference, name), getattr(_native, name)

    def native(logits, *args):
        if logits.dtype == torch.float64:
            return plain(logits, *args)
        loss, gradient = outputs(logits, args[-1])
        dense = (v.contiguous() if isinstance(v, torch.Tensor) else v for v in args[:-1])
        kernel(loss, gradient, logits.contiguous(), *dense)
        return loss, gradient

    def fake(logits, *args):
        check(logits, *args)
        return outputs(logits, args[-1])

    op = define(
        f"{name}(Tensor logits, {arguments}, bool grad) -> (Tensor, Tensor)",
        check=check,
        reference=plain,
        native=native,
        kernel=name,
        fake=fake,
    )
    gradients_from_forward(op, (0,))
    return op


def outputs(logits, grad):
    """Memory for (loss [B], gradient [B, C] or [0])."""
    dtype = reference.loss_dtype(logits.dtype)
    loss = _native.empty(logits.shape[:1], logits, dtype)
    return loss, _native.empty(logits.shape if grad else (0,), logits)
