"""The fifteen corruptions of Hendrycks & Dietterich 2019 (arXiv 1903.12261) of clean images.

Each function below takes images x, float32 [B, C, H, W] in [0, 1], with C of 1 or 3, the constant c
of a severity, and one random generator per image. It follows the published definition, with these
differences. The photographs of frost are replaced by a texture that is computed; colours outside
[0, 1] are clipped once, at the end; and levels are rounded, not cut off.

An image depends on (seed, its index, corruption, severity) and on nothing else in its batch, to the
bit: arithmetic over several images is done element by element, in an order that is always the same.
"""

import io
import math

import numpy as np

from ..errors import UsageError
from .filters import (
    affine,
    by_pillow,
    correlated,
    each,
    filtered,
    followed,
    gaussian,
    moved,
    plasma,
    sampled,
    zoomed,
)
from .severities import LEAST, NEEDED, SEVERITIES, SMALL

BLOCK = 1 << 18  # values that are corrupted at once, which stay in a core's cache
LUMA = 0.299, 0.587, 0.114  # of red, green and blue in grey
ICE = 0.82, 0.91, 1.0  # the colour of frost


def fits(name, shape):
    """Whether the corruption makes sense for images of a shape (C, H, W). Raises UsageError for
    shapes that no corruption can be made for."""
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < LEAST:
        raise UsageError(
            f"images are {list(shape)}, must be [C, H, W] of 1 or 3 channels and {LEAST} by "
            f"{LEAST} pixels or more to be corrupted"
        )
    return min(shape[1:]) >= NEEDED.get(name, LEAST)


