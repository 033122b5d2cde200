"""CIFAR files as different writers make them, and as an attacker or a bad disk would."""

import pickle
import struct

import numpy as np
import pytest
import torch
from stand_ins import Dropper

from fastadv import data
from fastadv.data import cifar


@pytest.fixture
def rows(monkeypatch):
    """Batches of 20 images instead of 10 000."""
    monkeypatch.setattr(cifar, "ROWS", 20)
    monkeypatch.setattr(cifar, "HELD_OUT", 10)
    return 20


def read(path):
    return cifar.read_batch(path, cifar.ROWS)


def make(seed, rows=20):
    random = np.random.default_rng(seed)
    return (
        random.integers(0, 256, (rows, 3072), dtype=np.uint8),
        random.integers(0, 10, rows).tolist(),
    )


def python2_pickle(images, labels):
    """The bytes that cPickle of Python 2 writes for {"data": images, "labels": labels}."""
    signed = b"J\xff\xff\xff\xff"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"M" + struct.pack("<H", images.shape[0]) + b"M" + struct.pack("<H", images.shape[1])
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + signed + signed + b"K\x00tb"
    raw = b"T" + struct.pack("<i", images.size) + images.tobytes()
    array += b"(K\x01" + shape + b"\x86" + dtype + b"\x89" + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def write_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    batches = [make(seed) for seed in range(6)]
    for name, (images, labels) in zip([*cifar.TRAIN, "test_batch"], batches, strict=True):
        (folder / name).write_bytes(python2_pickle(images, labels))
    return batches


def cifar100(images, labels):
    """The content of a CIFAR-100 file, with decoys of the fine labels beside them."""
    coarse = [label // 5 for label in labels]
    names = [b"%d.png" % i for i in range(len(labels))]
    return {b"data": images, b"filenames": names, b"fine_labels": labels, b"coarse_labels": coarse}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("key", [str, str.encode])
def test_batches_of_every_protocol_and_key_type(tmp_path, rows, protocol, key):
    images, labels = make(0)
    content = {key("data"): images, key("labels"): labels, key("batch_label"): "one"}
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol))
    read_images, read_labels = read(tmp_path / "batch")
    assert np.array_equal(read_images, images.reshape(20, 3, 32, 32))
    assert read_labels.tolist() == labels
    assert read_labels.dtype == np.int64


def test_a_full_sized_batch_by_python_2(tmp_path):
    images, labels = make(0, rows=10_000)
    (tmp_path / "batch").write_bytes(python2_pickle(images, labels))
    read_images, read_labels = read(tmp_path / "batch")
    assert np.array_equal(read_images.reshape(10_000, 3072), images)
    assert read_labels.tolist() == labels


def test_fortran_order_and_array_labels(tmp_path, rows):
    images, labels = make(0)
    content = {"data": np.asfortranarray(images), "labels": np.array(labels)}
    (tmp_path / "batch").write_bytes(pickle.dumps(content))
    read_images, read_labels = read(tmp_path / "batch")
    assert np.array_equal(read_images.reshape(20, 3072), images)
    assert read_labels.tolist() == labels


@pytest.mark.parametrize("given", ["", "cifar-10-batches-py"])
def test_the_folder_or_its_parent(tmp_path, rows, given):
    batches = write_folder(tmp_path / "cifar-10-batches-py")
    loaded = data.load("cifar10", tmp_path / given)
    assert (loaded.name, loaded.num_classes, loaded.padding, loaded.flips) == ("cifar10", 10, 4, 2)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [90, 10, 20]
    published = np.concatenate([images for images, _ in batches[:5]])
    labels = np.concatenate([labels for _, labels in batches[:5]])
    for split in (loaded.train, loaded.val):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == split.index.dtype == torch.int64
        assert np.array_equal(split.images.reshape(-1, 3072), published[split.index])
        assert np.array_equal(split.labels, labels[split.index])
    assert np.array_equal(loaded.test.images.reshape(20, 3072), batches[5][0])
    assert loaded.test.index.tolist() == list(range(20))


def test_held_out_images_are_fixed_and_not_trained_on(tmp_path, rows):
    write_folder(tmp_path)
    torch.manual_seed(1)
    first = data.load("cifar10", tmp_path)
    torch.manual_seed(2)
    again, other = data.load("cifar10", tmp_path), data.load("cifar10", tmp_path, seed=1)
    assert torch.equal(first.val.index, again.val.index)
    assert not torch.equal(first.val.index, other.val.index)
    assert sorted(first.train.index.tolist() + first.val.index.tolist()) == list(range(100))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["whole", "data", "labels", "extra"])
def test_code_in_a_batch_is_refused_and_not_run(tmp_path, rows, place, protocol):
    bait, path = tmp_path / "bait", tmp_path / "data_batch_1"
    content = dict(zip(("data", "labels"), make(0), strict=True)) | {place: Dropper(bait)}
    path.write_bytes(pickle.dumps(Dropper(bait) if place == "whole" else content, protocol))
    with pytest.raises(ValueError, match=r"data_batch_1.*asks for (io|_io)\.open; nothing was run"):
        read(path)
    assert not bait.exists()


