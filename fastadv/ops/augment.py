"""augment: pad, crop, flip and scale a batch of images by explicit parameters.

    out[b, c, h, w] = images[b, c, h + dy - padding, w' + dx - padding] / 255, 0 outside the image;
    w' = W - 1 - w where flip[b], else w

images: uint8 [B, C, H, W]; dy, dx: int64 [B]; flip: bool [B]; result: float32 [B, C, H, W].
"""

import torch

from . import _native
from ._library import define, expect


def _check(images, dy, dx, flip, padding, channels_last):
    expect("images", images, dtype=torch.uint8)
    if images.dim() != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}, must be [B, C, H, W]")
    for name, tensor in (("dy", dy), ("dx", dx), ("flip", flip)):
        dtype = torch.bool if name == "flip" else torch.int64
        expect(name, tensor, dtype=dtype, like=images, shape=images.shape[:1])
    if padding < 0:
        raise ValueError(f"padding is {padding}, must be at least 0")


def reference(images, dy, dx, flip, padding, channels_last):
    """float32 [B, C, H, W] = images / 255, zero-padded, cropped at (dy, dx) [B], then flipped."""
    device, (height, width) = images.device, images.shape[2:]
    rows = dy[:, None] + torch.arange(height, device=device)
    columns = dx[:, None] + torch.arange(width, device=device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    in_rows = (rows >= 0) & (rows < height + 2 * padding)
    in_columns = (columns >= 0) & (columns < width + 2 * padding)
    padded = torch.nn.functional.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images), device=device)[:, None, None]
    crop = padded[batch, (rows * in_rows)[:, :, None], (columns * in_columns)[:, None]]
    crop = crop * (in_rows[:, :, None] & in_columns[:, None])[..., None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (crop.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=layout)


def _empty(images, dy, dx, flip, padding, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _native.empty(images.shape, images, torch.float32, layout)


def _compiled(images, dy, dx, flip, padding, channels_last):
    out = _empty(images, dy, dx, flip, padding, channels_last)
    images, dy, dx, flip = (tensor.contiguous() for tensor in (images, dy, dx, flip))
    device = images.get_device()
    _native.run(
        "augment",
        device,
        *_native.addresses(device, torch.float32, out=out),
        *_native.contiguous(device, torch.uint8, images=images),
        *_native.contiguous(device, torch.int64, dy=dy, dx=dx),
        *_native.contiguous(device, torch.bool, flip=flip),
        *images.shape,
        padding,
        channels_last,
    )
    return out


def _triton():
    from ..kernels.augment import augment

    return augment


_augment = define(
    "augment(Tensor images, Tensor dy, Tensor dx, Tensor flip, int padding, bool channels_last)"
    " -> Tensor",
    check=_check,
    reference=reference,
    native=_compiled,
    triton=_triton,
    cuda=lambda *args: True,
    fake=_empty,
)


def augment(images, dy, dx, flip, padding=4, channels_last=False):
    """Views of uint8 images as float32 in [0, 1]: zero-pad, crop at (dy, dx), flip left to right.

    images: uint8 [B, C, H, W]. dy, dx: int64 [B], the crop's first row and column in the padded
    image, 0 to 2 * padding; what lies outside the padded image reads as 0. flip: bool [B].
    padding: pixels on every side. channels_last: the memory format of the result, float32
    [B, C, H, W], equal to the bit to images / 255.
    It is torchvision's RandomCrop(H, padding), RandomHorizontalFlip and ToTensor with the random
    numbers as arguments, so that a view has an id. Raises TypeError or ValueError that names the
    argument at fault.
    """
    return _augment(images, dy, dx, flip, padding, channels_last)
