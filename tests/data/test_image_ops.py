"""The image operations, held to Pillow pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastadv import ops
from fastadv.data import image_ops
from fastadv.data.image_ops import OPERATIONS

SHAPES = [(3, 32, 32), (1, 8, 8), (3, 5, 9), (1, 40, 28)]
FILL = 77


def affine(*matrix_of):
    """Image.transform with the matrix (a, b, c, d, e, f) that `matrix_of` gives for a magnitude."""

    def apply(image, magnitude):
        (matrix,) = (entries(magnitude) for entries in matrix_of)
        fill = (FILL,) * len(image.getbands()) if image.mode == "RGB" else FILL
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill
        )

    return apply


def enhance(kind):
    return lambda image, magnitude: kind(image).enhance(magnitude)


# What Pillow does, and magnitudes that include the ends and the places where a rule changes.
PILLOW = {
    "identity": (lambda image, _: image, [0]),
    "shear_x": (affine(lambda m: (1, m, 0, 0, 1, 0)), [-0.99, -0.3, -0.033, 0, 0.1, 0.5, 0.99]),
    "shear_y": (affine(lambda m: (1, 0, 0, m, 1, 0)), [-0.99, -0.3, -0.033, 0, 0.1, 0.5, 0.99]),
    "translate_x": (affine(lambda m: (1, 0, int(m), 0, 1, 0)), [-32, -5, -1.6, 0, 0.9, 14.5, 40]),
    "translate_y": (affine(lambda m: (1, 0, 0, 0, 1, int(m))), [-32, -5, -1.6, 0, 0.9, 14.5, 40]),
    "rotate": (
        lambda image, m: image.rotate(m, fillcolor=(FILL,) * 3 if image.mode == "RGB" else FILL),
        [-135, -90, -30, -3.3, 0, 10, 45, 60, 90, 117, 135, 180],
    ),
    "brightness": (enhance(ImageEnhance.Brightness), [0, 0.1, 0.64, 1, 1.3, 1.9, 2]),
    "color": (enhance(ImageEnhance.Color), [0, 0.1, 0.64, 1, 1.3, 1.9, 2]),
    "contrast": (enhance(ImageEnhance.Contrast), [0, 0.1, 0.64, 1, 1.3, 1.9, 2]),
    "sharpness": (enhance(ImageEnhance.Sharpness), [0, 0.1, 0.64, 1, 1.3, 1.9, 2]),
    "posterize": (
        lambda image, m: ImageOps.posterize(image, round(m)),
        [1, 1.2, 2, 4.5, 5.5, 7, 8],
    ),
    "solarize": (lambda image, m: ImageOps.solarize(image, m), [0, 1, 102.4, 128, 254.5, 255, 256]),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), [0]),
    "equalize": (lambda image, _: ImageOps.equalize(image), [0]),
    "invert": (lambda image, _: ImageOps.invert(image), [0]),
}


def pictures(channels, height, width):
    """uint8 [40, C, H, W]: noise, narrow ranges, ramps, a few levels only, one level only."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(256, (40, channels, height, width), generator=generator)
    draw[8:16] = draw[8:16] % 60 + 90
    draw[16:24] = draw[16:24] // 64 * 64
    ramp = torch.arange(height)[:, None] * 7 + torch.arange(width) * 3
    draw[24:32] = (ramp + draw[24:32] % 5) % 256
    draw[32:36] = draw[32:36, :, :1, :1]
    draw[36:40] = (draw[36:40] < 6) * 200 + 20
    return draw.byte()


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).contiguous().numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)


def test_every_operation_has_its_pillow():
    assert list(PILLOW) == list(OPERATIONS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PILLOW)
def test_equal_to_pillow(name, shape):
    pillow, magnitudes = PILLOW[name]
    images = pictures(*shape)
    for first in range(len(magnitudes)):  # every magnitude on every picture, mixed within a batch
        drawn = [magnitudes[(first + i) % len(magnitudes)] for i in range(len(images))]
        batch = image_ops.transform(
            images,
            torch.full((len(images),), list(OPERATIONS).index(name)),
            torch.tensor(drawn, dtype=torch.float64),
            fill=FILL,
        )
        pairs = zip(images, drawn, strict=True)
        expected = torch.stack([from_pillow(pillow(to_pillow(i), m)) for i, m in pairs])
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, expected), name


