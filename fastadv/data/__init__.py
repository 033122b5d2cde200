"""Image sets as resident uint8 tensors, and a loader that names every augmentation it draws."""

from pathlib import Path

from . import cifar, digits, npz
from .augmentation import Augmentation
from .dataset import Dataset, ImageSet
from .loader import Fields, Loader, decode_view, encode_view

__all__ = [
    "Augmentation",
    "Dataset",
    "Fields",
    "ImageSet",
    "Loader",
    "decode_view",
    "encode_view",
    "load",
]


def load(name: str, data_dir: str | Path | None = None, *, seed: int = 0) -> Dataset:
    """The data set `name`: "digits", "cifar10" (a folder) or "npz" (a file) at `data_dir`.

    `seed` fixes which images are held out and is not the seed of a run: runs are comparable while
    it stays the same. Raises ValueError for an unknown name, an absent `data_dir` or a bad file,
    FileNotFoundError for a missing one, ImportError for digits without scikit-learn.
    """
    readers = {"cifar10": cifar.load, "npz": npz.load}
    if name == "digits":
        return digits.load(seed)
    if name not in readers:
        raise ValueError(f"unknown data set {name!r}; known: digits, {', '.join(readers)}")
    if data_dir is None:
        raise ValueError(f"data set {name!r} needs data_dir, the place of its files")
    return readers[name](data_dir, seed)
