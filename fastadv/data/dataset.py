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

    def sample(self, count: int, seed: int = 0) -> "ImageSet":
        """`count` images drawn without replacement, the same ones for each `seed`, in the order
        that they have here; all where there are no more."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].sort().values)


@dataclass(frozen=True)
class Dataset:
    """Three splits and the augmentation that belongs to them.

    Crops are taken after zero padding by `padding` pixels on each side; `flips` is 2 when mirrored
    images keep their class and 1 when they do not. `index` of val counts in train's set where val
    was held out of it. `classes` has the names of the classes, if they have any.
    `mixed`: the images are published in an order that has nothing to do with their classes, so that
    the first N stand for all; those of folders lie class by class.
    """

    name: str
    num_classes: int
    padding: int
    flips: int
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...] = ()
    mixed: bool = False

    def counted(self) -> str:
        """How many images and classes there are, in words."""
        train, val, test = (f"{len(s):,}" for s in (self.train, self.val, self.test))
        images = f"{train} images to train on, {val} to validate, {test} to test"
        return f"{self.name}: {images}; {self.num_classes} classes"


def mapped_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that is mapped from a file, to be read alone."""
    with warnings.catch_warnings():  # torch warns that nobody may write to it
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


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
    class says: its splits have images of one shape, labels of its classes and an index that names
    each image."""
    if not isinstance(dataset, Dataset):
        raise UsageError(f"{name} returned a {type(dataset).__name__}, must return a data.Dataset")
    for field, least, most in (("num_classes", 1, 2**31), ("padding", 0, 2**10), ("flips", 1, 2)):
        value = getattr(dataset, field)
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"{name}: {field} is {value!r}, must be an int in [{least}, {most}]")
    for which in ("train", "val", "test"):
        split = check_split(getattr(dataset, which), f"{name}: {which}", dataset.num_classes)
        shape, wanted = list(split.images.shape), list(dataset.train.images.shape[1:])
        if shape[1:] != wanted:
            raise UsageError(
                f"{name}: {which}.images are {shape}, must be {wanted} each as those of train"
            )
    return dataset


def check_split(split: ImageSet, what: str, num_classes: int | None = None) -> ImageSet:
    """`split`, which `what` names. Raises UsageError unless it is an ImageSet as the class says,
    with labels below `num_classes`, if they are known."""
    for field in ("images", "labels", "index"):
        if not isinstance(value := getattr(split, field, None), Tensor):
            raise UsageError(f"{what}.{field} is a {type(value).__name__}, must be a tensor")
    images, count = split.images, len(split.images)
    if images.dtype != torch.uint8 or images.dim() != 4 or not count:
        found = f"{images.dtype} {list(images.shape)}"
        raise UsageError(f"{what}.images are {found}, must be uint8 [N, C, H, W]")
    if images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        raise UsageError(
            f"{what}.images are {list(images.shape)}, must be [N, C, H, W]: "
            "images.permute(0, 3, 1, 2)"
        )
    for field in ("labels", "index"):
        numbers = getattr(split, field)
        if numbers.dtype != torch.int64 or numbers.shape != (count,):
            found = f"{numbers.dtype} {list(numbers.shape)}"
            raise UsageError(f"{what}.{field} are {found}, must be int64 [{count}]")
    least, most = int(split.labels.min()), int(split.labels.max())
    if least < 0 or most >= (num_classes or 2**31):
        wanted = f"in 0..{num_classes - 1}" if num_classes else "whole numbers from 0 on"
        raise UsageError(f"{what}.labels lie in {least}..{most}, must be {wanted}")
    _check_index(split, f"{what}.index")
    return split


def _check_index(split: ImageSet, what: str) -> None:
    """Raises UsageError unless the index of `split` names each image: a teacher cache would take
    images of one number for one image. An image may be there more than once."""
    least, most = int(split.index.min()), int(split.index.max())
    if least < 0 or most >= 2**32:
        raise UsageError(f"{what} lies in {least}..{most}, must be in 0..{2**32 - 1}")
    numbers, place = split.index.unique(return_inverse=True)
    if len(numbers) == len(split):
        return
    one = torch.empty_like(numbers)
    one[place] = torch.arange(len(split))
    if not torch.equal(split.images[one[place]], split.images):
        raise UsageError(f"{what} has the same number for different images: number each by itself")


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