def test_random_magnitudes_of_the_operations_that_move_pixels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (300, 1, 32, 32), generator=generator).byte()
    for name, reach in {"shear_x": 1, "shear_y": 1, "rotate": 135}.items():
        drawn = (torch.rand(300, generator=generator, dtype=torch.float64) * 2 - 1) * reach
        pairs = zip(images, drawn.tolist(), strict=True)
        expected = torch.stack([from_pillow(PILLOW[name][0](to_pillow(i), m)) for i, m in pairs])
        assert torch.equal(OPERATIONS[name](images, drawn, fill=FILL), expected)


def test_each_image_gets_its_own_operation_and_inputs_stay():
    images = pictures(3, 32, 32)[:30]
    before = images.clone()
    op = torch.arange(30) % len(OPERATIONS)
    magnitude = torch.linspace(0.2, 1.7, 30, dtype=torch.float64)
    batch = image_ops.transform(images, op, magnitude, fill=FILL)
    for i, number in enumerate(op.tolist()):
        alone = image_ops.transform(images[i : i + 1], op[i : i + 1], magnitude[i : i + 1], FILL)
        assert torch.equal(batch[i : i + 1], alone), list(OPERATIONS)[number]
    assert torch.equal(images, before)
    batch.zero_()
    assert torch.equal(images, before)


def test_an_empty_batch():
    nothing = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    for operation in OPERATIONS.values():
        assert operation(nothing, torch.zeros(0, dtype=torch.float64)).shape == nothing.shape


@pytest.mark.parametrize(("channels", "size", "padding"), [(3, 32, 4), (1, 8, 1), (3, 6, 0)])
def test_crop_flip_is_augment_in_bytes(channels, size, padding):
    images = pictures(channels, size, size)
    generator = torch.Generator().manual_seed(2)
    dy, dx = torch.randint(2 * padding + 1, (2, 40), generator=generator)
    flip = torch.rand(40, generator=generator) < 0.5
    expected = ops.augment(images, dy, dx, flip, padding)
    assert torch.equal(image_ops.crop_flip(images, dy, dx, flip, padding).float() / 255, expected)


def test_boxes_are_cut_off_at_the_border():
    centre = torch.tensor([0, 3, 7]), torch.tensor([4, 3, 0])
    size = torch.tensor([4, 3, 20]), torch.tensor([2, 8, 2])
    found = image_ops.boxes(*centre, *size, 8, 8)
    expected = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    expected[0, 0, 0:2, 3:5] = True
    expected[1, 0, 2:4, 0:7] = True
    expected[2, 0, 0:8, 0:1] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1, 1)])
def test_resized_crop_is_pillows(shape):
    images, (height, width) = pictures(*shape), shape[1:]
    generator = torch.Generator().manual_seed(0)
    sides = torch.rand(2, 40, generator=generator)
    sides[:, :4] = torch.tensor([[0.0, 0.999, 0.999, 0.0], [0.0, 0.999, 0.0, 0.999]])
    tall, wide = (sides * torch.tensor([[height], [width]])).long() + 1
    places = torch.rand(2, 40, generator=generator)
    top, left = (
        places * (torch.tensor([[height], [width]]) - torch.stack([tall, wide]) + 1)
    ).long()
    flip = torch.arange(40) % 2 == 1
    found = image_ops.resized_crop(images, top, left, tall, wide, flip)
    for i, (t, le, h, w) in enumerate(torch.stack([top, left, tall, wide], 1).tolist()):
        cut = to_pillow(images[i]).crop((le, t, le + w, t + h))
        expected = cut.resize((width, height), Image.Resampling.BILINEAR)
        expected = ImageOps.mirror(expected) if flip[i] else expected
        assert torch.equal(found[i], from_pillow(expected)), (t, le, h, w)
