"""The loader: views, order, independence of other generators, and what a view looks like."""

import pytest
import torch
import torch.nn.functional as F

from fastadv import ops
from fastadv.data import Dataset, Fields, ImageSet, Loader, decode_view, encode_view


def stand_in(images, dy, dx, flip, *, padding, channels_last):
    """ops.augment one image at a time."""
    height, width = images.shape[2:]
    padded = F.pad(images.float() / 255, (padding,) * 4)
    out = torch.empty(images.shape)
    for i, (y, x) in enumerate(zip(dy.tolist(), dx.tolist(), strict=True)):
        crop = padded[i, :, y : y + height, x : x + width]
        out[i] = crop.flip(-1) if flip[i] else crop
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


@pytest.fixture(autouse=True)
def augment(monkeypatch):
    monkeypatch.setattr(ops, "augment", stand_in, raising=False)


def image_set(count=50, channels=3, size=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, channels, size, size), generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return ImageSet(images.to(torch.uint8), labels, torch.arange(count) * 7 + 3)


def gather(loader, number):
    return [torch.cat(field) for field in zip(*loader.epoch(number), strict=True)]


@pytest.mark.parametrize(
    ("padding", "flips", "views"), [(4, 2, 162), (1, 1, 9), (0, 2, 2), (0, 1, 1)]
)
def test_views_are_numbered_without_gaps(padding, flips, views):
    ids = torch.arange(views)
    dy, dx, flip = decode_view(ids, padding, flips)
    assert len(set(zip(dy.tolist(), dx.tolist(), flip.tolist(), strict=True))) == views
    for offset in (dy, dx):
        assert offset.dtype == torch.int64
        assert offset.unique().tolist() == list(range(2 * padding + 1))
    assert flip.dtype == torch.bool
    assert torch.equal(encode_view(dy, dx, flip, padding, flips), ids)


def test_the_view_formula():
    dy, dx, flip = (
        torch.tensor([4, 0, 8, 1]),
        torch.tensor([4, 0, 8, 2]),
        torch.tensor([0, 1, 1, 0]),
    )
    expected = [(4 * 9 + 4) * 2, 1, 161, (1 * 9 + 2) * 2]
    assert encode_view(dy, dx, flip.bool(), 4, 2).tolist() == expected


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 10, 50, 64])
def test_every_image_once_per_epoch(batch_size, shuffle):
    split = image_set()
    loader = Loader(split, batch_size, padding=4, flips=2, shuffle=shuffle)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == -(-50 // batch_size)
    assert all(len(batch.y) == batch_size for batch in batches[:-1])
    index = torch.cat([batch.index for batch in batches])
    assert index.sort().values.tolist() == split.index.tolist()
    assert (index.tolist() == split.index.tolist()) is not shuffle
    labels = torch.cat([batch.y for batch in batches])
    assert torch.equal(labels, split.labels[(index - 3) // 7])


def test_each_batch_shows_the_views_it_names():
    split = image_set()
    for batch in Loader(split, 16, padding=2, flips=2, shuffle=True).epoch(3):
        assert [field.dtype for field in batch] == [torch.float32] + [torch.int64] * 3
        offsets = decode_view(batch.view, 2, 2)
        images = split.images[(batch.index - 3) // 7]
        assert torch.equal(batch.x, stand_in(images, *offsets, padding=2, channels_last=False))


def test_an_epoch_is_a_function_of_seed_and_number():
    split = image_set()

    def epoch(seed, number, batch_size=8):
        loader = Loader(split, batch_size, padding=4, flips=2, shuffle=True, seed=seed)
        return gather(loader, number)

    first = epoch(0, 5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for batch_size in (8, 13):
        assert all(torch.equal(a, b) for a, b in zip(first, epoch(0, 5, batch_size), strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from the global generator
    for seed, number in ((0, 6), (1, 5), (2**32, 5), (-1, 5), (5, 0)):
        _, _, index, view = epoch(seed, number)
        assert not torch.equal(index, first[2])
        assert not torch.equal(view, first[3])


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_may_begin_later(world):
    options = {"shuffle": True, "rank": world - 1, "world": world}
    loader = Loader(image_set(21), 6, padding=2, flips=2, **options)
    whole = list(loader.epoch(5))
    for skip in range(len(loader) + 1):
        rest = list(loader.epoch(5, skip))
        assert len(rest) == len(whole) - skip
        for found, expected in zip(rest, whole[skip:], strict=True):
            assert all(map(torch.equal, found, expected))


def test_epochs_may_interleave():
    loader = Loader(image_set(), 8, padding=4, flips=2, shuffle=True)
    alone = gather(loader, 1)
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert torch.equal(torch.cat([second.view for _, second in pairs]), alone[3])


def test_all_views_are_drawn_about_equally_often():
    split = ImageSet(torch.zeros(16_200, 1, 1, 1, dtype=torch.uint8), *[torch.arange(16_200)] * 2)
    *_, view = gather(Loader(split, 16_200, padding=4, flips=2), 0)
    counts = view.bincount(minlength=162)
    assert len(counts) == 162
    assert ((counts - 100) ** 2 / 100).sum() < 235  # chi-square, 161 degrees: one in 10 000


def test_without_augmentation_images_pass_unchanged():
    split = image_set()
    x, y, index, view = gather(Loader(split, 16), 2)
    assert torch.equal(x, split.images.float() / 255)
    assert torch.equal(y, split.labels)
    assert torch.equal(index, split.index)
    assert not view.any()


def test_layout():
    for channels_last in (False, True):
        batch = next(Loader(image_set(), 16, channels_last=channels_last).epoch(0))
        assert batch.x.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_an_empty_split():
    assert list(Loader(image_set(0), 4).epoch(0)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("batch_size", value) for value in (0, "4", 2.5)),
        *(("padding", value) for value in (-1, None)),
        *(("flips", value) for value in (3, 0, True)),
    ],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, must be "):
        Loader(image_set(), **({"batch_size": 4} | {name: value}))


def test_a_loader_is_of_one_split():
    one = image_set()
    for wrong, kind in ((Dataset("x", 4, 1, 1, one, one, one), "Dataset"), (one.images, "Tensor")):
        with pytest.raises(TypeError, match=f"^split is a {kind}, must be an ImageSet such as"):
            Loader(wrong, 4)


@pytest.mark.parametrize(
    ("count", "size", "world"), [(50, 8, 2), (49, 8, 2), (50, 15, 3), (2, 15, 5)]
)
def test_processes_share_out_each_batch(count, size, world):
    split, options = image_set(count), {"padding": 1, "shuffle": True, "seed": 4}
    alone = Loader(split, size, **options)
    loaders = [Loader(split, size, rank=rank, world=world, **options) for rank in range(world)]
    parts = [list(loader.epoch(1)) for loader in loaders]
    assert {len(batches) for batches in parts} == {len(alone)} == {len(loaders[0])}
    wrapped = torch.arange(count + -count % world) % count
    for name, expected in zip(Fields._fields, gather(alone, 1), strict=True):
        together = [
            torch.stack([getattr(share, name) for share in shares], 1).flatten(0, 1)
            for shares in zip(*parts, strict=True)
        ]  # equal shares, interleaved again
        assert torch.equal(torch.cat(together), expected[wrapped])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"world": 2}, "batch_size is 15, must be divisible by the number of processes, 2"),
        ({"rank": 3, "world": 3}, r"rank is 3, must be in \[0, 2\], of world 3"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Loader(image_set(), 15, **options)
