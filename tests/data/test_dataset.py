import numpy as np
import pytest
import torch

from fastadv import data
from fastadv.data.dataset import check_dataset
from fastadv.errors import UsageError


def split(count=4):
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(count), torch.arange(count))


def dataset(num_classes=4, **changed):
    splits = {which: split() for which in ("train", "val", "test")} | changed
    return data.Dataset("mine", num_classes, 1, 1, **splits)


def test_a_whole_data_set_is_returned_as_it_is():
    whole = dataset()
    assert check_dataset(whole, "mine") is whole


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_classes": "ten"}, "num_classes is 'ten', must be an int"),
        ({"num_classes": None}, "num_classes is None, must be an int"),
        ({"num_classes": np.int64(4)}, "num_classes is .*4.*, must be an int"),
        ({"train": None}, "train.images is a NoneType, must be a tensor"),
        (
            {"val": data.ImageSet(split().images.numpy(), split().labels, split().index)},
            "val.images is a ndarray, must be a tensor",
        ),
        (
            {"test": data.ImageSet(split().images, [0, 1, 2, 3], split().index)},
            "test.labels is a list, must be a tensor",
        ),
    ],
)
def test_what_is_of_another_kind_is_named(wrong, match):
    with pytest.raises(UsageError, match=f"^mine: {match}"):
        check_dataset(dataset(**wrong), "mine")
