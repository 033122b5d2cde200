"""Any torch Dataset, or sequence, of images and labels in fastadv's own form."""

import operator
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from ..errors import UsageError
from ..runs.progress import bar
from . import pictures
from .dataset import Dataset, ImageSet, check_classes, check_split, cut

HELD_OUT = 1_000
MAX_CLASSES = 100_000
IMAGE, LABEL = ("image", "img"), ("label", "labels", "fine_label")  # Hugging Face's names
CHUNK = 1024  # images of a tensor that are converted at once
NEAR = 1e-3  # of a level of 255: float32 rounds k/255 by less, float16 by more and is refused


def from_dataset(
    train,
    test,
    *,
    val=None,
    name: str = "dataset",
    num_classes: int | None = None,
    padding: int | None = None,
    flips: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A Dataset of torch Datasets or sequences, without random transforms.

    train, test, val: items are pairs (image, label) or dictionaries with "image" or "img", and
    "label", "labels" or "fine_label". An image is a Pillow image, uint8 [H, W], [H, W, C] or
    [C, H, W] with C of 1 or 3, or floats k/255 as torchvision's ToTensor makes them, which become
    uint8 again; a label is a whole number from 0. Without val a tenth of train, at most 1000, is
    held out, which `seed` fixes.
    num_classes: None takes the largest label plus one.
    padding, flips: as in Dataset. None pads colour images of 16 pixels and wider by an eighth of
    their width and mirrors them; smaller or grey ones get 1 and no flips.
    image_size: resizes the largest centred square of each image to so many pixels, by Pillow.
    Raises UsageError that names the split and the item, counted from 0.
    """
    given = {"train": train, "test": test} | ({} if val is None else {"val": val})
    splits = {
        split: check_split(as_image_set(items, split, num_classes, image_size), split, num_classes)
        for split, items in given.items()
    }
    shapes = {split: list(part.images.shape[1:]) for split, part in splits.items()}
    for split, shape in shapes.items():
        if shape != shapes["train"]:
            raise UsageError(f"{split} images are {shape} each, must be {shapes['train']} as train")
    if val is None:
        if (count := len(splits["train"])) < 10:
            raise UsageError(f"train has {count} items, must have 10 or more without a val")
        held_out = min(HELD_OUT, count // 10)
        splits["val"], splits["train"] = cut(splits["train"], held_out, seed=seed)
    num_classes = num_classes or 1 + max(int(part.labels.max()) for part in splits.values())
    channels, _, width = shapes["train"]
    usual = (width // 8, 2) if channels == 3 and width >= 16 else (1, 1)
    padding = usual[0] if padding is None else padding
    flips = usual[1] if flips is None else flips
    return check_classes(Dataset(name, num_classes, padding, flips, **splits))


def as_image_set(
    items, split: str = "split", num_classes: int | None = None, image_size: int | None = None
) -> ImageSet:
    """The ImageSet of a torch Dataset or sequence, whose index is the place of an item; what has
    images, labels and index is returned as it is. Arguments and errors are `from_dataset`'s."""
    if all(hasattr(items, field) for field in ("images", "labels", "index")):
        return items
    indexed = hasattr(items, "__getitem__") and hasattr(items, "__len__")
    if not indexed or isinstance(items, (str, bytes, Mapping, IterableDataset)):
        kind = type(items).__name__
        raise UsageError(f"{split} is a {kind}, must be a Dataset or sequence that has a length")
    if not len(items):
        raise UsageError(f"{split} has no items, must have one or more")
    tensors = items.tensors if type(items) is TensorDataset and image_size is None else ()
    if len(tensors) == 2 and tensors[0].dim() in (3, 4) and tensors[1].dim() == 1:
        images, labels = _at_once(*tensors, split, num_classes)
    else:
        images, labels = _one_by_one(items, split, num_classes, image_size)
    return ImageSet(images, labels, torch.arange(len(labels)))


def _at_once(images, labels, split, num_classes):
    """(uint8 [N, C, H, W], int64 [N]) of tensors."""
    images, labels = images.detach().cpu(), labels.detach().cpu()
    parts = zip(range(0, len(images), CHUNK), images.split(CHUNK), strict=True)
    images = torch.cat([_pixels(part, split, first) for first, part in parts])
    numbers = labels.long()
    wrong = (numbers < 0) | (numbers >= (num_classes or MAX_CLASSES))
    if labels.dtype == torch.bool or labels.is_floating_point():
        wrong[0] = True
    for i in wrong.nonzero()[:1, 0].tolist():
        _label(labels[i], f"{split} item {i}", num_classes)
    return images.contiguous(), numbers


def _one_by_one(items, split, num_classes, image_size):
    """(uint8 [N, C, H, W], int64 [N]) of the items of anything."""
    if image_size is not None:
        pictures.need_pillow()
    images, labels = [], []
    for i in bar(range(len(items)), f"read {split}", unit="image"):
        image, label = _pair(items[i], f"{split} item {i}")
        images.append(_image(image, split, i, image_size))
        labels.append(_label(label, f"{split} item {i}", num_classes))
    if any(len(image) == 3 for image in images):  # grey ones among coloured ones
        images = [image.expand(3, -1, -1) for image in images]
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            raise UsageError(
                f"{split} item {i} is {list(image.shape)}, must be {list(images[0].shape)} as item "
                "0 is; image_size resizes images to one size"
            )
    return torch.stack(images), torch.tensor(labels)


def _pair(item, what):
    """(image, label) of an item."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item
    if not isinstance(item, Mapping):
        kind = type(item).__name__
        raise UsageError(f"{what} is a {kind}, must be a pair (image, label) or a dictionary")
    keys = [next((key for key in keys if key in item), None) for keys in (IMAGE, LABEL)]
    if None in keys:
        raise UsageError(
            f"{what} has the keys {', '.join(map(str, item))}, must have {' or '.join(IMAGE)}, and "
            f"{' or '.join(LABEL)}"
        )
    return item[keys[0]], item[keys[1]]


def _label(label, what, num_classes):
    """A label as an int."""
    flag = isinstance(label, (bool, np.bool_)) or getattr(label, "dtype", None) == torch.bool
    try:
        number = None if flag else operator.index(label)
    except TypeError:
        number = None
    if number is None:
        raise UsageError(f"{what} has the label {label!r}, must be a whole number")
    limit = num_classes or MAX_CLASSES
    if not 0 <= number < limit:
        raise UsageError(f"{what} has the label {number}, must be in 0..{limit - 1}")
    return number


def _image(image, split, i, image_size):
    """An image of any form as uint8 [C, H, W]."""
    if hasattr(image, "mode") and hasattr(image, "convert"):  # Pillow's, which may be missing here
        if image.mode in ("I", "F"):
            raise UsageError(
                f"{split} item {i} is a Pillow image of mode {image.mode}, whose range is not "
                "known: must have 8 or 16 bits"
            )
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I;")
        image = np.array(pictures.rgb(image).convert("L" if grey else "RGB"))
    if isinstance(image, np.ndarray) and image.dtype.kind in "uif":
        image = np.ascontiguousarray(image, image.dtype.newbyteorder("="))
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor):
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(
            f"{split} item {i} has an image of {kind}, must be of Pillow, a tensor or an array"
        )
    image = _pixels(image.detach().cpu()[None], split, i)[0]
    if image_size is None:
        return image
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().numpy())
    return torch.from_numpy(pictures.square(picture, image_size).copy())


def _pixels(images, split, first):
    """uint8 [N, C, H, W] of uint8 or of floats, with channels anywhere; first: number of the first
    item, for messages."""
    shape = list(images.shape[1:])
    if images.dim() == 3:
        images = images[:, None]
    elif images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    kind = images.dtype == torch.uint8 or images.is_floating_point()
    if not kind or images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        found = f"{str(images.dtype).removeprefix('torch.')} {shape}"
        raise UsageError(
            f"{split} item {first} is {found}, must be uint8, or floats in [0, 1], [H, W], "
            "[H, W, C] or [C, H, W] with C of 1 or 3"
        )
    return images if images.dtype == torch.uint8 else _levels(images, split, first)


def _levels(images, split, first):
    """uint8 [N, ...] of floats k/255 [N, ...]."""
    scaled = images * 255
    levels = scaled.round()
    rules = {
        "in [0, 1]": ~((images >= 0) & (images <= 1)),  # NaN too
        "multiples of 1/255": (scaled - levels).abs() > NEAR,
    }
    for rule, wrong in rules.items():
        for i in wrong.flatten(1).any(1).nonzero()[:1, 0].tolist():
            raise UsageError(
                f"{split} item {first + i} has the value {images[i][wrong[i]][0].item():.4g}, must "
                f"be {rule}: give the data set without normalisation and random transforms"
            )
    return levels.to(torch.uint8)
