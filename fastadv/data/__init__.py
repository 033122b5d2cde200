"""Image sets as uint8 tensors in memory, and a loader that numbers every augmentation it draws."""

from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from ..runs.code import check_new, not_registered
from ..runs.rules import check_image_size
from . import cifar, digits, folder, npz, svhn
from .augmentation import Augmentation
from .convert import from_dataset
from .dataset import Dataset, ImageSet, check_classes, check_dataset, cut, image_set
from .extra import load_extra
from .loader import Fields, Loader, decode_view, encode_view

__all__ = [
    "KNOWN",
    "Augmentation",
    "Dataset",
    "Fields",
    "ImageSet",
    "Loader",
    "cut",
    "decode_view",
    "encode_view",
    "from_dataset",
    "image_set",
    "load",
    "load_extra",
    "register",
]

READERS = {
    "cifar10": cifar.load,
    "cifar100": cifar.load_cifar100,
    "svhn": svhn.load,
    "npz": npz.load,
    "folder": folder.load,
}
PLACES = {  # what their data_dir must be
    "cifar10": "the unpacked folder cifar-10-batches-py",
    "cifar100": "the unpacked folder cifar-100-python",
    "svhn": "the folder of train_32x32.mat and test_32x32.mat",
    "npz": "an .npz file",
    "folder": "the folder of train, and of val or test",
}
OWN = {}  # the readers that users have registered
KNOWN = f"digits, {', '.join(READERS)}"


def register(name, read):
    """Makes `load(name, data_dir)` the Dataset that `read(data_dir, seed)` returns.

    data_dir is None where none is given; seed fixes which images are held out. `image_set` and
    `cut` help to make the splits. A second function of the same name replaces the first. Raises
    UsageError for a name that fastadv has itself, TypeError for what is no function.
    """
    check_new(name, ("digits", *READERS))
    if not callable(read):
        raise TypeError(f"read is {read!r}, must be a function that returns a Dataset")
    OWN[name] = read


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    image_size: int | None = None,
    train_images: int | None = None,
) -> Dataset:
    """The data set `name`: "digits", or "cifar10", "cifar100", "svhn", "folder" (a folder) or "npz"
    (a file) at `data_dir`, or one that was registered.

    `image_size` is the width and height in pixels that pictures in a "folder" get; no other data
    set has it. `train_images` leaves so many of the training images, the same random ones each
    time.

    `seed` fixes which images are held out and is not the seed of a run: runs are comparable while
    it stays the same. Warns of classes without training images. Raises UsageError for an unknown
    name, an absent `data_dir`, a bad file or a reader of a user's own that fails, FileNotFoundError
    for a missing file, ImportError for digits without scikit-learn.
    """
    check_image_size(name, image_size)
    dataset = _load(name, data_dir, seed, image_size)
    if train_images is None:
        return check_classes(dataset)
    if not 0 < train_images <= len(dataset.train):
        raise UsageError(
            f"train_images is {train_images}, must be in 1..{len(dataset.train)}, the training "
            f"images of {dataset.name}"
        )
    return check_classes(replace(dataset, train=dataset.train.sample(train_images)))


def _load(name, data_dir, seed, image_size):
    if name == "digits":
        return digits.load(seed)
    if name in OWN:
        return check_dataset(_own(name, data_dir, seed), name)
    if ":" in name:
        raise not_registered("data set", name)
    if name not in READERS:
        raise UsageError(f"data is {name!r}, must be one of {KNOWN}")
    if data_dir is None:
        raise UsageError(f"data_dir is missing, must be {PLACES[name]} for data {name}")
    right = Path(data_dir).is_file() if name == "npz" else Path(data_dir).is_dir()
    if not right:
        kind = "" if Path(data_dir).exists() else ", which does not exist"
        raise FileNotFoundError(f"data_dir is {str(data_dir)!r}{kind}: must be {PLACES[name]}")
    try:
        options = {} if image_size is None else {"image_size": image_size}
        return READERS[name](data_dir, seed, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: data_dir must be {PLACES[name]}") from error


def _own(name, data_dir, seed):
    try:
        return OWN[name](data_dir, seed)
    except (UsageError, OSError):
        raise
    except Exception as error:  # whatever a reader of the user's own raises; it is the cause
        call = f"{name}(data_dir, seed)"
        raise UsageError(f"{call} raised {type(error).__name__}: {error}") from error