def corrupt(images, name, severity, seed, index):
    """The images under one corruption: float32 [B, C, H, W] of whole levels k/255.

    images: float32 [B, C, H, W] in [0, 1]; severity: 1 to 5; seed: int; index: B ints, the images'
    places in their data set. Images whose shorter side has SMALL pixels or fewer get the constants
    of CIFAR-10-C, others those of ImageNet-C.
    """
    large = min(images.shape[2:]) > SMALL
    constant = SEVERITIES[name][large][severity - 1]
    number = [*SEVERITIES].index(name)
    rows = max(1, BLOCK // max(1, images[:1].size))
    found = np.empty(images.shape, np.float32)
    for first in range(0, len(images), rows):
        part = slice(first, first + rows)
        streams = [
            np.random.Generator(np.random.Philox(counter=(0, 0, number, severity), key=(seed, i)))
            for i in index[part]
        ]
        found[part] = CORRUPTIONS[name](np.ascontiguousarray(images[part]), constant, streams)
    return np.rint(found.clip(0, 1) * 255) / np.float32(255)


def _gaussian_noise(x, c, streams):
    return x + np.float32(c) * each(streams, "standard_normal", x.shape[1:], np.float32)


def _shot_noise(x, c, streams):
    counts = [s.poisson(v) for s, v in zip(streams, x.astype(np.float64) * c, strict=True)]
    return np.stack(counts) / c


def _impulse_noise(x, c, streams):
    """A share c of all values becomes 0 or 1."""
    draw = each(streams, "random", x.shape[1:])
    return np.where(draw < c / 2, 0, np.where(draw >= 1 - c / 2, 1, x))


def _defocus_blur(x, c, streams):
    """A disk, made smooth by a Gaussian of 3 by 3 taps, 5 by 5 for the largest."""
    radius, sigma = c
    reach, around = max(8, math.ceil(radius)), 1 if radius <= 8 else 2
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    kernel = filtered(np.pad(disk / disk.sum(), around), gaussian(sigma, around), "constant")
    return correlated(x, kernel)


def _glass_blur(x, c, streams):
    """Pixels that take the place of near ones, between two Gaussian blurs."""
    sigma, reach, times = c
    taps = gaussian(sigma, int(4 * sigma + 0.5))
    x = np.rint(filtered(x, taps, "edge") * 255) / np.float32(255)
    height, width = x.shape[2:]
    rows = np.arange(height - reach, reach, -1)[:, None]
    columns = np.arange(width - reach, reach, -1)
    size = (times, 2, len(rows), len(columns))
    moves = each(streams, "integers", size, low=-reach, high=reach)
    every, flat = np.arange(len(x))[:, None, None], x.reshape(*x.shape[:2], -1)
    for i in range(times):
        source = np.tile(np.arange(height * width), (len(x), 1))
        taken = (rows + moves[:, i, 0]) * width + columns + moves[:, i, 1]
        source[every, rows * width + columns] = taken
        flat = np.take_along_axis(flat, followed(source)[:, None], 2)
    return filtered(flat.reshape(x.shape), taps, "edge")


def _motion_blur(x, c, streams):
    return np.stack([moved(v, *c, s.uniform(-45, 45)) for v, s in zip(x, streams, strict=True)])


def _zoom_blur(x, c, streams):
    """The mean of the image and of its enlargements by 1, 1 + step, 1 + 2 step, ..."""
    count, step = c
    total = x.copy()
    for i in range(count):
        total += zoomed(x, 1 + i * step)
    return total / np.float32(count + 1)


def _snow(x, c, streams):
    mean, spread, zoom, least, radius, sigma, dimmed = c
    flakes = mean + spread * each(streams, "standard_normal", (1, *x.shape[2:]), np.float32)
    flakes = zoomed(flakes.astype(np.float32), zoom)
    flakes = np.rint(np.where(flakes < least, 0, flakes).clip(0, 1) * 255) / np.float32(255)
    layers = [
        moved(v, radius, sigma, s.uniform(-135, -45)) for v, s in zip(flakes, streams, strict=True)
    ]
    layer = np.stack(layers)
    weights = np.float32(LUMA if x.shape[1] == 3 else (1,))
    grey = sum(weight * x[:, i : i + 1] for i, weight in enumerate(weights))
    x = dimmed * x + (1 - dimmed) * np.maximum(x, grey * 1.5 + 0.5)
    return x + layer + layer[:, :, ::-1, ::-1]


def _frost(x, c, streams):
    """A layer of ice: the ridges of a fractal, about as bright as the photographs."""
    ridges = 1 - np.abs(2 * plasma(streams, x.shape[2:], 1.3) - 1)
    ice = 0.4 + 0.6 * ridges * ridges
    colour = np.float32(ICE if x.shape[1] == 3 else (1,)).reshape(1, -1, 1, 1)
    return c[0] * x + c[1] * colour * ice


def _fog(x, c, streams):
    thick, decay = c
    most = x.reshape(len(x), -1).max(1).reshape(-1, 1, 1, 1)
    return (x + thick * plasma(streams, x.shape[2:], decay)) * most / (most + thick)


def _brightness(x, c, streams):
    """The value of HSV, which is the largest channel, plus c; hue and saturation stay."""
    value = x.max(1, keepdims=True)
    lighter = np.minimum(value + np.float32(c), 1)
    return np.where(value > 0, x * (lighter / np.where(value > 0, value, 1)), lighter)


def _contrast(x, c, streams):
    mean = x.reshape(*x.shape[:2], -1).mean(2, dtype=np.float64)[:, :, None, None]
    return (x - mean) * c + mean


def _elastic_transform(x, c, streams):
    """A random affine map, then a smooth field of moves."""
    height, width = x.shape[2:]
    strength, sigma, corner = (share * min(height, width) for share in c)
    centre, away = np.array([height, width]) // 2, min(height, width) // 3
    here = centre + away * np.array([[1, 1], [1, -1], [-1, -1]])
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    points, taps = [], gaussian(sigma, int(3 * sigma + 0.5))
    for stream in streams:
        there = here + stream.uniform(-corner, corner, here.shape)
        back = affine(there, here)  # where each pixel comes from
        points.append(sum(back[:, i, None, None] * grid[i] for i in (0, 1)) + back[:, 2:, None])
    x = sampled(x, np.stack(points))
    field = each(streams, "uniform", (2, height, width), low=-1, high=1)
    return sampled(x, grid + strength * filtered(field, taps, "symmetric"))


def _pixelate(x, c, streams):
    from PIL.Image import Resampling

    def smaller(picture):
        less = tuple(int(side * c) for side in picture.size)
        return picture.resize(less, Resampling.BOX).resize(picture.size, Resampling.BOX)

    return by_pillow(x, smaller)


def _jpeg_compression(x, c, streams):
    from PIL import Image

    def compressed(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=c)
        return Image.open(file)

    return by_pillow(x, compressed)


CORRUPTIONS = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
