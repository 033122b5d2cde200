"""Batches with explicit augmentation: each view of an image has a number, and an epoch depends on
its number alone."""

import hashlib
from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import UsageError
from .augmentation import IMAGE, PARTNER, Augmentation, Key, augment_images, draw_mix
from .dataset import ImageSet


class Fields(NamedTuple):
    """One batch: x float32 [B, C, H, W] in [0, 1]; y, index and view int64 [B]. The ids, index and
    view, are on the CPU, where a teacher cache looks them up without waiting for a GPU.

    Where images are mixed y is float32 [B, num_classes], the shares of the two labels.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    view: Tensor


class Loader:
    """Batches of `split` on `device`, where its uint8 images are kept too if they fit.

    `padding` is p and `flips` is F: with them each image is cropped at one of (2p + 1)^2 places and
    mirrored when F is 2, all equally likely. With padding 0 and flips 1 images are as they are and
    every view is 0. The last batch may be smaller.

    `augmentation` adds to that, or crops otherwise. A view is then a number that fixes, with the
    seed, the image's index and (mixup and cutmix only) the split, all that is random: crop, flip,
    policy, cutout, partner and share. `num_classes` is needed when it mixes images.

    `extra` are more images, such as generated ones, which stay where they are (those of a mapped
    file on the disk). With them each batch is full and has round((1 - extra_fraction) batch_size)
    images of the split, in an order of its own each epoch, and then images drawn from `extra`; an
    epoch has as many batches as without. Rows from len(split) on are those of `extra`.

    Of `world` processes the one numbered `rank` gets an equal share of each batch of `batch_size`;
    where the last batch does not divide, the epoch goes on with its first images.
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
        augmentation: Augmentation | None = None,
        num_classes: int | None = None,
        rank: int = 0,
        world: int = 1,
        extra: ImageSet | None = None,
        extra_fraction: float = 0.7,
    ):
        if not isinstance(split, ImageSet):
            raise TypeError(
                f"split is a {type(split).__name__}, must be an ImageSet such as dataset.train"
            )
        sizes = {"batch_size": (batch_size, 1), "padding": (padding, 0), "flips": (flips, 1)}
        for name, (value, least) in sizes.items():
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, must be a whole number of at least {least}")
        if flips > 2:
            raise ValueError(f"flips is {flips}, must be 1 or 2")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, must be in [0, {world - 1}], of world {world}")
        if batch_size % world:
            raise UsageError(
                f"batch_size is {batch_size}, must be divisible by the number of processes, {world}"
            )
        self.augmentation, self.num_classes = augmentation or Augmentation(), num_classes
        if self.augmentation.mixes:
            least = int(split.labels.max()) + 1 if len(split) else 0
            if num_classes is None or num_classes < least:
                raise ValueError(
                    f"num_classes is {num_classes}, must be at least {least} for mixup and cutmix"
                )
        self.device = torch.device(device)
        self.images = split.images.to(resident_on(self.device, split.images.nbytes))
        self.labels, self.index = split.labels.to(device), split.index.cpu()
        self.batch_size, self.padding, self.flips = batch_size, padding, flips
        self.shuffle, self.seed, self.channels_last = shuffle, seed, channels_last
        self.rank, self.world = rank, world
        self.extra, self._own = extra, batch_size
        if extra is not None:
            self._own = round((1 - extra_fraction) * batch_size)
            self._check_extra(split, extra_fraction)

    def _check_extra(self, split, fraction):
        if not 0 < self._own < self.batch_size:
            raise UsageError(
                f"extra_fraction is {fraction}, must leave 1 to {self.batch_size - 1} images of a "
                f"batch of {self.batch_size} to the data set"
            )
        if self.augmentation.mixes:
            raise UsageError("mixup or cutmix is given, must be 0 with extra_data")
        shape, expected = list(self.extra.images.shape[1:]), list(split.images.shape[1:])
        if shape != expected:
            raise ValueError(f"extra.images are {shape} each, must be {expected} as the split's")
        if int(self.extra.index.min()) <= int(split.index.max()):
            raise ValueError("extra.index has numbers of the split's, must be larger than those")

    @property
    def views(self) -> int:
        """How many views an image has: they are numbered 0 to views - 1."""
        places = (2 * self.padding + 1) ** 2 * self.flips
        return places if self.augmentation.plain else self.augmentation.views

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, number: int, skip: int = 0) -> Iterator[Fields]:
        """The batches of epoch `number` after the first `skip`; order and views depend on
        (seed, number) alone."""
        generator = torch.Generator().manual_seed(_mix(self.seed, number))
        order = self._order(generator)
        count = len(order)
        view = torch.randint(self.views, (count,), generator=generator)
        if self.augmentation.views_per_image:  # in turn, from a view of the image's own on
            first = torch.Generator().manual_seed(_mix(self.seed, -1))
            view = (
                torch.randint(self.views, (self._rows,), generator=first)[order] + number
            ) % self.views
        wrapped = torch.arange(count + -count % self.world) % count
        for start in range(skip * self.batch_size, count, self.batch_size):
            chosen = wrapped[start + self.rank : start + self.batch_size : self.world]
            yield self.view_batch(order[chosen], view[chosen])

    @property
    def _rows(self):
        """How many images there are, extra ones included."""
        return len(self.labels) + (0 if self.extra is None else len(self.extra))

    def _order(self, generator):
        """The rows of an epoch, int64, batch after batch."""
        count, batches = len(self.labels), len(self)
        passes = 1 if self.extra is None else -(-batches * self._own // count)
        if self.shuffle:
            order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
        else:
            order = torch.arange(count).repeat(passes)
        if self.extra is None:
            return order
        own = order[: batches * self._own].view(batches, -1)
        shape = batches, self.batch_size - self._own
        more = torch.randint(count, self._rows, shape, generator=generator)
        return torch.cat([own, more], dim=1).flatten()

    def view_batch(self, rows: Tensor, view: Tensor) -> Fields:
        """The images at `rows` of the split in the given views, as an epoch yields them.

        rows, view: int64 [B], 0 to len(split) - 1, or on to those of `extra`, and 0 to views - 1.
        Raises ValueError for others.
        """
        rows, view = rows.cpu(), view.cpu()
        for name, ids, end in (("rows", rows, self._rows), ("view", view, self.views)):
            if len(ids) and not (ids.min() >= 0 and ids.max() < end):
                raise ValueError(f"{name} has a number outside [0, {end})")
        if self.augmentation.plain:
            x, y = self._plain(rows, view)
        else:
            x, y = self._augmented(rows, view)
        return Fields(x, y, self._picked(self.index, "index", rows), view)

    def _of(self, rows, field):
        """The images, labels or index at `rows`, which are on the CPU, on the device."""
        return self._there(self._picked(getattr(self, field), field, rows))

    def _picked(self, own, field, rows):
        """The rows of `own`, which is a field of the split, and of the same one of `extra`, on the
        device of `own`."""
        if self.extra is None:
            return own[rows.to(own.device, non_blocking=True)]
        count, found = len(self.labels), own.new_empty(len(rows), *own.shape[1:])
        for source, first, mask in (
            (own, 0, rows < count),
            (getattr(self.extra, field), count, rows >= count),
        ):
            at = mask.nonzero()[:, 0]
            part = source[(rows[at] - first).to(source.device, non_blocking=True)]
            found[at.to(own.device, non_blocking=True)] = part.to(own.device, non_blocking=True)
        return found

    def _plain(self, rows, view):
        dy, dx, flip = decode_view(self._there(view), self.padding, self.flips)
        images = self._of(rows, "images")
        return self._float(images, dy, dx, flip, self.padding), self._of(rows, "labels")

    def _augmented(self, rows, view):
        index = self._picked(self.index, "index", rows)
        settings, key = self.augmentation, Key(self.seed, index, view)
        x, y = self._strong(rows, key, IMAGE)
        if not settings.mixes:
            return x, y
        partner, *shares = draw_mix(key, settings, len(self.labels), *x.shape[2:])
        weight, share = (self._there(share) for share in shares)
        x_partner, y_partner = self._strong(partner, key, PARTNER)
        classes, share = torch.arange(self.num_classes, device=y.device), share[:, None]
        y, y_partner = (label[:, None] == classes for label in (y, y_partner))
        return weight * x + (1 - weight) * x_partner, share * y + (1 - share) * y_partner

    def _strong(self, rows, key, stream):
        """(x, y) of the images at `rows` as one stream of `key` augments them, not mixed."""
        images = augment_images(
            self._of(rows, "images"), key, stream, self.augmentation, self.padding, self.flips
        )
        still = torch.zeros(len(rows), dtype=torch.int64, device=images.device)
        return self._float(images, still, still, still.bool(), 0), self._of(rows, "labels")

    def _float(self, images, dy, dx, flip, padding):
        return ops.augment(images, dy, dx, flip, padding=padding, channels_last=self.channels_last)

    def _there(self, tensor):
        """A tensor, copied to the device without waiting for it."""
        return tensor.to(self.device, non_blocking=True)


def resident_on(device: torch.device, size: int) -> torch.device:
    """Where `size` bytes of images are kept: on the device, or, for more than half of what a GPU
    has free, on the CPU, from where each batch is copied."""
    large = device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] // 2
    return torch.device("cpu") if large else device


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
