"""The image operations of AutoAugment and its successors, on uint8 batches.

Each operation takes images uint8 [B, C, H, W], C of 1 or 3, on any device, and magnitude float64
[B], one per image, on the CPU; it returns new uint8 [B, C, H, W]. Those without a magnitude ignore
it; those that move pixels take `fill`, the level (0 to 255) of what lies outside the image. All
equal Pillow to the bit: `Image.transform(AFFINE)` and `Image.rotate` with nearest interpolation,
`ImageOps`, `ImageEnhance`; one channel is Pillow's mode "L".
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


def identity(images, magnitude):
    return images.clone()


def shear_x(images, magnitude, fill=0):
    """Pixel (x, y) comes from (x + magnitude y, y); row 0 stays."""
    return _affine(images, fill, b=magnitude)


def shear_y(images, magnitude, fill=0):
    """Pixel (x, y) comes from (x, y + magnitude x); column 0 stays."""
    return _affine(images, fill, d=magnitude)


def translate_x(images, magnitude, fill=0):
    """Pixel (x, y) comes from (x + magnitude, y); pixels, truncated to whole ones."""
    return _affine(images, fill, c=magnitude.trunc())


def translate_y(images, magnitude, fill=0):
    """Pixel (x, y) comes from (x, y + magnitude); pixels, truncated to whole ones."""
    return _affine(images, fill, f=magnitude.trunc())


def rotate(images, magnitude, fill=0):
    """Counter-clockwise about the centre; degrees."""
    height, width = images.shape[2:]
    angle = -magnitude.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    c = (cos * (-width / 2) + sin * (-height / 2)) + width / 2
    f = (-sin * (-width / 2) + cos * (-height / 2)) + height / 2
    return _affine(images, fill, a=cos, b=sin, c=c, d=-sin, e=cos, f=f)


def brightness(images, magnitude):
    """0 is black, 1 the image, beyond 1 brighter."""
    return _blend(torch.zeros_like(images), images, magnitude)


def color(images, magnitude):
    """0 is grey (ITU-R 601 luma), 1 the image, beyond 1 more saturated."""
    return _blend(_luma(images), images, magnitude)


def contrast(images, magnitude):
    """0 is the image's mean luma everywhere, 1 the image, beyond 1 more contrast."""
    luma = _luma(images).long()
    count = luma[0].numel() if len(luma) else 1
    mean = (2 * luma.sum((1, 2, 3), keepdim=True) + count) // (2 * count)
    return _blend(mean, images, magnitude)


