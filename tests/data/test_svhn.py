"""SVHN's MATLAB files, as published and as a bad disk or a stranger would make them."""

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from fastadv import data
from fastadv.data import svhn

scipy_io = pytest.importorskip("scipy.io")
scipy_sparse = pytest.importorskip("scipy.sparse")


def make(count, **changes):
    random = np.random.default_rng(count)
    return {
        "X": random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
        "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None],
    } | changes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(svhn, "HELD_OUT", 10)
    for part, count in (("train", 40), ("test", 15)):
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", make(count), do_compression=count == 40)
    return tmp_path


def test_pixels_labels_and_splits(folder):
    loaded = data.load("svhn", folder)
    assert (loaded.name, loaded.num_classes, loaded.padding, loaded.flips) == ("svhn", 10, 4, 1)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [30, 10, 15]
    assert sorted(loaded.train.index.tolist() + loaded.val.index.tolist()) == list(range(40))
    for split, count in ((loaded.train, 40), (loaded.val, 40), (loaded.test, 15)):
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous()
        assert split.labels.dtype == torch.int64
        published = make(count)["X"]
        for image, label, i in zip(split.images, split.labels, split.index, strict=True):
            assert np.array_equal(image.permute(1, 2, 0), published[:, :, :, i])  # row, column
            assert label == (i + 1) % 10  # the tenth class is the digit 0


@pytest.mark.parametrize("y", [np.arange(15) % 10 + 1, np.arange(15.0)[:, None] % 10 + 1])
def test_labels_of_other_integer_shapes_and_of_floats(folder, y):
    scipy_io.savemat(folder / "test_32x32.mat", make(15, y=y))
    if y.dtype.kind == "f":
        with pytest.raises(ValueError, match=r"test_32x32\.mat: y is float64"):
            data.load("svhn", folder)
    else:
        assert data.load("svhn", folder).test.labels[9] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"X": np.zeros((32, 32, 3, 15))}, r"X is float64 \[32, 32, 3, 15\]"),
        ({"X": np.zeros((15, 32, 32, 3), np.uint8)}, r"X is uint8 \[15, 32, 32, 3\]"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8)}, "X is uint8"),
        ({"X": np.array([{"a": 1}, "text"], dtype=object)}, ".*X is not an array of real"),
        ({"X": {"a": 1}}, ".*X is not an array of real"),
        ({"X": "text"}, ".*X is not an array of real"),
        ({"X": scipy_sparse.eye_array(4)}, ".*X is not an array of real"),
        ({"X": np.ones(4) * 1j}, ".*X is not an array of real"),
        ({"y": np.ones(14, np.uint8)}, r"y is uint8 \[1, 14\], not 15 integers"),
        ({"y": np.zeros(15, np.uint8)}, r"y lies in 0\.\.0, not 1\.\.10"),
        ({"y": np.full(15, 11)}, r"y lies in 11\.\.11"),
    ],
)
def test_other_contents(folder, changes, reason):
    scipy_io.savemat(folder / "test_32x32.mat", make(15, **changes))
    with pytest.raises(ValueError, match=rf"test_32x32\.mat: {reason}"):
        data.load("svhn", folder)


@pytest.mark.parametrize("length", [0, 1, 100, 128, 200, 5000, -1])
def test_truncated_files(folder, length):
    path = folder / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"train_32x32\.mat: "):
        data.load("svhn", folder)


def test_a_compressed_bomb_is_not_unfolded(folder, monkeypatch):
    monkeypatch.setattr(svhn, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"train_32x32\.mat: .*larger than 1000 bytes"):
        data.load("svhn", folder)


def test_what_else_a_file_holds_is_passed_over(folder):
    others = {"a": {"b": [1, "text"]}, "note": "text", "z": np.ones(3) * 1j}
    scipy_io.savemat(folder / "test_32x32.mat", others | make(15), do_compression=True)
    assert len(data.load("svhn", folder).test) == 15


def test_doubles_that_matlab_stores_as_bytes(folder):
    path = folder / "test_32x32.mat"
    content = path.read_bytes()
    at = content.rindex(b"\x09\x00\x00\x00\x00\x00\x00\x00")  # flags of y: class uint8
    path.write_bytes(content[:at] + b"\x06" + content[at + 1 :])  # class double, bytes as before
    assert data.load("svhn", folder).test.labels.tolist() == [(i + 1) % 10 for i in range(15)]


def test_a_length_beyond_the_files_end_is_named(folder):
    path = folder / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"test_32x32\.mat: .*an element of \d+ bytes where \d+ are"
    ):
        data.load("svhn", folder)


def test_files_of_another_kind(folder):
    path = folder / "train_32x32.mat"
    for content in (b"<html>Quota exceeded</html>" * 20, b"MATLAB 7.3 MAT-file" + bytes(500)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat: not a readable SVHN file"):
            data.load("svhn", folder)
    scipy_io.savemat(path, {"y": np.ones(40, np.uint8)})
    with pytest.raises(ValueError, match=r"train_32x32\.mat: not a readable SVHN file.*'X'"):
        data.load("svhn", folder)


def test_damaged_bytes_give_a_value_error_or_an_answer(folder):
    path = folder / "test_32x32.mat"
    scipy_io.savemat(path, make(15))
    content, random = path.read_bytes(), np.random.default_rng(0)
    for position in [*range(128, 260), *random.integers(0, len(content), 60)]:
        path.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
        with contextlib.suppress(ValueError):  # anything else fails, as does a crash
            assert data.load("svhn", folder).test.images.shape == (15, 3, 32, 32)


def test_missing_and_small_files(folder, monkeypatch):
    monkeypatch.setattr(svhn, "HELD_OUT", 40)
    with pytest.raises(ValueError, match=r"train_32x32\.mat: 40 images, but 40 are held out"):
        data.load("svhn", folder)
    (folder / "train_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_32x32\.mat: no such SVHN file"):
        data.load("svhn", folder)


def test_a_matrix_of_a_million_elements_is_not_listed(folder):
    """Eight bytes each; listing them would take a hundred times their size."""
    matrix = struct.pack("<II", 14, 1 << 23) + bytes(1 << 23)
    packed = zlib.compress(matrix)
    path = folder / "train_32x32.mat"
    head = path.read_bytes()[:128]
    path.write_bytes(head + struct.pack("<II", 15, len(packed)) + packed)
    tracemalloc.start()
    with pytest.raises(ValueError, match="not a readable SVHN file"):
        data.load("svhn", folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
