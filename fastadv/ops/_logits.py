"""What the ops of logits [B, C] with a loss [B] share: checks and memory for the outputs."""

import torch

from .. import _native, reference
from .._library import FLOATS, expect


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


def outputs(logits, grad):
    """Memory for (loss [B], gradient [B, C] or [0])."""
    dtype = reference.loss_dtype(logits.dtype)
    loss = _native.empty(logits.shape[:1], logits, dtype)
    return loss, _native.empty(logits.shape if grad else (0,), logits)
