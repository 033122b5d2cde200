"""Image sets as resident uint8 tensors, and a loader that names every augmentation it draws."""

from pathlib import Path

from ..errors import UsageError
from . import cifar, digits, npz, svhn
from .augmentation import Augmentation
from .dataset import Dataset, ImageSet, check_classes
from .loader import Fields, Loader, decode_view, encode_view

__all__ = [
    "KNOWN",
    "Augmentation",
    "Dataset",
    "Fields",
    "ImageSet",
    "Loader",
    "decode_view",
    "encode_view",
    "load",
]

READERS = {
    "cifar10": cifar.load,
    "cifar100": cifar.load_cifar100,
    "svhn": svhn.load,
    "npz": npz.load,
}
KNOWN = f"digits, {', '.join(READERS)}"


def load(name: str, data_dir: str | Path | None = None, *, seed: int = 0) -> Dataset:
    """The data set `name`: "digits", or "cifar10", "cifar100", "svhn" (a folder) or "npz" (a file)
    at `data_dir`.

    `seed` fixes which images are held out and is not the seed of a run: runs are comparable while
    it stays the same. Warns of classes without training images. Raises ValueError for an unknown
    name, an absent `data_dir` or a bad file, FileNotFoundError for a missing one, ImportError for
    digits without scikit-learn.
    """
    if name == "digits":
        return digits.load(seed)
    if name not in READERS:
        raise UsageError(f"unknown data set {name!r}; known: {KNOWN}")
    if data_dir is None:
        raise UsageError(f"data set {name!r} needs data_dir, the place of its files")
    return check_classes(READERS[name](data_dir, seed))
