import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv import ops
from fastadv.testing import OpCase, check_op, check_values, isas, using_isa

ISAS = isas()


def make(shape, padding=4, channels_last=False, seed=0, outside=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    dy, dx = torch.randint(-outside, 2 * padding + 1 + outside, (2, shape[0]), generator=g)
    flip = torch.randint(0, 2, shape[:1], generator=g).bool()
    return OpCase("augment", (images, dy, dx, flip, padding, channels_last))


def sliced(images, dy, dx, flip, padding):
    """One view after another: slices of padded numpy arrays."""
    height, width = images.shape[2:]
    pad = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = np.pad(images.numpy(), pad).astype(np.float32) / np.float32(255)
    views = [
        image[:, y : y + height, x : x + width][..., :: -1 if mirror else 1]
        for image, y, x, mirror in zip(padded, dy, dx, flip, strict=True)
    ]
    return torch.from_numpy(np.stack(views))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 8, 6), (3, 1, 8, 8)])
def test_op(shape, channels_last):
    check_op(make(shape, 1, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 4, 4),
        (2, 0, 4, 4),
        (2, 3, 0, 4),
        (2, 3, 4, 0),
        (1, 1, 1, 1),
        (4, 4, 7, 15),
        (3, 3, 31, 33),
        (2, 1, 17, 16),
        (3, 3, 32, 32),
    ],
)
def test_shapes(shape, channels_last):
    for padding in (0, 4):
        check_values(make(shape, padding, channels_last, outside=6))


@pytest.mark.parametrize(
    ("channels", "size", "padding"), [(1, 32, 4), (3, 32, 4), (4, 32, 4), (1, 8, 1), (3, 8, 5)]
)
def test_every_view_is_its_slice(channels, size, padding):
    """All (2 padding + 1)^2 crops, flipped and not: 162 for CIFAR; every byte value among them."""
    views = list(itertools.product(range(2 * padding + 1), range(2 * padding + 1), (False, True)))
    dy, dx, flip = (torch.tensor(column) for column in zip(*views, strict=True))
    g = torch.Generator().manual_seed(0)
    shape = len(views), channels, size, size
    images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    images.view(-1)[:256] = torch.arange(256)
    expected = sliced(images, dy, dx, flip, padding)
    for isa in ISAS:
        for layout in (torch.contiguous_format, torch.channels_last):
            with using_isa(isa):
                last, laid = layout == torch.channels_last, images.contiguous(memory_format=layout)
                got = ops.augment(laid, dy, dx, flip, padding, last)
                assert torch.equal(got, expected)
                assert got.is_contiguous(memory_format=layout)


def test_identity_is_torchs_division():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    zero, still = torch.zeros(1, dtype=torch.int64), torch.tensor([False])
    assert torch.equal(ops.augment(images, zero, zero, still, padding=0), images.float().div(255))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 4, 9, 19)]),
    padding=st.integers(0, 6),
    last=st.booleans(),
    seed=st.integers(0, 999),
)
def test_is_the_slice(shape, padding, last, seed):
    images, dy, dx, flip, *_ = make(shape, padding, seed=seed).args
    expected = sliced(images, dy, dx, flip, padding)
    assert torch.equal(ops.augment(images, dy, dx, flip, padding, last), expected)


@pytest.mark.parametrize("offset", [-(2**63), -(2**31), -9, -1, 9, 12, 2**31, 2**63 - 1])
@pytest.mark.parametrize("last", [False, True])
def test_offsets_outside_read_zeros(offset, last):
    images = torch.full((2, 3, 5, 5), 255, dtype=torch.uint8)
    flip = torch.tensor([False, True])
    far, inside = torch.full((2,), offset), torch.full((2,), 4)
    for dy, dx in ((far, inside), (inside, far)):
        case = OpCase("augment", (images, dy, dx, flip, 4, last))
        check_values(case, layouts=("contiguous",))
        shown = max(0, 5 - abs(offset - 4))  # rows or columns of the image in the crop
        seen = case.overload(*case.args).sum(dim=(1, 2, 3))
        assert torch.equal(seen, torch.full((2,), 3.0 * 5 * shown))


def test_bad_arguments_name_themselves():
    images, dy, dx, flip, *_ = make((4, 3, 8, 8)).args

    def fails(error, match, **changed):
        with pytest.raises(error, match=match):
            ops.augment(**{"images": images, "dy": dy, "dx": dx, "flip": flip} | changed)

    fails(TypeError, "images is torch.float32, must be torch.uint8", images=images.float())
    fails(ValueError, r"images has shape \(3, 8, 8\), must be \[B, C, H, W\]", images=images[0])
    fails(TypeError, "dy is torch.int32, must be torch.int64", dy=dy.int())
    fails(ValueError, r"dx has shape \(3,\), must be \(4,\)", dx=dx[:3])
    fails(TypeError, "flip is torch.uint8, must be torch.bool", flip=flip.byte())
    fails(ValueError, "padding is -1, must be at least 0", padding=-1)


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_op[shape1-True]",
    "test_shapes[shape0-False]",
    "test_shapes[shape5-False]",
    "test_identity_is_torchs_division",
    "test_offsets_outside_read_zeros[True-12]",
)
REGISTERS = {"augment_kernel": 40}
PIXELS, OFFSETS = torch.empty(64, 3, 32, 32, dtype=torch.uint8), torch.empty(64, dtype=torch.int64)
COMPILED = [
    (
        f"augment_kernel channels_last={last}",
        (PIXELS, OFFSETS, OFFSETS, OFFSETS.bool(), 4, last),
        3 + 8,  # the parameters, and bytes
    )
    for last in (False, True)
]
