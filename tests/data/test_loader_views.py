"""A view is exactly replayable: what an epoch yields, `view_batch` gives back bit for bit."""

import pytest
import torch

from fastadv.data import Augmentation, ImageSet, Loader

SETTINGS = [
    Augmentation(),
    Augmentation(cutout=4),
    Augmentation(views_per_image=3),
    Augmentation("autoaugment", cutout=4),
    Augmentation("randaugment", mixup=0.8),
    Augmentation("trivialaugment", cutmix=1.0, views_per_image=5),
    Augmentation(crop="resized", crop_scale=0.2),
    Augmentation("randaugment", 4, 1.0, 1.0, None, 3, 30),
]


def image_set(count=50, channels=3, size=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return ImageSet(images.byte(), labels, torch.arange(count) * 7 + 3)


def loader(split, settings, batch_size=16, **more):
    crops = {"padding": 2, "flips": 2, "shuffle": True, "num_classes": 10}
    return Loader(split, batch_size, **crops | more, augmentation=settings)


def gather(batches):
    return [torch.cat(field) for field in zip(*batches, strict=True)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_replay_is_bit_identical(settings, channels):
    split = image_set(channels=channels)
    epochs = loader(split, settings, 16, seed=5, channels_last=True)
    state = torch.get_rng_state()
    yielded = gather([*epochs.epoch(0), *epochs.epoch(1)])
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(9))
    x, y, index, view = (field[order] for field in yielded)
    assert view.min() >= 0
    assert view.max() < epochs.views
    assert x.min() >= 0
    assert x.max() <= 1
    again = loader(split, settings, 1, seed=5, shuffle=False)
    rows = (index - 3) // 7
    for size in (1, 7, 100):
        pieces = zip(rows.split(size), view.split(size), strict=True)
        replayed = gather([again.view_batch(*piece) for piece in pieces])
        for found, expected in zip(replayed, (x, y, index, view), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_seed_and_view_both_matter(settings):
    split, rows = image_set(), torch.arange(50)
    first = loader(split, settings).view_batch(rows, torch.zeros_like(rows)).x
    for seed, view in ((1, 0), (0, 1)):
        other = loader(split, settings, seed=seed).view_batch(rows, torch.full_like(rows, view)).x
        assert (other != first).flatten(1).any(1).double().mean() > 0.75


@pytest.mark.parametrize("settings", SETTINGS[1:4], ids=str)
def test_the_key_is_the_index_not_the_place_in_the_split(settings):
    split = image_set()
    rows = torch.arange(49, -1, -3)
    part = split.take(rows)
    view = torch.arange(len(rows)) % 3
    expected = loader(split, settings).view_batch(rows, view)
    found = loader(part, settings).view_batch(torch.arange(len(rows)), view)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_finite_pools_repeat_and_epochs_differ():
    finite = loader(image_set(200), Augmentation("trivialaugment", views_per_image=2))
    seen = {}
    for number in range(4):
        for batch in finite.epoch(number):
            for x, *name in zip(batch.x, batch.index.tolist(), batch.view.tolist(), strict=True):
                assert torch.equal(seen.setdefault(tuple(name), x), x)
    assert {view for _, view in seen} == {0, 1}
    endless = loader(image_set(200), Augmentation("trivialaugment"))
    views = torch.cat([gather(endless.epoch(number))[3] for number in range(4)])
    assert len(views.unique()) == 800
    assert views.max() > 2**31


def test_labels_say_what_the_image_shows():
    level = torch.arange(10) * 20
    labels = torch.arange(60) % 10
    images = level[labels, None, None, None].expand(60, 3, 8, 8).byte()
    split = ImageSet(images, labels, torch.arange(60))
    for settings in (
        Augmentation(mixup=1.0),
        Augmentation(cutmix=0.7),
        Augmentation(mixup=0.3, cutmix=1),
    ):
        for batch in loader(split, settings, padding=0, flips=1).epoch(0):
            assert batch.y.dtype == torch.float32
            assert batch.y.shape == (len(batch.x), 10)
            assert torch.allclose(batch.y.sum(1), torch.ones(len(batch.y)))
            shown = batch.x.double().mean((1, 2, 3)) * 255
            assert torch.allclose(shown, batch.y.double() @ level.double(), atol=1e-4)
            main = batch.y.gather(1, labels[batch.index][:, None])
            assert settings.cutmix or (main >= 0.5).all()


def test_the_partner_has_an_augmentation_of_its_own():
    ramp = (torch.arange(64) * 4).byte().view(1, 1, 8, 8)
    split = ImageSet(ramp, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    view = torch.arange(100)
    mixed = loader(split, Augmentation(mixup=1.0)).view_batch(torch.zeros_like(view), view)
    plain = loader(split, Augmentation(views_per_image=100))
    alone = plain.view_batch(torch.zeros_like(view), view)
    assert (mixed.x == alone.x).flatten(1).all(1).sum() < 10  # 50 pairs of crop and flip
    assert torch.equal(mixed.y[:, :1], torch.ones(100, 1))


def test_no_settings_is_crop_and_flip_as_ever():
    split = image_set()
    for batches in zip(
        loader(split, None).epoch(1), loader(split, Augmentation()).epoch(1), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert loader(split, Augmentation()).views == 50
    assert batches[0].y.dtype == torch.int64


def test_layout():
    for settings in SETTINGS:
        for channels_last in (False, True):
            made = loader(image_set(), settings, channels_last=channels_last)
            batch = next(made.epoch(0))
            assert batch.x.is_contiguous(memory_format=torch.channels_last) is channels_last
            assert batch.x.is_contiguous() is not channels_last


def test_an_empty_split():
    assert list(loader(image_set(0), SETTINGS[-1]).epoch(0)) == []


@pytest.mark.parametrize("classes", [None, 9])
def test_soft_labels_need_the_number_of_classes(classes):
    with pytest.raises(ValueError, match=f"num_classes is {classes}, must be at least 10"):
        loader(image_set(), Augmentation(mixup=1.0), num_classes=classes)


@pytest.mark.parametrize(("rows", "view"), [(-1, 0), (50, 0), (0, -1), (0, 3)])
def test_rows_and_views_out_of_range(rows, view):
    made = loader(image_set(), Augmentation(views_per_image=3))
    with pytest.raises(ValueError, match="has a number outside"):
        made.view_batch(torch.tensor([0, rows]), torch.tensor([0, view]))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_view_is_the_same_on_a_gpu(settings):
    rows = torch.arange(50)
    batches = [
        loader(image_set(), settings, device=device).view_batch(rows, rows % 3)
        for device in ("cpu", "cuda")
    ]
    for name, expected, found in zip(batches[0]._fields, *batches, strict=True):
        assert found.is_cuda == (name in ("x", "y"))
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-7)  # x: an ulp of / 255


def test_an_image_goes_through_its_views_in_turn():
    made = loader(image_set(40), Augmentation("randaugment", views_per_image=3))
    epochs = [[torch.cat(parts) for parts in zip(*made.epoch(n), strict=True)] for n in range(6)]
    seen = torch.stack([view[index.argsort()] for _, _, index, view in epochs])
    assert seen[:3].sort(0).values.unique(dim=1).tolist() == [[0], [1], [2]]
    assert torch.equal(seen[3:], seen[:3])
    assert len(seen[0].unique()) == 3  # images do not start with the same view
