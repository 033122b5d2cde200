"""Small folders of pictures, for the tests of `--data folder` and of packed files."""

import numpy as np
from PIL import Image


def save(path, seed=0, shape=(20, 24, 3), **options):
    """A picture of noise: the pixels that were saved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def tree(root, splits=("train", "test"), per_class=6, classes=("cat", "dog"), size=12):
    """A folder of PNG files, all of `size` pixels and each of its own noise."""
    seed = 0
    for split in splits:
        for name in classes:
            for i in range(per_class):
                save(root / split / name / f"{i}.png", seed, (size, size, 3))
                seed += 1
    return root
