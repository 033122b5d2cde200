"""Asking a network for its logits, whatever it returns them in, whichever dtype it computes in and
whichever mode it is in."""

import contextlib
from collections.abc import Mapping

import torch


def logits_of(output):
    """The logits [B, C] in the output of a network.

    The output may be the logits themselves, an object with an attribute `logits` (as of Hugging
    Face and torchvision's Inception), a mapping with an entry "logits", or a tuple or list whose
    first item has two dimensions and is the only such item. Raises TypeError for others.
    """
    found = output
    if not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        if found is None and isinstance(output, (tuple, list)):
            rows = [item for item in output if isinstance(item, torch.Tensor) and item.dim() == 2]
            found = output[0] if len(rows) == 1 and output[0] is rows[0] else None
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"model returned {_described(output)}, must return logits: a tensor [B, C], an object "
            "with .logits, a dict with 'logits', or a tuple whose first item alone is [B, C]"
        )
    return found


def ask(model, x):
    """The logits of a model for images x [B, ...], which are cast to the dtype of the model's
    parameters, such as bfloat16 or float64; their gradient comes back in the dtype of x."""
    return logits_of(model(cast_to(model, x)))


def cast_to(model, x):
    """x in the model's dtype; x itself if the model has none, or x is not in floating point."""
    return x.to(dtype_of(model, x.dtype)) if x.is_floating_point() else x


def dtype_of(model, default=torch.float32):
    """The dtype of the model's first parameter in floating point, or of its first such buffer if it
    has no such parameter; `default` if it has neither."""
    if isinstance(model, torch.nn.Module):
        for tensors in (model.parameters(), model.buffers()):
            for tensor in tensors:
                if tensor.is_floating_point():
                    return tensor.dtype
    return default


@contextlib.contextmanager
def evaluating(model):
    """A context in which every module of the model is in eval mode; the modules that were not are
    put back into train mode after it, also after an exception."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _described(output):
    """A wrong output in words: its type, and those of its items."""
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, (tuple, list)):
        items = (
            str(list(i.shape)) if isinstance(i, torch.Tensor) else type(i).__name__ for i in output
        )
        return f"a {type(output).__name__} of {', '.join(items) or 'nothing'}"
    return f"a {type(output).__name__}"
