"""CIFAR-10 and CIFAR-100, "python version" (Krizhevsky, 2009), read without running the pickles."""

import pickle
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .dataset import Dataset, cut, image_set

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
ROWS, HELD_OUT = 10_000, 1_000


class _Inert:
    """Stands in for every numpy object in a pickle: keeps what it is given and does nothing.

    Even the real numpy.dtype is unsafe here: a pickled state can set its flags so that plain bytes
    are taken for object pointers.
    """

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state):
        self.state = state


_ALLOWED = {
    "_codecs.encode": str.encode,
    "numpy.ndarray": _Inert,
    "numpy.dtype": _Inert,
    "numpy.core.multiarray._reconstruct": _Inert,
    "numpy._core.multiarray._reconstruct": _Inert,
    "numpy.core.numeric._frombuffer": _Inert,
    "numpy._core.numeric._frombuffer": _Inert,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, text, numbers and numpy arrays (as `_Inert`); refuses any other name."""

    def find_class(self, module: str, name: str):
        wanted = f"{module}.{name}"
        if wanted not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused: it asks for {wanted}; nothing was run")
        return _ALLOWED[wanted]


def load(data_dir: str | Path, seed: int) -> Dataset:
    """CIFAR-10: 49 000 train, 1 000 val and 10 000 test images, uint8 [N, 3, 32, 32].

    `data_dir` is the folder `cifar-10-batches-py` or the one that holds it. Raises
    FileNotFoundError for an absent file and UsageError, naming the file, for one that is truncated,
    misshapen or asks for anything but numpy arrays.
    """
    folder = _folder(data_dir, "cifar-10-batches-py")
    images, labels = zip(*(read_batch(folder / name, ROWS) for name in TRAIN), strict=True)
    train = np.concatenate(images), np.concatenate(labels)
    return _dataset("cifar10", 10, train, read_batch(folder / "test_batch", ROWS), seed)


def load_cifar100(data_dir: str | Path, seed: int) -> Dataset:
    """CIFAR-100 by its 100 fine classes, sizes as CIFAR-10's, from `cifar-100-python`.

    Arguments and errors are those of `load`.
    """
    folder = _folder(data_dir, "cifar-100-python")
    train = read_batch(folder / "train", 5 * ROWS, "fine_labels", 100)
    return _dataset(
        "cifar100", 100, train, read_batch(folder / "test", ROWS, "fine_labels", 100), seed
    )


def read_batch(
    path: Path, rows: int, entry: str = "labels", num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [rows, 3, 32, 32], labels int64 [rows]) of one file, labels from `entry`."""
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        # Python 2 wrote byte-string keys, later writers text.
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        images, labels = _array(content["data"]), _array(content[entry])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such CIFAR file") from None
    except Exception as error:  # hostile or cut input surfaces as nearly any exception type
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: not a readable CIFAR file ({reason})") from error
    if images.dtype != np.uint8 or images.shape != (rows, 3072):
        found = f"{images.dtype} {list(images.shape)}"
        raise UsageError(f"{path}: data is {found}, not uint8 [{rows}, 3072]")
    if labels.dtype.kind not in "iu" or labels.shape != (rows,):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UsageError(f"{path}: {entry} are {found}, not {rows} integers")
    if labels.min() < 0 or labels.max() >= num_classes:
        found = f"{labels.min()}..{labels.max()}"
        raise UsageError(f"{path}: {entry} lie in {found}, not 0..{num_classes - 1}")
    return images.reshape(rows, 3, 32, 32), labels.astype(np.int64)


def _folder(data_dir: str | Path, name: str) -> Path:
    folder = Path(data_dir)
    return folder / name if (folder / name).is_dir() else folder


def _dataset(name: str, num_classes: int, train: tuple, test: tuple, seed: int) -> Dataset:
    val, train = cut(image_set(*train), HELD_OUT, seed=seed)
    return Dataset(name, num_classes, 4, 2, train, val, image_set(*test), mixed=True)


def _array(item) -> np.ndarray:
    """The array that a list or a pickled numpy array (an `_Inert`, protocol 2 or 5) describes."""
    if not isinstance(item, _Inert):
        return np.asarray(item)
    if item.state is None:
        data, dtype, shape, order = item.arguments
    else:
        _, shape, dtype, fortran, data = item.state
        order = "F" if fortran else "C"
    code = dtype.arguments[0]
    code = code.decode() if isinstance(code, bytes) else code
    if code not in ("u1", "i8", "i4"):
        raise ValueError(f"an array of type {code!r}")
    return np.frombuffer(data, code).reshape(shape, order=order)
