"""Extra images: batches of two sources, and a file that is mapped where it lies."""

import itertools
import random
import zipfile

import numpy as np
import pytest
import torch
from small_runs import config

from fastadv.data import Augmentation, Dataset, ImageSet, Loader, load_extra
from fastadv.data.loader import resident_on
from fastadv.errors import UsageError
from fastadv.models import get
from fastadv.teacher_cache import TeacherCache
from fastadv.train import train


def image_set(count, first=0, size=4):
    """Images whose every pixel is the image's index, with an index that has gaps."""
    index = torch.arange(count) * 2 + first
    images = index.byte()[:, None, None, None].expand(count, 3, size, size).contiguous()
    return ImageSet(images, index % 10, index)


def loader(batch_size=10, fraction=0.7, own=25, **more):
    options = {"shuffle": True, "extra": image_set(60, first=60), "extra_fraction": fraction}
    return Loader(image_set(own), batch_size, **options | more)


def gather(batches):
    return [torch.cat(field) for field in zip(*batches, strict=True)]


@pytest.mark.parametrize("own", [1, 3, 9])
def test_batches_are_full_and_of_two_parts(own):
    batches = list(loader(fraction=1 - own / 10).epoch(0))
    assert len(batches) == 3  # as many as without extra images
    for x, y, index, _ in batches:
        assert len(x) == 10
        assert ((index < 60).tolist()) == [True] * own + [False] * (10 - own)
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), index)
        assert torch.equal(y, index % 10)
    mine = torch.cat([batch.index[:own] for batch in batches])
    first = mine[: min(25, len(mine))]
    assert len(first.unique()) == len(first)  # none comes again before all have come
    if own == 9:
        assert len(mine) == 27  # a pass and two of the next


def test_extra_images_are_drawn_evenly_and_the_order_changes():
    epochs = [gather(loader().epoch(number))[2] for number in range(200)]
    drawn = torch.cat(epochs)
    counts = drawn[drawn >= 60].bincount(minlength=180)[60::2]
    assert counts.sum() == 200 * 21
    assert counts.min() > 35
    assert counts.max() < 110  # 70 each on average
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[3], gather(loader().epoch(3))[2])


def test_without_shuffling_the_split_comes_in_order():
    index = gather(loader(shuffle=False, fraction=0.2).epoch(0))[2].view(3, 10)[:, :8].flatten()
    assert index.tolist() == [*range(0, 48, 2)]


@pytest.mark.parametrize(
    "settings", [Augmentation(), Augmentation("randaugment", crop="resized", views_per_image=3)]
)
def test_views_are_replayed_resumed_and_shared_out(settings):
    options = {"padding": 1, "flips": 2, "augmentation": settings}
    batches = list(loader(8, 0.5, **options).epoch(4))
    whole = gather(batches)
    rows = torch.where(whole[2] < 60, whole[2] // 2, (whole[2] - 60) // 2 + 25)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    replayed = loader(8, 0.5, **options).view_batch(rows[order], whole[3][order])
    for found, expected in zip(replayed, whole, strict=True):
        assert torch.equal(found, expected[order])
    for found, expected in zip(
        loader(8, 0.5, **options).epoch(4, skip=2), batches[2:], strict=True
    ):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    parts = [list(loader(8, 0.5, rank=r, world=2, **options).epoch(4)) for r in (0, 1)]
    for batch, *shares in zip(batches, *parts, strict=True):
        assert [(share.index < 60).sum() for share in shares] == [2, 2]
        assert torch.equal(torch.stack([s.index for s in shares], 1).flatten(), batch.index)


def test_views_take_turns_by_epoch():
    settings = Augmentation(views_per_image=3)
    seen = {}
    for number in range(12):
        _, _, index, view = gather(loader(fraction=0.4, augmentation=settings).epoch(number))
        for i, v in zip(index.tolist(), view.tolist(), strict=True):
            assert seen.setdefault(i, (v - number) % 3) == (v - number) % 3
    assert len(seen) > 75


def test_what_is_no_extra_part_of_a_batch():
    for fraction in (0.01, 0.99):
        with pytest.raises(UsageError, match=f"extra_fraction is {fraction}, must leave 1 to 9"):
            loader(fraction=fraction)
    with pytest.raises(UsageError, match="mixup or cutmix is given, must be 0 with extra_data"):
        loader(augmentation=Augmentation(mixup=1.0), num_classes=10)
    with pytest.raises(ValueError, match=r"extra.images are \[3, 5, 5\] each, must be \[3, 4, 4\]"):
        loader(extra=image_set(9, first=60, size=5))
    with pytest.raises(ValueError, match="extra.index has numbers of the split's"):
        loader(extra=image_set(9))
    with pytest.raises(ValueError, match=r"rows has a number outside \[0, 85\)"):
        loader().view_batch(torch.tensor([85]), torch.tensor([0]))


def test_a_cache_of_extra_images_is_refused():
    teacher = get("digits_net", width=4).eval().requires_grad_(False)
    with pytest.raises(UsageError, match="extra_data is given, must be left out for a teacher"):
        TeacherCache(teacher, loader())


def test_images_stay_on_the_cpu_where_a_gpu_has_no_room(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert resident_on(gpu, 500) == gpu
    assert resident_on(gpu, 501) == cpu
    assert resident_on(cpu, 10**15) == cpu


@pytest.fixture
def dataset():
    return Dataset("small", 10, 1, 1, image_set(25), image_set(5, first=100), image_set(5))


def arrays(count=30, **changed):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, 10, count)} | changed


