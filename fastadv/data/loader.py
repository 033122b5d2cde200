"""Batches with explicit augmentation: a view is a number, an epoch a function of its number."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .dataset import ImageSet


class Fields(NamedTuple):
    """One batch: x float32 [B, C, H, W] in [0, 1]; y, index and view int64 [B]."""

    x: Tensor
    y: Tensor
    index: Tensor
    view: Tensor


class Loader:
    """Batches of `split`, whose uint8 images stay resident on `device`.

    `padding` is p and `flips` is F: with them each image is cropped at one of (2p + 1)^2 places and
    mirrored when F is 2, all equally likely. With padding 0 and flips 1 images are as they are and
    every view is 0. The last batch may be smaller.
    """

    def __init__(
        self,
        split: ImageSet,
        batch_size: int,
        *,
        padding: int = 0,
        flips: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        channels_last: bool = False,
        device: str | torch.device = "cpu",
    ):
        if batch_size < 1 or padding < 0 or flips not in (1, 2):
            raise ValueError(
                f"need batch_size >= 1, padding >= 0 and flips of 1 or 2,"
                f" got {batch_size}, {padding} and {flips}"
            )
        self.images, self.labels, self.index = (
            field.to(device) for field in (split.images, split.labels, split.index)
        )
        self.batch_size, self.padding, self.flips = batch_size, padding, flips
        self.shuffle, self.seed, self.channels_last = shuffle, seed, channels_last

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Fields]:
        """The batches of epoch `number`; order and views depend on (seed, number) alone."""
        count, device = len(self.labels), self.labels.device
        generator = torch.Generator().manual_seed(_mix(self.seed, number))
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        views = (2 * self.padding + 1) ** 2 * self.flips
        view = torch.randint(views, (count,), generator=generator)
        order, view = order.to(device), view.to(device)
        layout = {"padding": self.padding, "channels_last": self.channels_last}
        for start in range(0, count, self.batch_size):
            rows, ids = (field[start : start + self.batch_size] for field in (order, view))
            dy, dx, flip = decode_view(ids, self.padding, self.flips)
            x = ops.augment(self.images[rows], dy, dx, flip, **layout)
            yield Fields(x, self.labels[rows], self.index[rows], ids)


def encode_view(dy: Tensor, dx: Tensor, flip: Tensor, padding: int, flips: int) -> Tensor:
    """View ids int64 [B] from row and column offsets 0..2p (int64 [B]) and flip (bool [B])."""
    return (dy * (2 * padding + 1) + dx) * flips + flip.long()


def decode_view(view: Tensor, padding: int, flips: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dy int64 [B], dx int64 [B], flip bool [B]) of view ids; the inverse of `encode_view`."""
    place, span = view // flips, 2 * padding + 1
    return place // span, place % span, view % flips == 1


def _mix(seed: int, epoch: int) -> int:
    """One generator seed from two numbers; hashed, for the generator keeps only its low 32 bits."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest(), "big"
    )
