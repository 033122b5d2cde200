"""Any image set as one .npz file: train_images, train_labels, test_images, test_labels."""

from pathlib import Path

import numpy as np

from ..errors import UsageError
from .dataset import Dataset, cut, image_set

NAMES = ("train_images", "train_labels", "test_images", "test_labels")
HELD_OUT = 1_000
MAX_CLASSES = 100_000


def load(path: str | Path, seed: int) -> Dataset:
    """Images uint8 [N, H, W, C], [N, C, H, W] or [N, H, W], C of 1 or 3; labels integer [N] >= 0.

    A tenth of train, at most 1000, is held out as val. Colour images of 16 pixels and wider get
    padding 4 and flips, smaller or grey ones padding 1 and none. Raises FileNotFoundError, or
    UsageError naming the file and the array.
    """
    arrays = _read(Path(path))
    train, test = (
        image_set(_images(path, arrays, part), _labels(path, arrays, part))
        for part in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [list(part.images.shape[1:]) for part in (train, test)]
        raise UsageError(f"{path}: train_images are {shapes[0]} each but test_images {shapes[1]}")
    if len(train) < 10 or len(test) < 1:
        raise UsageError(f"{path}: train_images needs 10 images or more, test_images 1 or more")
    if len(train.labels.unique()) < 2:
        raise UsageError(f"{path}: train_labels are all {train.labels[0]}, must be of two classes")
    channels, _, width = train.images.shape[1:]
    padding, flips = (4, 2) if channels == 3 and width >= 16 else (1, 1)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    val, train = cut(train, min(HELD_OUT, len(train) // 10), seed=seed)
    return Dataset(Path(path).stem, num_classes, padding, flips, train, val, test)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in NAMES if name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        # numpy takes whatever is no archive for a pickle, and says how to run it.
        reason = "no archive, or pickled objects" if "pickle" in str(error) else error
        raise UsageError(f"{path}: not a readable .npz of plain arrays ({reason})") from error


def _get(path: str | Path, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise UsageError(f"{path}: no array {name!r}; needed are {', '.join(NAMES)}")
    return arrays[name]


def _images(path: str | Path, arrays: dict[str, np.ndarray], part: str) -> np.ndarray:
    name = f"{part}_images"
    images = _get(path, arrays, name)
    if images.dtype == np.uint8 and images.ndim == 3:
        return images[:, None]
    if images.dtype == np.uint8 and images.ndim == 4:
        if images.shape[1] in (1, 3):
            return images
        if images.shape[3] in (1, 3):
            return images.transpose(0, 3, 1, 2)
    found = f"{images.dtype} {list(images.shape)}"
    raise UsageError(f"{path}: {name} is {found}, not uint8 [N, H, W(, C)] or [N, C, H, W]")


def _labels(path: str | Path, arrays: dict[str, np.ndarray], part: str) -> np.ndarray:
    name, count = f"{part}_labels", len(_get(path, arrays, f"{part}_images"))
    labels = _get(path, arrays, name)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UsageError(f"{path}: {name} is {found}, not {count} integers")
    if count and not (labels.min() >= 0 and labels.max() < MAX_CLASSES):
        found = f"{labels.min()} to {labels.max()}"
        raise UsageError(f"{path}: {name} holds {found}; labels are 0 to {MAX_CLASSES - 1}")
    return labels
