"""Image sets in one .npz file."""

import warnings

import numpy as np
import pytest
import torch
from stand_ins import Dropper

from fastadv import data


def arrays(shape=(16, 16, 3), train=40, test=7, **changes):
    random = np.random.default_rng(0)
    made = {
        "train_images": random.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % 4,
        "test_images": random.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % 4,
    } | changes
    return {name: array for name, array in made.items() if array is not None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.npz"


@pytest.mark.parametrize(
    ("shape", "expected", "padding", "flips"),
    [
        ((16, 16, 3), (3, 16, 16), 4, 2),
        ((3, 16, 16), (3, 16, 16), 4, 2),
        ((15, 15, 3), (3, 15, 15), 1, 1),
        ((28, 28, 1), (1, 28, 28), 1, 1),
        ((1, 28, 28), (1, 28, 28), 1, 1),
        ((28, 28), (1, 28, 28), 1, 1),
    ],
)
def test_layouts_and_augmentation(path, shape, expected, padding, flips):
    content = arrays(shape)
    np.savez(path, **content)
    loaded = data.load("npz", path)
    assert (loaded.name, loaded.num_classes) == ("set", 4)
    assert (loaded.padding, loaded.flips) == (padding, flips)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [36, 4, 7]
    assert sorted(loaded.train.index.tolist() + loaded.val.index.tolist()) == list(range(40))
    for split, part in ((loaded.train, "train"), (loaded.val, "train"), (loaded.test, "test")):
        images = content[f"{part}_images"][split.index]
        images = images.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else images
        assert split.images.shape[1:] == expected
        assert split.images.is_contiguous()
        assert np.array_equal(split.images, images.reshape(-1, *expected))
        assert np.array_equal(split.labels, content[f"{part}_labels"][split.index])
        assert split.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_labels": None}, "no array 'test_labels'"),
        ({"train_images": None}, "no array 'train_images'"),
        ({"train_images": np.zeros((40, 16, 16, 3))}, r"train_images is float64 \[40, 16, 16, 3\]"),
        ({"test_images": np.zeros((7, 16, 16, 4), np.uint8)}, r"test_images is uint8 \[7, 16"),
        ({"test_images": np.zeros((7, 16), np.uint8)}, "test_images is uint8"),
        ({"test_images": np.zeros((7, 16, 15, 3), np.uint8)}, "test_images"),
        ({"train_labels": np.zeros(39, int)}, r"train_labels is int64 \[39\], not 40 integers"),
        ({"train_labels": np.zeros((40, 2), int)}, "train_labels"),
        ({"test_labels": np.zeros(7)}, "test_labels is float64"),
        ({"test_labels": np.full(7, -1)}, "test_labels holds -1"),
    ],
)
def test_errors_name_the_file_and_the_array(path, changes, reason):
    np.savez(path, **arrays(**changes))
    with pytest.raises(ValueError, match=rf"set\.npz: .*{reason}"):
        data.load("npz", path)


def test_too_few_images(path):
    np.savez(path, **arrays(train=9))
    with pytest.raises(ValueError, match=r"set\.npz: train_images needs 10"):
        data.load("npz", path)
    np.savez(path, **arrays(test=0))
    with pytest.raises(ValueError, match=r"test_images 1 or more"):
        data.load("npz", path)


def test_pickled_arrays_are_refused_and_not_run(path, tmp_path):
    bait = tmp_path / "bait"
    np.savez(path, **arrays(train_labels=np.array([Dropper(bait)] * 40, dtype=object)))
    with pytest.raises(ValueError, match=r"set\.npz: not a readable"):
        data.load("npz", path)
    assert not bait.exists()


@pytest.mark.parametrize("length", [0, 1, 4, 100, 5000, -1])
def test_truncated_files(path, length):
    np.savez_compressed(path, **arrays())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"set\.npz: not a readable"):
        data.load("npz", path)


def test_damaged_missing_and_other_files(path):
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[2000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npz: not a readable"):
        data.load("npz", path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(ValueError, match=r"set\.npy: not a readable"):
        data.load("npz", path.with_suffix(".npy"))
    with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
        data.load("npz", path.with_name("gone.npz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels + 1, "1 of 5 classes .*: 0; labels begin at 1, must count from 0$"),
        (lambda labels: labels + 3, "3 of 7 classes .*: 0, 1, 2; labels begin at 3, must count"),
        (lambda labels: labels * 2, "3 of 7 classes have no training image: 1, 3, 5$"),
        (lambda labels: np.where(labels == 3, 5, labels), "2 of 6 classes .*: 3, 4$"),
        (lambda labels: labels * 9, "24 of 28 classes .*: 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, ...$"),
    ],
)
def test_classes_without_images_are_named(path, change, message):
    made = arrays()
    changed = {k: change(v) if k.endswith("labels") else v for k, v in made.items()}
    np.savez(path, **changed)
    with pytest.warns(UserWarning, match=f"data set 'set': {message}"):
        loaded = data.load("npz", path)
    assert loaded.num_classes == max(changed["train_labels"]) + 1  # warned of, and taken


def test_a_class_of_the_test_images_alone(path):
    np.savez(path, **arrays(test_labels=np.array([4, 0, 1, 2, 3, 0, 1])))
    with pytest.warns(UserWarning, match="1 of 5 classes have no training image: 4$"):
        data.load("npz", path)
    np.savez(path, **arrays(train_labels=np.arange(40) % 3 + 1, test_labels=np.arange(7) % 4))
    with pytest.warns(UserWarning, match="1 of 4 classes have no training image: 0$"):
        data.load("npz", path)


def test_a_whole_set_of_classes_is_not_warned_of(path):
    np.savez(path, **arrays())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data.load("npz", path)


@pytest.mark.parametrize("label", [0, 3])
def test_one_class_is_none(path, label):
    np.savez(path, **arrays(train_labels=np.full(40, label)))
    with pytest.raises(ValueError, match=rf"train_labels are all {label}, must be of two classes"):
        data.load("npz", path)


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(40) % 4 == 1,
        np.arange(40) % 4 + 0.0,
        np.eye(4)[np.arange(40) % 4].astype(int),
        np.array(["cat", "dog"] * 20),
        np.arange(40) % 4 - 1,
        np.arange(40) % 4 * 2**40,
        np.full(40, 2**63, np.uint64),
    ],
)
def test_labels_are_class_numbers(path, labels):
    np.savez(path, **arrays(train_labels=labels))
    with pytest.raises(ValueError, match=r"set\.npz: train_labels (is|holds) "):
        data.load("npz", path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, ">i4"])
def test_labels_of_any_integer_type(path, dtype):
    np.savez(path, **arrays(train_labels=(np.arange(40) % 4).astype(dtype)))
    loaded = data.load("npz", path)
    assert loaded.train.labels.dtype == torch.int64
    assert torch.equal(loaded.train.labels, loaded.train.index % 4)
