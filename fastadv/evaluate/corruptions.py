"""Accuracy under common corruptions (Hendrycks & Dietterich 2019, arXiv 1903.12261): the published
folders of CIFAR-10-C, CIFAR-100-C and ImageNet-C, or images that are corrupted here.

Each corruption at each severity is a stage of the evaluation, on all images. Nothing is searched
for and there is no radius, so these stages do not count in the worst case.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..attacks.suite import CORRUPTED, Stage
from ..data import pictures
from ..data.dataset import mapped_tensor
from ..errors import UsageError
from .corrupt import corrupt, fits
from .severities import NEEDED, SEVERITIES

NAME = "corruptions"  # among the names of attacks
# Error of AlexNet on ImageNet-C, the mean over severities, from the authors' ImageNet-C/test.py.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.92264,
    "defocus_blur": 0.81988,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.79836,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.71784,
    "jpeg_compression": 0.6065,
}
WORDNET = re.compile(r"n\d{8}")  # the name of a class of ImageNet


@dataclass(frozen=True, eq=False)
class Corruption:
    """One corruption at one severity, 1 to 5, as an attack: a call returns corrupted images, here
    made from x."""

    name: str
    severity: int
    eps = math.inf  # any image is valid
    norm = "linf"
    source = "generated"
    reference = None  # AlexNet's error, on ImageNet-C alone

    def __call__(self, model, x, y, index):
        """x: [B, C, H, W] in [0, 1]; index: int64 [B], the images' places in their data set."""
        seed = torch.randint(2**63 - 1, (), device="cpu").item()
        clean, index = x.cpu().float().numpy(), index.tolist()
        return torch.from_numpy(corrupt(clean, self.name, self.severity, seed, index)).to(x)


@dataclass(frozen=True, eq=False)
class Stored(Corruption):
    """Images of a file in CIFAR-10-C's form: the test set five times over, by severity."""

    images: torch.Tensor = field(repr=False)
    source: str

    def __call__(self, model, x, y, index):
        count = len(self.images) // 5
        first = (self.severity - 1) * count
        _check_index(index, count)
        rows = self.images[first + index.cpu()].permute(0, 3, 1, 2)
        return (rows.float() / 255).to(x)


@dataclass(frozen=True, eq=False)
class Pictures(Corruption):
    """Pictures in ImageNet-C's form: files[i], relative to a folder, is that of image i."""

    files: list = field(repr=False)
    source: str
    reference: float | None

    def __call__(self, model, x, y, index):
        root, size = Path(self.source, self.name, str(self.severity)), x.shape[2]
        _check_index(index, len(self.files))

        def read(i):
            try:
                return pictures.decode(root / self.files[i], size)
            except Exception as error:  # a broken file surfaces as nearly any exception type
                reason = f"{type(error).__name__}: {error}"
                raise UsageError(
                    f"{root / self.files[i]}: not a readable picture ({reason})"
                ) from error

        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            found = np.stack([*pool.map(read, index.tolist())])
        return (torch.from_numpy(found).float() / 255).to(x)


def _check_index(index, count):
    """Raises UsageError for images that are not of the test set of `count` images."""
    if len(index) and not (index.min() >= 0 and index.max() < count):
        found = f"{index.min()} to {index.max()}"
        raise UsageError(f"index is {found}, must be in [0, {count - 1}]: of the test set")


def corruption_stages(test, directory=None, classes=()):
    """The stages of the fifteen corruptions at five severities, to evaluate `test` or images of it.

    test: the ImageSet of the whole test set. directory: a folder of CIFAR-10-C's form (an array
    NAME.npy per corruption, uint8 [5 N, H, W, C], and labels.npy) or of ImageNet-C's (NAME/SEVERITY
    /CLASS/PICTURE). Without it images are corrupted here, and corruptions that make no sense for
    their size are left out. classes: the names of the classes, which ImageNet-C's
    form needs.
    Raises UsageError for images that cannot be corrupted, and naming what a folder lacks or where
    it is not of these images; FileNotFoundError without a folder.
    """
    shape = list(test.images.shape[1:])
    if directory is None:
        pictures.need_pillow()
        made = [Corruption(*pair) for pair in _pairs() if fits(pair[0], shape)]
    elif not Path(directory).is_dir():
        raise FileNotFoundError(
            f"corruptions_dir is {str(directory)!r}, must be a folder: there is none"
        )
    elif not torch.equal(test.index, torch.arange(len(test))):
        raise UsageError("test is not whole or not in the order as published, must be both")
    elif any(Path(directory).glob("*.npy")):
        made = _stored(Path(directory), test)
    else:
        made = _pictures(Path(directory), test, classes)
    return [Stage(f"{CORRUPTED}{one.name}-{one.severity}", one) for one in made]


