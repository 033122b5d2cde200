"""Progress of work that may take long."""

import torch
from tqdm import tqdm

from . import parallel

DELAY = 2.0  # seconds; what takes less has no bar
PIECE = 1 << 24  # bytes


def bar(items=None, text=None, **options):
    """A tqdm bar over `items`, named `text`, that is gone when they are done. It appears after
    DELAY, where somebody watches, and of several processes in the first."""
    hidden = parallel.rank() > 0 or None  # None: where nobody watches
    return tqdm(items, text, **{"leave": False, "delay": DELAY, "disable": hidden} | options)


def pieces(tensor):
    """The bytes of a tensor, row by row of its first dimension, as uint8 arrays of about PIECE at
    most: of a large tensor no copy is made, whatever its strides and device. For hashes."""
    tensor = tensor.detach() if tensor.dim() else tensor.detach()[None]
    rows = max(1, PIECE * len(tensor) // max(1, tensor.nbytes))
    with bar(text="hash", total=tensor.nbytes, unit="B", unit_scale=True) as shown:
        for part in tensor.split(rows):
            dense = part.cpu().contiguous().squeeze()  # a size of 1 may have any stride
            piece = dense.reshape(-1).view(torch.uint8).numpy()
            yield piece
            shown.update(len(piece))
