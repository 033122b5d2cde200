"""The digits demo set."""

import sys
from pathlib import Path

import pytest
import torch

from fastadv import data


def test_splits_partition_the_published_set():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    loaded = data.load("digits")
    assert (loaded.name, loaded.num_classes, loaded.padding, loaded.flips) == ("digits", 10, 1, 1)
    splits = (loaded.train, loaded.val, loaded.test)
    assert [len(split) for split in splits] == [1000, 297, 500]
    assert torch.cat([split.index for split in splits]).sort().values.tolist() == list(range(1797))
    published = load_digits()
    for split in splits:
        assert split.images.dtype == torch.uint8
        assert split.images.shape[1:] == (1, 8, 8)
        levels = torch.from_numpy(published.images)[split.index]
        assert (split.images[:, 0] / 255 * 16 - levels).abs().max() < 16 / 255
        assert split.labels.tolist() == published.target[split.index].tolist()
    assert loaded.train.images.unique().tolist() == [
        0,
        16,
        32,
        48,
        64,
        80,
        96,
        112,
        128,
        143,
        159,
        175,
        191,
        207,
        223,
        239,
        255,
    ]


def test_the_split_ignores_the_global_generator():
    torch.manual_seed(5)
    first = data.load("digits").val.index
    torch.manual_seed(6)
    assert torch.equal(first, data.load("digits").val.index)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install fastadv\[demo\]"):
        data.load("digits")


def test_unknown_names_and_absent_folders(tmp_path):
    with pytest.raises(ValueError, match="^data is 'mnist', must be one of digits, cifar10, cif"):
        data.load("mnist")
    for name, place in data.PLACES.items():
        size = {"image_size": 8} if name == "folder" else {}
        with pytest.raises(ValueError, match=f"^data_dir is missing, must be {place} "):
            data.load(name, **size)
        wrong = tmp_path if name == "npz" else Path(__file__)
        for data_dir, kind in ((wrong, ""), (tmp_path / "no", ", which does not exist")):
            with pytest.raises(OSError, match=f"^data_dir is '{data_dir}'{kind}: must be {place}"):
                data.load(name, data_dir, **size)
