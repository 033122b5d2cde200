"""The form that every data set is read into, and the split that is held out of it."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

SHOWN = 10  # classes that a warning names


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, C, H, W], labels int64 [N] and index int64 [N], all on the CPU.

    `index` is the image's position in the set as published, so it names the image for good.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> "ImageSet":
        """The subset at `rows` (int64), in that order, with the indices it had."""
        return ImageSet(self.images[rows], self.labels[rows], self.index[rows])


@dataclass(frozen=True)
class Dataset:
    """Three splits and the augmentation that belongs to them.

    Crops are taken after zero padding by `padding` pixels on each side; `flips` is 2 when mirrored
    images keep their class and 1 when they do not. `index` of val counts in train's set.
    """

    name: str
    num_classes: int
    padding: int
    flips: int
    train: ImageSet
    val: ImageSet
    test: ImageSet


def image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """The ImageSet of arrays uint8 [N, C, H, W] and integer [N], in the order as published."""
    images = torch.from_numpy(np.array(images, order="C"))
    labels = torch.from_numpy(labels.astype(np.int64))
    return ImageSet(images, labels, torch.arange(len(labels)))


def cut(full: ImageSet, *sizes: int, seed: int) -> list[ImageSet]:
    """Disjoint random subsets of the given sizes, the last one being all that remains."""
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))
    return [full.take(rows) for rows in order.split([*sizes, len(full) - sum(sizes)])]


def check_dataset(dataset: Dataset, name: str) -> Dataset:
    """`dataset` as the reader `name` returned it. Raises UsageError unless it is a Dataset as the
    class says: its splits have images of one shape and labels of its classes."""
    if not isinstance(dataset, Dataset):
        raise UsageError(f"{name} returned a {type(dataset).__name__}, must return a data.Dataset")
    if type(dataset.num_classes) is not int:
        raise UsageError(f"{name}: num_classes is {dataset.num_classes!r}, must be an int")
    splits = {which: getattr(dataset, which) for which in ("train", "val", "test")}
    for which, split in splits.items():
        for field in ("images", "labels", "index"):
            if not isinstance(value := getattr(split, field, None), Tensor):
                kind = type(value).__name__
                raise UsageError(f"{name}: {which}.{field} is a {kind}, must be a tensor")
    shape = dataset.train.images.shape[1:]
    for which, split in splits.items():
        images, count = split.images, len(split.images)
        alike = images.dim() == 4 and images.shape[1:] == shape
        if images.dtype != torch.uint8 or not alike or not count:
            found = f"{images.dtype} {list(images.shape)}"
            raise UsageError(f"{name}: {which}.images are {found}, must be uint8 [N, C, H, W]")
        for field in ("labels", "index"):
            numbers = getattr(split, field)
            if numbers.dtype != torch.int64 or numbers.shape != (count,):
                found = f"{numbers.dtype} {list(numbers.shape)}"
                raise UsageError(f"{name}: {which}.{field} are {found}, must be int64 [{count}]")
        least, most = split.labels.min(), split.labels.max()
        if least < 0 or most >= dataset.num_classes:
            raise UsageError(
                f"{name}: {which}.labels lie in {least}..{most}, must be in "
                f"0..{dataset.num_classes - 1}"
            )
    return dataset


def check_classes(dataset: Dataset) -> Dataset:
    """Returns `dataset`, and warns of classes without a training image, of which a network can
    learn nothing."""
    count = torch.bincount(dataset.train.labels, minlength=dataset.num_classes)
    empty = (count == 0).nonzero().flatten().tolist()
    if not empty:
        return dataset
    shown = ", ".join(map(str, empty[:SHOWN])) + (", ..." if len(empty) > SHOWN else "")
    text = f"{len(empty)} of {dataset.num_classes} classes have no training image: {shown}"
    first = min(int(split.labels.min()) for split in (dataset.train, dataset.val, dataset.test))
    if first > 0:
        text += f"; labels begin at {first}, must count from 0"
    warnings.warn(f"data set {dataset.name!r}: {text}", stacklevel=3)
    return dataset
