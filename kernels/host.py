"""What the launchers share: layouts, versions and reductions. It needs torch alone, so that the
other backends of the ops use it too."""

import math

import torch


def is_dense(tensor):
    """Whether the elements fill one block of memory, one sample after another."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def mutated(*tensors):
    """Tells autograd that a kernel overwrote these, which it cannot see; None passes."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def reduction_factor(reduction, shape):
    """The factor of a sum over rows of this shape [B, C]; "mean" is over B C elements. It is 1 for
    an empty batch, whose loss is then 0."""
    count = {"batchmean": shape[0], "mean": math.prod(shape)}.get(reduction, 1)
    return 1 / max(count, 1)