def _pairs():
    return [(name, severity) for name in SEVERITIES for severity in range(1, 6)]


def _need(folder, paths):
    """Raises UsageError that lists which of the paths the folder lacks."""
    if missing := [path for path in paths if not (folder / path).exists()]:
        raise UsageError(
            f"{folder} lacks {', '.join(missing)}: must have all fifteen corruptions, as arrays "
            "NAME.npy and labels.npy, or as folders NAME/SEVERITY"
        )


def _stored(folder, test):
    _need(folder, ["labels.npy", *(f"{name}.npy" for name in SEVERITIES)])
    channels, height, width = test.images.shape[1:]
    count = len(test)
    labels = _array(folder / "labels.npy", "integers", (5 * count,))
    if not np.array_equal(labels.reshape(5, count), np.tile(test.labels.numpy(), (5, 1))):
        raise UsageError(
            f"{folder / 'labels.npy'} has other labels than the test images: not of them"
        )
    found, shape = [], (5 * count, height, width, channels)
    for name in SEVERITIES:
        images = mapped_tensor(_array(folder / f"{name}.npy", "uint8", shape))
        found += [Stored(name, severity, images, str(folder)) for severity in range(1, 6)]
    return found


def _array(path, kind, shape):
    """The array in a .npy file, mapped and never unpickled. Raises UsageError unless it is of the
    kind and shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable .npy of plain numbers ({error})") from error
    right = array.dtype.kind in "iu" if kind == "integers" else array.dtype == kind
    if not right or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}"
        raise UsageError(f"{path} is {found}, must be {kind} {list(shape)}: 5 for each test image")
    return array


def _pictures(folder, test, classes):
    """`files` are those of the first corruption; the other folders have the same names in them."""
    _need(folder, SEVERITIES)
    _need(folder, [f"{name}/{severity}" for name, severity in _pairs()])
    first = folder / next(iter(SEVERITIES)) / "1"
    there = sorted(path.name for path in first.iterdir() if path.is_dir())
    if there != sorted(classes):
        raise UsageError(
            f"{first} has {len(there)} folders, must have one for each class of the test set, by "
            f"its name: it has {len(classes)} with names"
        )
    pictures.need_pillow()
    files, labels = [], []
    for name in there:
        found = sorted(
            p.name for p in (first / name).iterdir() if p.suffix.lower() in pictures.EXTENSIONS
        )
        files += [f"{name}/{file}" for file in found]
        labels += [classes.index(name)] * len(found)
    if labels != test.labels.tolist():
        raise UsageError(
            f"{first} has {len(files)} pictures, must have one for each of the {len(test)} test "
            "images, class by class"
        )
    known = len(there) == 1000 and all(WORDNET.fullmatch(name) for name in there)
    return [
        Pictures(*pair, files, str(folder), ALEXNET[pair[0]] if known else None)
        for pair in _pairs()
    ]


def left_out(stages):
    """A warning of the corruptions that were not made for images that are too small, if any."""
    made = {stage.attack.name for stage in stages if stage.corrupts}
    missing = [name for name in SEVERITIES if made and name not in made]
    if not missing:
        return []
    pixels = max(NEEDED[name] for name in missing)
    return [
        f"{', '.join(missing)} left out of the corruptions: they need {pixels} by {pixels} pixels"
    ]


def by_corruption(record, stages):
    """{corruption: [accuracy in [0, 1] at severity 1, ..., 5]} of the corrupted stages."""
    found = {}
    for stage in stages:
        if stage.corrupts:
            rate = record.right(stage.name).double().mean().item()
            found.setdefault(stage.attack.name, []).append(rate)
    return found


def mean_accuracy(rates):
    """The mean over severities and corruptions of what `by_corruption` returns."""
    return float(np.mean([*rates.values()]))


def mce(rates, stages):
    """The mean corruption error, in which AlexNet has 1: the mean over corruptions of the error
    over that of AlexNet, both summed over severities. None where AlexNet's is not known, as for all
    images but ImageNet-C."""
    reference = {stage.attack.name: stage.attack.reference for stage in stages if stage.corrupts}
    if None in reference.values():
        return None
    return float(np.mean([(1 - np.mean(rates[name])) / reference[name] for name in rates]))
