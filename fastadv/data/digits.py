"""The UCI handwritten digits that ship inside scikit-learn: 1797 grey images of 8x8 pixels."""

import numpy as np

from ..errors import MissingPackage
from .dataset import Dataset, cut, image_set


def load(seed: int) -> Dataset:
    """1000 train, 297 val and 500 test images, uint8 [N, 1, 8, 8]; levels 0..16 become 0..255.

    The original has no test set, so all three are cut from one list and share its indices.
    Raises MissingPackage, an ImportError that says what to install, without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackage("the digits need scikit-learn: pip install fastadv[demo]") from error
    levels, labels = load_digits(return_X_y=True)
    images = np.round(levels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, val, test = cut(image_set(images, labels), 1000, 297, seed=seed)
    return Dataset("digits", 10, 1, 1, train, val, test, mixed=True)