def saved(path, save=np.savez, **fields):
    save(path, **fields)
    return path


@pytest.mark.parametrize("count", [29, 32])
def test_a_header_of_another_number_of_rows(tmp_path, dataset, count):
    """Of too many the last ones would be bytes of what lies behind the array."""
    crafted = tmp_path / "b.npz"
    with (
        zipfile.ZipFile(saved(tmp_path / "a.npz", **arrays())) as whole,
        zipfile.ZipFile(crafted, "w") as other,
    ):
        for name in whole.namelist():
            other.writestr(name, whole.read(name).replace(b"(30, ", b"(%d, " % count))
    with pytest.raises(UsageError, match=r"b.npz is damaged: image has \d+ bytes, not \("):
        load_extra(crafted, dataset)


def test_a_file_is_mapped_where_it_lies(tmp_path, dataset):
    fields = arrays()
    first = saved(tmp_path / "a.npz", something=np.zeros(3), **fields)
    extra = load_extra(first, dataset)
    assert torch.equal(extra.images, torch.from_numpy(fields["image"]).permute(0, 3, 1, 2))
    assert torch.equal(extra.labels, torch.from_numpy(fields["label"]))
    assert extra.index.tolist() == [*range(109, 139)]  # behind 108, the largest of val
    with open("/proc/self/maps") as maps:
        assert str(first) in maps.read()
    batch = next(Loader(dataset.train, 10, extra=extra).epoch(0))
    rows = batch.index[3:] - 109
    assert torch.equal((batch.x[3:] * 255).round().byte(), extra.images[rows])


@pytest.mark.parametrize("kind", ["channels first", "fortran", "int32"])
def test_other_forms_of_the_arrays(tmp_path, dataset, kind):
    fields = arrays()
    expected = torch.from_numpy(fields["image"]).permute(0, 3, 1, 2)
    if kind == "channels first":
        fields["image"] = np.ascontiguousarray(fields["image"].transpose(0, 3, 1, 2))
    elif kind == "fortran":
        fields["image"] = np.asfortranarray(fields["image"])
    else:
        fields["label"] = fields["label"].astype(np.int32)
    extra = load_extra(saved(tmp_path / "a.npz", **fields), dataset)
    assert torch.equal(extra.images, expected)
    assert extra.labels.dtype == torch.int64
    assert torch.equal(extra.labels, torch.from_numpy(fields["label"].astype(np.int64)))