def sharpness(images, magnitude):
    """0 is smoothed by (1 1 1; 1 5 1; 1 1 1) / 13 inside the border, 1 the image."""
    wide = images.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    wide[..., 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return _blend(wide, images, magnitude)


def posterize(images, magnitude):
    """Keep the highest bits of each level: 1 to 8 of them, rounded half to even."""
    return images & _like(256 - 2 ** (8 - magnitude.round()), images).byte()


def solarize(images, magnitude):
    """Invert the levels that are at least `magnitude`: 0 inverts all, 256 none."""
    return torch.where(images >= _like(magnitude.ceil(), images).short(), 255 - images, images)


def autocontrast(images, magnitude):
    """Stretch each channel so that its darkest level is 0 and its brightest 255."""
    low, high = images.flatten(2).double().aminmax(dim=2, keepdim=True)
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = level[255] / (high - low)  # 255 / tensor would multiply by a rounded reciprocal
    stretched = (level * scale + -low * scale).clamp(0, 255)
    return _look_up(torch.where(high > low, stretched, level), images)


def equalize(images, magnitude):
    """Spread each channel's levels evenly over 0 to 255; too few pixels (8x8) leave it as it is."""
    pixels = images.flatten(2).long()
    count = pixels.new_zeros(*images.shape[:2], 256)
    count.scatter_add_(2, pixels, torch.ones_like(pixels))
    level = torch.arange(256, device=images.device)
    brightest = pixels.amax(dim=2, keepdim=True)
    step = (pixels.shape[2] - count.gather(2, brightest)) // 255
    below = count.cumsum(2) - count
    spread = (step // 2 + below) // step.clamp(min=1)
    return _look_up(torch.where(step > 0, spread.clamp(max=255), level), images)


def invert(images, magnitude):
    """255 minus each level."""
    return 255 - images


_GEOMETRIC = (shear_x, shear_y, translate_x, translate_y, rotate)
_OTHERS = (brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize)
OPERATIONS = {op.__name__: op for op in (identity, *_GEOMETRIC, *_OTHERS, invert)}


def transform(images: Tensor, op: Tensor, magnitude: Tensor, fill: int = 0) -> Tensor:
    """Each image under its own operation: `op` int64 [B] numbers OPERATIONS in their order.

    images uint8 [B, C, H, W] on any device; op and magnitude (float64 [B]) on the CPU, so that a
    GPU is never waited for.
    """
    out = images.clone()
    for number, operation in enumerate(OPERATIONS.values()):
        rows = (op == number).nonzero()[:, 0]
        if operation is identity or not len(rows):
            continue
        outside = {"fill": fill} if operation in _GEOMETRIC else {}
        chosen = rows.to(images.device, non_blocking=True)
        out[chosen] = operation(images[chosen], magnitude[rows], **outside)
    return out


def crop_flip(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, padding: int) -> Tensor:
    """The crops and flips of `ops.augment`, but uint8 [B, C, H, W]; arguments as there."""
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    dy, dx, flip = (t.to(images.device, non_blocking=True)[:, None, None] for t in (dy, dx, flip))
    x = torch.where(flip, x.flip(0), x)
    return _sample(images, y[:, None] + dy - padding, x + dx - padding, 0)


def resized_crop(
    images: Tensor, top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, flip: Tensor
) -> Tensor:
    """Each image's box, resized to the image's size and mirrored where `flip` (bool [B]) says so:
    uint8 [B, C, H, W], as Pillow's `crop` and `resize` with BILINEAR do it, to the bit.

    The box's rows from `top` and columns from `left` on, `tall` and `wide` of them: int64 [B]; it
    lies inside the image. All on the CPU. One image at a time, because the work is in the box.
    """
    found, (height, width) = torch.empty_like(images), images.shape[2:]
    boxes = torch.stack([top, left, tall, wide, flip], dim=1).tolist()
    for out, image, (y, x, rows, columns, mirrored) in zip(found, images, boxes, strict=True):
        box = image[:, y : y + rows, x : x + columns]
        box = _stretched(_stretched(box, 2, width), 1, height)
        out.copy_(box.flip(2) if mirrored else box)
    return found


def _stretched(image, dim, count):
    """An image whose rows (dim 1) or columns (dim 2) are stretched to `count`, by linear
    interpolation in Pillow's fixed point, and rounded to levels."""
    low, high, share = _taps(image.shape[dim], count, image.device)
    low, high = (image.index_select(dim, taps).int() for taps in (low, high))
    # low (1 - share) + high share, in place, for these tensors are large.
    share = share.view(-1, 1) if dim == 1 else share
    return high.sub_(low).mul_(share).add_(2**21).bitwise_right_shift_(22).add_(low).byte()


@functools.lru_cache(maxsize=1024)
def _taps(size, count, device):
    """Which two of `size` pixels each of `count` lies between, int64, and the share of the second
    in units of 2^-22, int32."""
    at = (torch.arange(count, dtype=torch.float64) + 0.5) * (size / count) - 0.5
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    share = ((at - low) * 2**22 + 0.5).int()
    return tuple(t.to(device) for t in (low, (low + 1).clamp(max=size - 1), share))


def boxes(cy: Tensor, cx: Tensor, tall: Tensor, wide: Tensor, height: int, width: int) -> Tensor:
    """bool [B, 1, height, width]: inside a box centred at pixel (cy, cx), cut off at the border.

    All int64 [B]; the box covers rows cy - tall // 2 up to, not including, cy + tall // 2.
    """
    cy, cx, tall, wide = (t[:, None, None] for t in (cy, cx, tall // 2, wide // 2))
    y, x = torch.arange(height)[:, None], torch.arange(width)
    rows, columns = (y >= cy - tall) & (y < cy + tall), (x >= cx - wide) & (x < cx + wide)
    return (rows & columns)[:, None]


def _like(magnitude, images):
    return magnitude.to(images.device, non_blocking=True)[:, None, None, None]


def _affine(images, fill, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """Pixel (x, y) comes from (a x + b y + c, d x + e y + f), taken at pixel centres.

    As Pillow computes it, in 16.16 fixed point: integers, so every device agrees.
    """
    entries = a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5
    entries = torch.broadcast_tensors(*(torch.as_tensor(n, dtype=torch.float64) for n in entries))
    fixed = (torch.stack(entries) * 65536 + 0.5).floor().long().expand(6, len(images))
    a, b, c, d, e, f = fixed.to(images.device, non_blocking=True)[..., None, None]
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    return _sample(images, d * x + (e * y + f) >> 16, a * x + (b * y + c) >> 16, fill)


def _sample(images, y, x, fill):
    """The pixel at row y and column x, int64 broadcastable to [B, H, W], `fill` where outside."""
    height, width = images.shape[2:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    source = torch.where(inside, y * width + x, height * width).flatten(1)[:, None]
    pixels = F.pad(images.flatten(2), (0, 1), value=fill)
    return pixels.gather(2, source.expand(-1, images.shape[1], -1)).view(images.shape)


def _luma(images):
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(start, images, magnitude):
    """start + magnitude (images - start), clipped and truncated to a level, as Pillow does."""
    start, factor = start.float(), _like(magnitude.float(), images)
    return (start + factor * (images.float() - start)).clamp_(0, 255).byte()


def _look_up(table, images):
    """Each level replaced by its entry in its channel's table [B, C, 256]."""
    return table.byte().gather(2, images.flatten(2).long()).view(images.shape)
