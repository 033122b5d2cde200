"""Images that train beside a data set's own, such as generated ones (Gowal et al. 2021; Wang et al.
2023): an .npz file of millions of them, which is mapped and never loaded."""

import math
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from .dataset import Dataset, ImageSet, mapped_tensor

NAMES = ("image", "label")
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: the lengths of what follows it
CHUNK = 1 << 22  # labels that are checked at once


def load_extra(path: str | Path, dataset: Dataset) -> ImageSet:
    """The images of an uncompressed .npz beside those of `dataset.train`.

    The file, as numpy.savez writes it, has `image`, uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]
    in the size of the data set's images, and `label`, integers [N] of its classes. The index goes
    on behind those of train. Raises FileNotFoundError, or UsageError naming the file and the array.
    """
    images, labels = (_mapped(Path(path), name) for name in NAMES)
    images = images[:, None] if images.ndim == 3 else images  # grey ones
    shape = dataset.train.images.shape[1:]
    channels_last = (*shape[1:], shape[0])
    if images.dtype != np.uint8 or images.shape[1:] not in (tuple(shape), channels_last):
        raise UsageError(
            f"{path}: image is {images.dtype} {list(images.shape)}, must be uint8 "
            f"{['N', *channels_last]} as the images of {dataset.name}".replace("'", "")
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
        raise UsageError(
            f"{path}: label is {labels.dtype} {list(labels.shape)}, must be {len(images)} integers,"
            " one for each image"
        )
    for start in range(0, len(labels), CHUNK):
        part = labels[start : start + CHUNK]
        if part.min() < 0 or part.max() >= dataset.num_classes:
            raise UsageError(
                f"{path}: label holds {part.min()} to {part.max()}, must be in 0.."
                f"{dataset.num_classes - 1}, the classes of {dataset.name}"
            )
    images = mapped_tensor(images)
    labels = mapped_tensor(labels.astype(np.int64, copy=False))
    if images.shape[1:] != shape:
        images = images.permute(0, 3, 1, 2)
    first = max(int(split.index.max()) for split in (dataset.train, dataset.val)) + 1
    return ImageSet(images, labels, torch.arange(first, first + len(labels)))


def _mapped(path, name):
    """One array of an .npz, mapped from where it lies in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _member(path, archive, name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, must be an .npz of {NAMES}") from None
    except UsageError:
        raise
    except Exception as error:  # zipfile and numpy each have their own for a damaged file
        raise UsageError(f"{path} is not a readable .npz of plain arrays ({error})") from error


def _member(path, archive, name):
    found = archive.namelist()
    if f"{name}.npy" not in found:
        arrays = ", ".join(one.removesuffix(".npy") for one in found[:10])
        raise UsageError(f"{path} has the arrays {arrays or '(none)'}, must have image and label")
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise UsageError(
            f"{path} is compressed, must be as numpy.savez writes it: the images are read where "
            "they lie in the file"
        )
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise UsageError(f"{path}: {name} is of format {version}, must be 1.0 or 2.0")
        shape, fortran, dtype = HEADERS[version](file)
        header = file.tell()
    if dtype.hasobject:
        raise UsageError(f"{path}: {name} has pickled objects, must be plain numbers")
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        start = member.header_offset + 30 + sum(LOCAL_HEADER.unpack(file.read(30)))
    if header + math.prod(shape) * dtype.itemsize != member.file_size:
        raise UsageError(f"{path} is damaged: {name} has {member.file_size} bytes, not {shape}")
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", start + header, tuple(shape), order)
