"""augment: pad, crop, flip and scale a batch of images by explicit parameters.

    out[b, c, h, w] = images[b, c, h + dy - padding, w' + dx - padding] / 255, 0 outside the image;
    w' = W - 1 - w where flip[b], else w

images: uint8 [B, C, H, W]; dy, dx: int64 [B]; flip: bool [B]; result: float32 [B, C, H, W].
"""

import torch

from . import _native, reference
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


def _empty(images, dy, dx, flip, padding, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _native.empty(images.shape, images, torch.float32, layout)


def _compiled(images, dy, dx, flip, padding, channels_last):
    out = _empty(images, dy, dx, flip, padding, channels_last)
    tensors = (tensor.contiguous() for tensor in (images, dy, dx, flip))
    _native.augment(out, *tensors, padding, channels_last)
    return out


_augment = define(
    "augment(Tensor images, Tensor dy, Tensor dx, Tensor flip, int padding, bool channels_last)"
    " -> Tensor",
    check=_check,
    reference=reference.augment,
    native=_compiled,
    kernel="augment",
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
