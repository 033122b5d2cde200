import numpy as np
import pytest
import torch

from fastadv import data
from fastadv.data.dataset import check_dataset
from fastadv.errors import UsageError


def split(count=4):
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(count), torch.arange(count))


def dataset(num_classes=4, padding=1, flips=1, **changed):
    splits = {which: split() for which in ("train", "val", "test")} | changed
    return data.Dataset("mine", num_classes, padding, flips, **splits)


def test_a_whole_data_set_is_returned_as_it_is():
    whole = dataset()
    assert check_dataset(whole, "mine") is whole


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_classes": "ten"}, "num_classes is 'ten', must be an int in "),
        ({"num_classes": 0}, "num_classes is 0, must be an int in "),
        ({"padding": -1}, r"padding is -1, must be an int in \[0, "),
        ({"flips": 3}, r"flips is 3, must be an int in \[1, 2\]"),
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


def test_a_sample_is_the_same_each_time_and_in_order():
    images = torch.arange(40).byte()[:, None, None, None].expand(40, 1, 2, 2)
    whole = data.ImageSet(images, torch.arange(40) // 10, torch.arange(100, 140))
    chosen = whole.sample(12)
    assert torch.equal(chosen.index, whole.sample(12).index)
    assert not torch.equal(chosen.index, whole.sample(12, seed=1).index)
    assert torch.equal(chosen.index, chosen.index.unique())
    assert torch.equal(chosen.images[:, 0, 0, 0].long() + 100, chosen.index)
    assert torch.equal(chosen.labels, (chosen.index - 100) // 10)
    assert len(chosen.labels.unique()) == 4
    assert torch.equal(whole.sample(99).index, whole.index)


def test_images_with_channels_last_are_refused():
    """They would train, as images of many channels and one or three columns."""
    for channels in (1, 3):
        images = torch.zeros(4, 8, 8, channels, dtype=torch.uint8)
        last = data.ImageSet(images, torch.arange(4), torch.arange(4))
        match = (
            rf"^mine: train.images are \[4, 8, 8, {channels}\], must be \[N, C, H, W\]: .*permute"
        )
        with pytest.raises(UsageError, match=match):
            check_dataset(dataset(train=last, val=last, test=last), "mine")
    thin = data.ImageSet(torch.zeros(4, 3, 8, 1).byte(), torch.arange(4), torch.arange(4))
    check_dataset(dataset(train=thin, val=thin, test=thin), "mine")


def numbered(index):
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 8, 8)
    return data.ImageSet(images, torch.arange(4), torch.tensor(index))


@pytest.mark.parametrize("index", [[0, 0, 0, 0], [7, 5, 6, 5]])
def test_an_index_names_one_image(index):
    """A teacher cache would give the outputs of one for the other."""
    with pytest.raises(UsageError, match="^mine: val.index has the same number for different im"):
        check_dataset(dataset(val=numbered(index)), "mine")


@pytest.mark.parametrize("index", [[-1, 0, 1, 2], [0, 1, 2, 2**32]])
def test_an_index_is_a_number_of_32_bits(index):
    with pytest.raises(UsageError, match="^mine: test.index lies in .*, must be in 0..4294967295"):
        check_dataset(dataset(test=numbered(index)), "mine")


def test_an_image_may_be_there_twice():
    twice = numbered([9, 2, 5, 7]).take(torch.tensor([0, 3, 0, 1, 3]))
    assert check_dataset(dataset(train=twice), "mine").train is twice


def test_some_of_the_training_images():
    full, part = data.load("digits"), data.load("digits", train_images=100)
    assert torch.equal(part.train.images, full.train.sample(100).images)
    assert len(part.val) == len(full.val)
    assert torch.equal(part.test.index, full.test.index)
    for count in (0, 1001):
        with pytest.raises(UsageError, match=rf"^train_images is {count}, must be in 1\.\.1000"):
            data.load("digits", train_images=count)
