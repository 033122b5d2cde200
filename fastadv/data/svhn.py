"""SVHN's cropped digits (Netzer et al., 2011), from train_32x32.mat and test_32x32.mat.

MATLAB's format is read here because other readers can be crashed by a damaged file.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .dataset import Dataset, cut, image_set

HELD_OUT = 1_000
LARGEST = 1 << 28  # bytes that one compressed array may unfold to; the real ones stay below

# Level 5 MAT-files: types of elements, classes of matrices.
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
NUMBERS |= {12: "<i8", 13: "<u8"}
MATRIX, COMPRESSED = 14, 15
NUMERIC_CLASSES, COMPLEX = range(6, 16), 0x800


def load(data_dir: str | Path, seed: int) -> Dataset:
    """72 257 train, 1 000 val and 26 032 test images, uint8 [N, 3, 32, 32]; classes are the digits.

    `data_dir` is the folder of the two files. Mirrored digits are other characters, so there are no
    flips. Raises FileNotFoundError for an absent file and UsageError, naming the file, for one that
    is damaged or holds something else.
    """
    path = Path(data_dir) / "train_32x32.mat"
    full = image_set(*_read(path))
    if len(full) <= HELD_OUT:
        raise UsageError(f"{path}: {len(full)} images, but {HELD_OUT} are held out")
    val, train = cut(full, HELD_OUT, seed=seed)
    test = image_set(*_read(path.with_name("test_32x32.mat")))
    return Dataset("svhn", 10, 4, 1, train, val, test, mixed=True)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 3, 32, 32], labels int64 [N], 0 to 9) of one file."""
    try:
        arrays = _arrays(path.read_bytes())
        images, labels = arrays["X"], arrays["y"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such SVHN file") from None
    except (ValueError, KeyError, struct.error, zlib.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: not a readable SVHN file ({reason})") from error
    if images.dtype != np.uint8 or images.shape[:-1] != (32, 32, 3) or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
        raise UsageError(f"{path}: X is {found}, not uint8 [32, 32, 3, N]")
    count = images.shape[-1]
    if labels.dtype.kind not in "iu" or labels.size != count:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UsageError(f"{path}: y is {found}, not {count} integers")
    if labels.min() < 1 or labels.max() > 10:
        found = f"{labels.min()}..{labels.max()}"
        raise UsageError(f"{path}: y lies in {found}, not 1..10, of which 10 is the digit 0")
    return images.transpose(3, 2, 0, 1), labels.ravel().astype(np.int64) % 10


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """{name: array, in the type it is stored as} of the arrays X and y in a level 5 MAT-file."""
    if content[124:128] != b"\x00\x01IM":
        raise ValueError("not a little-endian MAT-file of level 5 (MATLAB's -v6 or -v7)")
    found = {}
    for kind, payload in _elements(memoryview(content)[128:]):
        if kind == COMPRESSED:
            ((kind, payload),) = _elements(memoryview(_inflated(payload)))
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where an array should be")
        # No more than that: a hostile file may unfold to millions of elements.
        (_, flags), (_, shape), (_, name), *values = itertools.islice(_elements(payload), 5)
        name = bytes(name).decode("ascii")
        if name in ("X", "y"):
            (flags,) = struct.unpack_from("<I", flags)
            if (flags & 0xFF) not in NUMERIC_CLASSES or flags & COMPLEX or len(values) != 1:
                raise ValueError(f"{name} is not an array of real numbers")
            ((kind, numbers),) = values
            shape = np.frombuffer(shape, "<i4")
            found[name] = np.frombuffer(numbers, NUMBERS[kind]).reshape(shape, order="F")
    return found


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, payload) of the elements in `data`, one after another."""
    while data:
        kind, size = struct.unpack_from("<II", data)
        start = 8
        if kind >> 16:  # a short one: type and size share a word, the payload has the next
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
        if start + size > len(data) or (start == 4 and size > 4):
            raise ValueError(f"an element of {size} bytes where {len(data) - start} are left")
        yield kind, data[start : start + size]
        data = data[start + size + (0 if kind == COMPRESSED else -(start + size) % 8) :]


def _inflated(payload: memoryview) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(payload, LARGEST)
    if not stream.eof:
        raise ValueError(f"a compressed array is cut short or larger than {LARGEST} bytes")
    return content
