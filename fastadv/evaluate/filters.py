"""What corruptions are made of: filters, fields and draws of several images at once.

Whatever is done to an image is the same to the bit in every batch: arithmetic is done element by
element, and sums of taps in one order.
"""

import math

import numpy as np


def each(streams, draw, shape, dtype=None, **options):
    """One draw of `shape` by each image's generator, [B, *shape]."""
    options |= {} if dtype is None else {"dtype": dtype}
    return np.stack([getattr(stream, draw)(size=shape, **options) for stream in streams])


def gaussian(sigma, reach):
    """2 * reach + 1 weights, which sum to 1."""
    line = np.arange(-reach, reach + 1)
    taps = np.exp(-(line**2) / (2 * sigma**2)) if reach else np.ones(1)
    return taps / taps.sum()


def filtered(x, taps, mode):
    """Correlates the last two dimensions with `taps` each; mode: of np.pad, beyond the borders."""
    reach = len(taps) // 2
    for axis in (-2, -1) if reach else ():
        x = np.moveaxis(x, axis, -1)
        wide = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(reach, reach)], mode)
        size = x.shape[-1]
        x = sum(x.dtype.type(tap) * wide[..., i : i + size] for i, tap in enumerate(taps))
        x = np.moveaxis(x, -1, axis)
    return x


def correlated(x, kernel):
    """Correlates images with a kernel of odd sides; they are mirrored beyond their borders."""
    reach = len(kernel) // 2
    wide = np.pad(x, [(0, 0), (0, 0), (reach, reach), (reach, reach)], "reflect")
    height, width = x.shape[2:]
    total = np.zeros_like(x)
    for i, j in np.argwhere(kernel > 0):
        total += x.dtype.type(kernel[i, j]) * wide[:, :, i : i + height, j : j + width]
    return total


def moved(x, radius, sigma, angle):
    """One image [C, H, W] smeared along `angle`, in degrees, to one side: as ImageMagick does, by
    whole pixels, with weights that fall like a Gaussian."""
    count = 2 * radius + 1
    taps = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2)).astype(np.float32)
    taps /= taps.sum()
    height, width = x.shape[1:]
    wide = np.pad(x, [(0, 0), (count, count), (count, count)], "edge")
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    total = np.zeros_like(x)
    for i, tap in enumerate(taps):
        top, left = (count + math.ceil(i * way - 0.5) for way in (down, right))
        total += tap * wide[:, top : top + height, left : left + width]
    return total


def zoomed(x, factor):
    """The centre of the images, enlarged to their size by linear interpolation."""
    for axis in (2, 3):
        size = x.shape[axis]
        part = math.ceil(size / factor)
        larger = round(part * factor)
        place = (np.arange(size) + (larger - size) // 2) * (part - 1) / (larger - 1)
        first = np.minimum(place.astype(int), part - 2)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        share = (place - first).astype(np.float32).reshape(shape)
        first += (size - part) // 2
        x = (1 - share) * x.take(first, axis) + share * x.take(first + 1, axis)
    return x


def plasma(streams, size, decay):
    """A fractal in [0, 1] per image, float32 [B, 1, H, W], by the diamond-square algorithm: the
    mean of four corners, and a random part that becomes decay^2 smaller with each halving."""
    side = 1 << (max(size) - 1).bit_length()
    found = np.zeros((len(streams), side, side))
    step, rough = side, 1.0
    while step >= 2:
        half = step // 2
        draw = each(streams, "uniform", (3, side // step, side // step), low=-rough, high=rough)
        corners = found[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, 1)
        centres = (pairs + np.roll(pairs, -1, 2)) / 4 + draw[:, 0]
        found[:, half::step, half::step] = centres
        across = corners + np.roll(corners, -1, 2) + centres + np.roll(centres, 1, 1)
        along = corners + np.roll(corners, -1, 1) + centres + np.roll(centres, 1, 2)
        found[:, ::step, half::step] = across / 4 + draw[:, 1]
        found[:, half::step, ::step] = along / 4 + draw[:, 2]
        step, rough = half, rough / decay**2
    flat = found.reshape(len(found), -1)
    least, most = (v.reshape(-1, 1, 1) for v in (flat.min(1), flat.max(1)))
    found = (found - least) / (most - least)
    return found[:, None, : size[0], : size[1]].astype(np.float32)


def affine(source, target):
    """The map [2, 3] that takes three points [3, 2] to three others."""
    return np.linalg.solve(np.column_stack([source, np.ones(3)]), target).T


def sampled(x, points):
    """The images at points [B, 2, H, W] (row, column), by linear interpolation; they are mirrored
    beyond their borders."""
    sides = np.array(x.shape[2:])
    low = np.floor(points).astype(int)
    share = (points - low).astype(np.float32)[:, :, None]
    flat, total = x.reshape(*x.shape[:2], -1), 0
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = _mirrored(low[:, 0] + down, sides[0])
        columns = _mirrored(low[:, 1] + right, sides[1])
        place = (rows * sides[1] + columns).reshape(len(x), 1, -1)
        values = np.take_along_axis(flat, place, 2).reshape(x.shape)
        of_row = share[:, 0] if down else 1 - share[:, 0]
        of_column = share[:, 1] if right else 1 - share[:, 1]
        total = total + values * (of_row * of_column)
    return total


def _mirrored(place, size):
    """Places beyond [0, size) as those that lie there when the images are mirrored."""
    place = place % (2 * size)
    return np.minimum(place, 2 * size - 1 - place)


def by_pillow(x, change):
    """The images after `change`, a function of a Pillow image."""
    from PIL import Image

    found = []
    for levels in np.rint(x * 255).astype(np.uint8):
        grey = len(levels) == 1
        picture = change(Image.fromarray(levels[0] if grey else levels.transpose(1, 2, 0)))
        found.append(np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1))
    return np.stack(found).astype(np.float32) / 255


def followed(source):
    """Where each pixel's value comes from, int [B, N], if the last takes that of its source first,
    then the one before it, and so on: a pixel with a later source takes what that one has got."""
    late = source > np.arange(source.shape[1])
    while late.any():
        source, late = (
            np.where(late, np.take_along_axis(v, source, 1), own)
            for v, own in ((source, source), (late, False))
        )
    return source