WRONG = {
    "compressed": (
        lambda p: saved(p, np.savez_compressed, **arrays()),
        "is compressed, must be as",
    ),
    "names": (lambda p: saved(p, images=np.zeros(3)), "has the arrays images, must have image and"),
    "pickled": (
        lambda p: saved(p, **arrays(label=np.array([{}] * 30))),
        "label has pickled objects, must be plain numbers",
    ),
    "floats": (
        lambda p: saved(p, **arrays(image=np.zeros((30, 4, 4, 3)))),
        r"image is float64 \[30, 4, 4, 3\], must be uint8 \[N, 4, 4, 3\] as the images of small",
    ),
    "other size": (
        lambda p: saved(p, **arrays(image=np.zeros((30, 8, 8, 3), np.uint8))),
        r"image is uint8 \[30, 8, 8, 3\], must be uint8 \[N, 4, 4, 3\]",
    ),
    "few labels": (
        lambda p: saved(p, **arrays(label=np.zeros(29, int))),
        r"label is int64 \[29\], must be 30 integers",
    ),
    "float labels": (lambda p: saved(p, **arrays(label=np.zeros(30))), r"label is float64 \[30\]"),
    "empty": (lambda p: saved(p, **arrays(0)), r"label is int64 \[0\], must be 0 integers"),
    "large label": (
        lambda p: saved(p, **arrays(label=np.arange(30))),
        r"label holds 0 to 29, must be in 0\.\.9, the classes of small",
    ),
    "negative label": (lambda p: saved(p, **arrays(label=-np.ones(30, int))), "holds -1 to -1"),
    "no archive": (lambda p: p.write_bytes(b"\x93NUMPY" * 40) and p, "is not a readable .npz"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_refused(tmp_path, dataset, case):
    make, message = WRONG[case]
    path = make(tmp_path / "a.npz")
    with pytest.raises(UsageError, match=message) as error:
        load_extra(path, dataset)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match="no-such.npz: no such file"):
        load_extra(tmp_path / "no-such.npz", dataset)


def test_damaged_files_are_refused_or_give_images(tmp_path, dataset):
    path = saved(tmp_path / "a.npz", **arrays())
    whole, rng = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        starts = [one.header_offset for one in archive.infolist()]
    places = [p for s in starts for p in range(s, s + 160)] + [*range(len(whole) - 200, len(whole))]
    refused = 0
    cut = [whole[: rng.randrange(len(whole))] for _ in range(50)]
    changed = (
        whole[:p] + bytes([rng.randrange(256)]) + whole[p + 1 :]
        for p in places
        if rng.random() < 0.5
    )
    for content in itertools.chain(cut, changed):
        path = tmp_path / "b.npz"
        path.write_bytes(content)
        try:
            extra = load_extra(path, dataset)
        except UsageError:
            refused += 1
        else:
            assert int(extra.images.long().sum()) >= 0  # all of it can be read
            assert len(extra.images) == len(extra.labels)
        path.unlink()
    assert refused > 100


def test_a_run_with_extra_data(npz, tmp_path, capsys, teacher):
    with np.load(npz) as file:
        fields = {"image": file["train_images"][:40], "label": file["train_labels"][:40]}
    options = {"extra_data": str(saved(tmp_path / "extra.npz", **fields)), "epochs": 1}
    options |= {"method": "rslad", "teacher_checkpoint": str(teacher)}
    (row,) = train(config(npz, tmp_path / "a", extra_fraction=0.25, **options))
    assert np.isfinite(row["loss"])
    assert "teacher_cached" not in row
    assert "teacher cache: off, because hardly a view of --extra-data" in capsys.readouterr().out
    (other,) = train(config(npz, tmp_path / "b", extra_fraction=0.5, **options))
    assert row["loss"] != other["loss"]


def test_a_fraction_needs_data(npz, tmp_path):
    with pytest.raises(UsageError, match="extra_fraction is 0.3, but extra_data is missing"):
        config(npz, tmp_path, extra_fraction=0.3)
    with pytest.raises(UsageError, match=r"extra_fraction is 1, must be in \(0, 1\)"):
        config(npz, tmp_path, extra_data="x.npz", extra_fraction=1)
