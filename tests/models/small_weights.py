"""A few weights, and how the tests of weight files read them back."""

import torch

from fastadv.models import weight_files

WEIGHTS = {
    "conv.weight": torch.arange(108.0).view(4, 3, 3, 3),
    "bn.num_batches_tracked": torch.tensor(7),
}


def read(path):
    """The weights under the shortest of their names."""
    return weight_files.read(path)[-1]


def same(found):
    return found.keys() == WEIGHTS.keys() and all(
        found[k].dtype == WEIGHTS[k].dtype and torch.equal(found[k], WEIGHTS[k]) for k in found
    )