@pytest.mark.parametrize("name", ["numpy load", "numpy.core.multiarray fromfile", "builtins eval"])
def test_other_names_of_numpy_and_builtins_are_refused(tmp_path, name):
    module, attribute = name.split()
    (tmp_path / "batch").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match=f"asks for {module}.{attribute}"):
        read(tmp_path / "batch")


def test_a_pickle_cannot_reach_the_real_dtype(tmp_path):
    flags = np.dtype("u1").flags
    state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft"  # flags 63: holds objects
    (tmp_path / "batch").write_bytes(b"\x80\x02cnumpy\ndtype\nU\x02u1\x85R" + state + b"b.")
    with pytest.raises(ValueError, match="batch"):
        read(tmp_path / "batch")
    assert np.dtype("u1").flags == flags


@pytest.mark.parametrize("length", [0, 1, 50, 200, 30_000, -1])
def test_truncated_batches(tmp_path, rows, length):
    (tmp_path / "data_batch_2").write_bytes(python2_pickle(*make(0))[:length])
    with pytest.raises(ValueError, match="data_batch_2: not a readable CIFAR file"):
        read(tmp_path / "data_batch_2")


def test_missing_files_are_named(tmp_path, rows):
    told = "data_batch_1: no such CIFAR file: data_dir must be the unpacked folder cifar-10-batches"
    with pytest.raises(FileNotFoundError, match=told):
        data.load("cifar10", tmp_path)
    write_folder(tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="test_batch"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": np.zeros((20, 3071), np.uint8)}, r"data is uint8 \[20, 3071\]"),
        ({"data": np.zeros((19, 3072), np.uint8)}, r"data is uint8 \[19, 3072\]"),
        ({"data": np.zeros((20, 3072), np.int64)}, "data is int64"),
        ({"data": np.zeros((20, 3072), np.float32)}, "array of type 'f4'"),
        ({"data": None}, "data is object"),
        ({"labels": [0] * 19}, r"labels are int64 \[19\]"),
        ({"labels": [0.5] * 20}, "labels are float64"),
        ({"labels": ["cat"] * 20}, "labels are <U3"),
        ({"labels": [10] + [0] * 19}, r"labels lie in 0\.\.10"),
        ({"labels": [-1] + [0] * 19}, r"labels lie in -1\.\.0"),
    ],
)
def test_wrong_shapes_types_and_labels(tmp_path, rows, change, reason):
    content = dict(zip(("data", "labels"), make(0), strict=True)) | change
    (tmp_path / "batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"batch: .*{reason}"):
        read(tmp_path / "batch")


@pytest.mark.parametrize("content", [[1, 2], {"labels": [1]}, "text", {1: 2}])
def test_pickles_of_something_else(tmp_path, content):
    (tmp_path / "batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="batch: not a readable CIFAR file"):
        read(tmp_path / "batch")


@pytest.mark.parametrize("given", ["", "cifar-100-python"])
def test_cifar100_has_the_fine_labels(tmp_path, rows, given):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = np.random.default_rng(0)
    contents = {}
    for name, count in (("train", 100), ("test", 20)):
        labels = random.permutation(100)[:count].tolist()
        contents[name] = random.integers(0, 256, (count, 3072), dtype=np.uint8), labels
        (folder / name).write_bytes(pickle.dumps(cifar100(*contents[name]), 2))
    loaded = data.load("cifar100", tmp_path / given)
    assert (loaded.name, loaded.num_classes) == ("cifar100", 100)
    assert (loaded.padding, loaded.flips) == (4, 2)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [90, 10, 20]
    assert sorted(loaded.train.index.tolist() + loaded.val.index.tolist()) == list(range(100))
    for split, name in ((loaded.train, "train"), (loaded.val, "train"), (loaded.test, "test")):
        images, labels = contents[name]
        assert np.array_equal(split.images.reshape(-1, 3072), images[split.index])
        assert np.array_equal(split.labels, np.array(labels)[split.index])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({b"fine_labels": [100] + [0] * 99}, r"train: fine_labels lie in 0\.\.100, not 0\.\.99"),
        ({b"fine_labels": [0] * 99}, r"train: fine_labels are int64 \[99\], not 100 integers"),
        ({b"fine_labels": None}, "train: fine_labels are object"),
        ({b"data": np.zeros((20, 3072), np.uint8)}, r"train: data is uint8 \[20, 3072\]"),
    ],
)
def test_bad_cifar100_files(tmp_path, rows, change, reason):
    content = cifar100(np.zeros((100, 3072), np.uint8), list(range(100))) | change
    (tmp_path / "train").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=reason):
        data.load("cifar100", tmp_path)


def test_hostile_and_truncated_cifar100_files(tmp_path, rows):
    path, bait = tmp_path / "train", tmp_path / "bait"
    content = cifar100(np.zeros((100, 3072), np.uint8), list(range(100)))
    path.write_bytes(pickle.dumps(content | {b"filenames": Dropper(bait)}, 2))
    with pytest.raises(ValueError, match=r"train.*asks for (io|_io)\.open; nothing was run"):
        data.load("cifar100", tmp_path)
    assert not bait.exists()
    path.write_bytes(pickle.dumps(content, 2)[:-100])
    with pytest.raises(ValueError, match="train: not a readable CIFAR file"):
        data.load("cifar100", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train: no such CIFAR file"):
        data.load("cifar100", tmp_path)
